"""What every driver does, on typed values.

A driver turns a `Boot` (a spec with every choice made, and nothing of any hypervisor in it) into a running VM, and
says how that VM is. It neither stores nor locks: `Host` does, and calls it with the VM's lock held wherever something changes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from polyvisor.host.record import Launch
from polyvisor.host.store import VMDirectory
from polyvisor.operation import Progress
from polyvisor.spec.cpus import ALL_CPUS
from polyvisor.spec.forward import Forward
from polyvisor.spec.resources import NORMAL_WEIGHT, Resources
from polyvisor.spec.vm import DeviceModel, Firmware, Mode, OnReboot
from polyvisor.status import Capabilities, Usage, VMState
from polyvisor.values import dataclass

if TYPE_CHECKING:
    import asyncio


@dataclass(frozen=True, kw_only=True)
class BootDisk:
    """A disk as the driver attaches it: the qcow2 `path`, under it frozen `layers`, the uppermost first, then `backing`.

    All of them but `path` are read-only qcow2 files.
    """

    path: Path
    backing: Path | None = None
    layers: tuple[Path, ...] = ()

    @property
    def node(self) -> str:
        """What the driver calls it: another name with every new overlay."""
        return self.path.stem

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.node.partition("-")[0]

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("disk"))


def seed_number(disks: Sequence[BootDisk]) -> int:
    """Where a VM's seed stands among its disks: after all of them."""
    return max((disk.number for disk in disks), default=-1) + 1


@dataclass(frozen=True, kw_only=True)
class BootNic:
    """A network card; `network` as in the spec, `forwards` with every port chosen.

    `group` is ADDRESS:PORT of a private network's frames.
    """

    mac: str
    network: str
    group: str | None = None
    forwards: tuple[Forward, ...] = ()
    number: int = 0

    @property
    def name(self) -> str:
        """What the user calls it."""
        return f"nic{self.number}"


@dataclass(frozen=True, kw_only=True)
class Boot:
    """A VM ready to be started: the spec with every choice made.

    Paths are absolute, or relative to the VM's directory. `seed` is a NoCloud disk. `uefi_vars` is the VM's own
    copy of the firmware's variables. `slots` says where devices are on the PCI bus, by their names: all of them, or none.
    """

    name: str
    id: str
    vcpus: int
    memory_mib: int
    cpu: str
    mode: Mode
    devices: DeviceModel
    firmware: Firmware
    on_reboot: OnReboot
    accelerator: str
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    disks: tuple[BootDisk, ...] = ()
    nics: tuple[BootNic, ...] = ()
    seed: Path | None = None
    uefi_vars: Path | None = None
    vcpus_max: int | None = None
    memory_max_mib: int | None = None
    cpu_weight: int = NORMAL_WEIGHT
    cpu_limit: int | None = None
    cpu_affinity: str = ALL_CPUS
    disk_iops_limit: int | None = None
    disk_rate_limit_mib: int | None = None
    slots: Mapping[str, int] = field(default_factory=dict)

    @property
    def resources(self) -> Resources:
        return Resources(
            vcpus=self.vcpus,
            vcpus_max=self.vcpus_max or self.vcpus,
            memory_mib=self.memory_mib,
            memory_max_mib=self.memory_max_mib or self.memory_mib,
            cpu_weight=self.cpu_weight,
            cpu_limit=self.cpu_limit,
            cpu_affinity=self.cpu_affinity,
            disk_iops_limit=self.disk_iops_limit,
            disk_rate_limit_mib=self.disk_rate_limit_mib,
        )


@dataclass(frozen=True, kw_only=True)
class Fork:
    """A VM that begins as a copy of another one that runs: what is its own; `together` is how many begin at once with it.

    Should it boot again, it does so by `kernel` and `initrd` (None: by those of the source), and its guest finds who it is in
    the cpio archive `seed`, where there is one.
    """

    name: str
    id: str
    together: int = 1
    nics: tuple[BootNic, ...] = ()
    disks: tuple[BootDisk, ...] = ()
    kernel: Path | None = None
    initrd: Path | None = None
    seed: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Template:
    """A guest's memory and devices at one moment, from which any number of forks begin.

    `memory` and `state` are open files, neither of which ever changes again; whoever was given the template closes them.
    `machine` and `vcpus` are as `Driver.save` and `Usage` give them. `pause_s` is for how many seconds the guest stood still.
    """

    memory: int
    state: int
    machine: str
    vcpus: int | None
    pause_s: float


@dataclass(frozen=True, kw_only=True)
class Command:
    """How a driver starts a VM: the exact command and the hypervisor's version, for the launch record.

    `config` is the text of the configuration that the command reads, where there is one and it is known by then.
    """

    argv: tuple[str, ...]
    version: str
    config: str = ""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A VM as its driver sees it."""

    state: VMState
    reason: str | None = None
    pid: int | None = None


class Driver(Protocol):
    """One way to run VMs on this host. Methods raise errors of `polyvisor.errors` alone."""

    name: str

    async def probe(self) -> Capabilities:
        """What this driver can do here, proved rather than assumed."""

    async def command(self, boot: Boot) -> Command:
        """The exact command that starts `boot`; raises Unavailable, Unsupported."""

    async def start(
        self,
        vm: VMDirectory,
        boot: Boot,
        command: Command,
        user: int | None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Observed:
        """Run the `command` of `boot` in directory `vm`, as numeric `user` where the caller is root.

        Raises CannotStart, and InvalidInput where a port or a MAC is taken.
        `meanwhile` is called once, when nothing is left to do but to wait for the hypervisor.
        """

    async def inspect(self, vm: VMDirectory) -> Observed:
        """How the VM is now. Needs no lock."""

    def ended(self, vm: VMDirectory) -> Observed:
        """How a VM is that is not alive: a list of many looks no closer than it has to. Needs no lock."""

    async def console(self, vm: VMDirectory) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The guest's serial console; the caller sees to it that there is one at a time. Raises OSError."""

    async def shutdown(self, vm: VMDirectory) -> None:
        """Ask the guest to shut down (the power button); returns at once."""

    async def kill(self, vm: VMDirectory) -> None:
        """End the VM now, and return when it has ended; a VM that is not alive is left as it is."""

    def ends_where_it_reboots(self, vm: VMDirectory) -> bool:
        """Whether the VM ends when its guest reboots, so that it takes a stop and a start instead of `reboot` or `reset`."""

    async def reboot(self, vm: VMDirectory, timeout_s: float) -> None:
        """Let the guest shut down, and boot again within the same VM; raises TimedOut."""

    async def reset(self, vm: VMDirectory) -> None:
        """Press the reset button."""

    async def pause(self, vm: VMDirectory) -> None:
        """Stop the guest's vCPUs; memory stays."""

    async def resume(self, vm: VMDirectory) -> None:
        """Let the guest's vCPUs go on."""

    async def save(self, vm: VMDirectory, file: int, progress: Progress) -> str:
        """Write memory and devices to `file`, open for writing; the VM stays, its vCPUs stand still, and it can be resumed.

        Where it fails the VM is paused, or as it was. A save that was cut off may still be under way: this, and whatever else
        changes the VM, ends it first.
        Returns what `restore_command` needs to make the very same machine later. Raises WrongState, Unsupported, StorageFull,
        OSError where `file` can't be written.
        """

    async def restore_command(
        self, launch: Launch, machine: str, nics: tuple[BootNic, ...], vcpus: int | None = None
    ) -> Command:
        """The command that starts a VM which was saved while it ran as in `launch`; raises CannotStart, Unavailable.

        `machine` is what `save` returned, `vcpus` how many it had then; ports of the host are those of `nics`.
        """

    async def restore(
        self,
        vm: VMDirectory,
        command: Command,
        nics: tuple[BootNic, ...],
        user: int | None,
        file: int,
        progress: Progress,
    ) -> Observed:
        """Run the `restore_command` of `nics` as `start` does, and read what `save` wrote from `file`; the vCPUs stand still.

        Raises CannotStart, and InvalidInput where a port or a MAC is taken.
        """

    async def switch_disks(self, vm: VMDirectory, disks: Sequence[BootDisk]) -> None:
        """Let a VM that is alive write to `disks` from now on, all at one moment; they are empty overlays of what it wrote to.

        One that does already is left as it is. Raises Unsupported, TimedOut where nobody knows whether it was done, and
        PolyvisorError where it was refused: then nothing is changed.
        """

    def with_disks(self, launch: Launch, disks: Sequence[BootDisk]) -> Launch:
        """How a VM runs that was started as in `launch`, once it has `disks` in place of those it had."""

    async def template(
        self,
        vm: VMDirectory,
        user: int | None,
        progress: Progress,
        *,
        runs: bool,
        at_pause: Callable[[], Awaitable[None]] | None = None,
    ) -> Template:
        """Copy memory and devices of a VM, which goes on meanwhile but for a moment; afterwards it goes on where it `runs`.

        `at_pause` is awaited at that moment: the driver can be called there. Raises WrongState, Unsupported.
        """

    async def fork_command(self, launch: Launch, template: Template, fork: Fork) -> Command:
        """The command that starts a `fork` of the VM that runs as in `launch`."""

    async def fork(
        self,
        vm: VMDirectory,
        command: Command,
        user: int | None,
        template: Template,
        resources: Resources | None,
        meanwhile: Callable[[], bytes],
        born: Callable[[], None],
        *,
        go: bool,
    ) -> Observed:
        """Run a `fork_command` with the shares and limits of `resources`, and call `born` once it has all of the memory.

        With `go` it runs then. `meanwhile` is called when its process has begun, and says what its guest is to be told, who
        finds that as soon as it goes on. Raises CannotStart, and what the two raise; then there is no process.
        """

    async def attached(self, vm: VMDirectory) -> frozenset[str]:
        """The names of the disks and network cards that a VM that is alive has, but for what no command can have changed."""

    async def attach(self, vm: VMDirectory, device: BootDisk | BootNic, slots: Mapping[str, int]) -> None:
        """Plug a disk or a card into a VM that is alive, where `slots` says; one that is there stays. Raises Unsupported.

        Where it fails the VM is as before. This and the next two may be repeated.
        """

    async def detach(self, vm: VMDirectory, name: str) -> None:
        """Pull a disk or a card out of a VM that runs; raises TimedOut where its guest does not let go of it, Unsupported."""

    async def grow_disk(self, vm: VMDirectory, disk: BootDisk, size: int) -> None:
        """Make a disk of a VM that is alive `size` bytes large, and tell its guest; raises Unsupported."""

    def with_device(self, launch: Launch, device: BootDisk | BootNic, slots: Mapping[str, int]) -> Launch:
        """How a VM runs that was started as in `launch`, once it has a device more, and all of them are where `slots` says."""

    def without_device(self, launch: Launch, name: str, slots: Mapping[str, int]) -> Launch:
        """The same with a device less."""

    async def add_forward(self, vm: VMDirectory, nic: int, forward: Forward) -> None:
        """Open a port of the host to the guest while the VM runs; raises InvalidInput where it is taken."""

    async def remove_forward(self, vm: VMDirectory, nic: int, forward: Forward) -> None:
        """Close it again."""

    async def usage(self, vm: VMDirectory) -> Usage:
        """What a VM that is alive really has. Needs no lock."""

    async def set_vcpus(self, vm: VMDirectory, count: int) -> None:
        """Give a running VM `count` vCPUs, at most as many as it was started with room for.

        Raises TimedOut where the guest does not take part. This and the next two may be repeated.
        """

    async def set_memory(self, vm: VMDirectory, memory_mib: int, *, wait: bool = True) -> None:
        """Give a running VM so much memory, at most as much as it was started with room for.

        Without `wait` its guest is only told, as at a start: it obeys when it can.
        Raises WrongState where the guest can't spare it, or does not listen; TimedOut where it gives less.
        """

    async def set_scheduling(self, vm: VMDirectory, resources: Resources) -> None:
        """Put weight, limits and affinity of a VM that is alive in force."""
