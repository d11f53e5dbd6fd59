"""`HostApi`: the one interface to a machine that runs VMs.

Everything above a host (the command line, an API, a fleet) calls these verbs on typed values, and does not know whether the
host is this process (`Host`) or another machine. One suite of contract tests runs against every implementation.

All verbs are idempotent: what is already as asked succeeds and stays. They raise errors of `polyvisor.errors` alone: any of
them NotFound for a VM that is not there, InvalidInput for values that can't be meant, and Busy where another command
holds the VM for longer than they wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from polyvisor.host.moves import Cargo, Landing, Move, Parting
from polyvisor.host.setup.wish import Wish
from polyvisor.host.snapshots import Snapshot
from polyvisor.images.image import Image
from polyvisor.operation import Progress, silent
from polyvisor.spec.forward import Forward
from polyvisor.spec.resources import Changes
from polyvisor.spec.vm import VMSpec
from polyvisor.status import (
    Check,
    DiskStatus,
    Event,
    Forked,
    HostStatus,
    MemoryUse,
    NicStatus,
    Pending,
    Resized,
    Saved,
    Setup,
    StoredTemplate,
    Usage,
    VMStatus,
)
from polyvisor.values import dataclass

if TYPE_CHECKING:  # it is rarely needed, and takes a millisecond
    from polyvisor.images.inspection.findings import Inspection

STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class SSHTarget:
    """How to log in to a guest: the host key is checked against `known_hosts`, where the first login puts it.

    `proxy` is the command that leads to `address` where that is not of this machine.
    """

    address: str
    port: int
    user: str
    identity: Path
    known_hosts: Path
    alias: str
    proxy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Details:
    """One VM in full: its status, its spec, the command that runs it (None before the first start), what is saved of it.

    `usage` is what it really has while it is alive; `pending` what its next boot changes. `disk_names` and `nic_names` are
    those of the disks and cards in the spec, in its order.
    """

    status: VMStatus
    spec: VMSpec
    mac_addresses: tuple[str, ...]
    hypervisor_reason: str | None
    argv: tuple[str, ...] | None
    directory: str
    saved: Saved | None = None
    usage: Usage | None = None
    pending: tuple[Pending, ...] = ()
    disk_names: tuple[str, ...] = ()
    nic_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """An image in a host's store; `current` unless its name leads to a newer one by now."""

    image: Image
    directory: str
    current: bool


@dataclass(frozen=True, kw_only=True)
class Obtainable:
    """An image that a host can build or fetch when a VM asks for it."""

    name: str
    about: str


class HostApi(Protocol):
    """A machine that runs VMs."""

    # The host itself

    async def status(self) -> HostStatus:
        """The machine, what it can run, and how many VMs it has in which state."""

    async def check(self) -> list[Check]:
        """What works here, and what is missing, with the command that mends it."""

    async def prepare_host(self, wish: Wish, progress: Progress = silent, *, act: bool = False) -> Setup:
        """What makes this machine a KVM or a Xen host, step by step, and how far that is; raises InvalidInput.

        With `act` it is done, but for what is to be done by hand, as the reboot. Then it raises Unsupported where it can't be
        done here, NotPermitted without root, ProcessFailed.
        """

    async def close(self) -> None:
        """Let go of what is held open (a connection, say); the next verb takes it up again."""

    # VMs

    async def create(self, spec: VMSpec, progress: Progress = silent, *, new: bool = False) -> VMStatus:
        """Make a VM without starting it. One of the same name and spec is left as it is; raises AlreadyExists otherwise.

        With `new` it raises AlreadyExists for any VM of that name: whoever makes up names never gets another's VM.
        """

    async def run(self, spec: VMSpec, progress: Progress = silent, *, new: bool = False) -> VMStatus:
        """Make a VM (as `create`) and start it; where the start fails, a VM that this call made is removed again."""

    async def names(self) -> list[str]:
        """The names of all VMs, in order."""

    async def vms(self) -> list[VMStatus]:
        """All VMs, by name."""

    async def show(self, name: str) -> Details:
        """One VM in full."""

    async def memory_use(self, names: Sequence[str] = ()) -> dict[str, MemoryUse]:
        """What VMs that are alive occupy of the host's memory, by name: all of them, or those named. Takes a closer look."""

    async def start(self, name: str, progress: Progress = silent, *, fresh: bool = False) -> VMStatus:
        """Start a VM, one that is saved from where it was; raises CannotStart, with the hypervisor's last words.

        With `fresh` what is saved is thrown away, and the VM boots.
        """

    async def save(self, name: str, progress: Progress = silent) -> VMStatus:
        """Write memory and devices of a VM to disk and end its process; `start` lets it go on from there.

        A VM that is saved already stays so. Where it fails, with StorageFull or Unsupported say, the VM goes on as before.
        Raises WrongState for a VM that is not alive.
        """

    async def fork(self, name: str, names: Sequence[str], progress: Progress = silent) -> Forked:
        """Make the VMs `names` as copies of a VM that runs, memory and all, which go on from where it is; it goes on itself.

        They share what they don't write. Each has an id, addresses, ports, disks and keys of its own, and its guest is told of
        them where it can be. Forks of a paused VM are paused. Where one fails none is left. Raises WrongState for a VM that is
        not alive, AlreadyExists, Unsupported.
        """

    async def template_create(self, name: str, vm: str, progress: Progress = silent) -> StoredTemplate:
        """Keep memory and devices of a VM that runs, or is paused, as template `name`; the VM goes on. Raises as `fork`."""

    async def template_list(self) -> list[StoredTemplate]:
        """The templates, by name."""

    async def template_remove(self, name: str) -> None:
        """Delete a template, and the VMs that are ready to begin from it; those that have begun go on."""

    async def template_warm(
        self, name: str, number: int = 0, names: Sequence[str] = (), progress: Progress = silent
    ) -> StoredTemplate:
        """See to it that `number` VMs, or those `names` as well, are ready to begin from a template, in some milliseconds.

        Each has its name by then, and memory for its process; those beyond `number` are ended. Raises AlreadyExists.
        """

    async def run_from(
        self, template: str, names: Sequence[str] = (), number: int = 1, progress: Progress = silent
    ) -> Forked:
        """Make VMs that begin with the memory of a template: `names`, or `number` of them under names of Polyvisor's choice.

        Of these those come first that are ready. Each is a VM of its own, as a fork is. Raises NotFound, AlreadyExists.
        """

    async def stop(self, name: str, *, timeout_s: float = STOP_TIMEOUT_S, progress: Progress = silent) -> VMStatus:
        """Press the power button; a VM that is still there after `timeout_s` seconds is killed."""

    async def kill(self, name: str) -> VMStatus:
        """End a VM now, as by pulling the plug."""

    async def reboot(
        self, name: str, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S, progress: Progress = silent
    ) -> VMStatus:
        """Let the guest shut down and boot again, with `force` by the reset button; consoles and forwards stay.

        Raises WrongState for a VM that is not running, TimedOut where the guest does not shut down.
        """

    async def pause(self, name: str) -> VMStatus:
        """Stop the vCPUs; raises WrongState for a VM that is not alive."""

    async def resume(self, name: str) -> VMStatus:
        """Let paused vCPUs go on; raises WrongState for a VM that is not alive."""

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Delete a VM and its disks; one that is alive is killed first with `force`, and raises WrongState without."""

    async def add_forward(self, name: str, forward: Forward) -> VMStatus:
        """Open a port of the host to the guest, now and at later starts."""

    async def remove_forward(self, name: str, forward: Forward) -> VMStatus:
        """Close such a port; raises NotFound where there is none."""

    # Moving a VM between two hosts: see `moves.py`, and `remote/move.py` for their order

    async def host_id(self) -> str:
        """Who this host is: a UUID that stays, whatever others call it."""

    async def move_show(self, name: str) -> Parting:
        """What would be carried of a VM, and how far its moves are; raises WrongState unless it is stopped."""

    async def move_begin(self, name: str, move: Move) -> None:
        """Mark a stopped VM as leaving: it can't start any more. Raises WrongState where it is leaving by another move."""

    def parcel(self, name: str, token: str) -> AsyncGenerator[bytes]:
        """A VM that is leaving by the move with this `token`, in chunks; see `parcel.py`."""

    async def move_finish(self, name: str, token: str) -> None:
        """Let go of a VM, which the target holds: it is removed, for good. Raises WrongState for one that is not leaving."""

    async def move_cancel(self, name: str, token: str, *, done: bool = False) -> None:
        """Keep a VM: first it can't leave by this move any more, then, with `done`, it can start again.

        Raises WrongState for one that has left. Between the two the target discards what it holds.
        """

    async def arrival_check(self, cargo: Cargo, move: Move) -> Landing:
        """Whether a VM can come here, and run here: raises what stands in the way, and changes nothing."""

    async def arrive(self, chunks: Callable[[], AsyncGenerator[bytes]]) -> None:
        """Make the VM that is in a parcel, checked, and hold it: it can't start yet.

        `chunks` gives the parcel from its beginning, and is asked again where the connection is lost on the way. Raises
        ImageRefused, StorageFull, ConnectionLost, and as `arrival_check`.
        """

    async def arrival_release(self, move: Move) -> VMStatus:
        """Let a VM that has arrived start: its source has let go of it. Raises NotFound, WrongState for another VM."""

    async def arrival_cancel(self, name: str, token: str) -> None:
        """Remove what has arrived by the move with this `token`, and is held still."""

    async def set(self, name: str, changes: Changes) -> Resized:
        """Change vCPUs, memory, shares of CPUs and disks: in the spec, and at once where that can be while the VM is alive.

        Raises WrongState, TimedOut where the guest does not take part, Unsupported, InvalidInput; then nothing has changed.
        """

    # Disks and network cards, by their names: disk0, nic0 and so on

    async def disk_list(self, name: str) -> list[DiskStatus]:
        """The disks of a VM, and those that leave it at its next boot."""

    async def disk_add(self, name: str, size_gib: int = 1, *, disk: str | None = None) -> list[DiskStatus]:
        """Give a VM an empty disk, at once where that is possible while it is alive, otherwise at its next boot.

        Under the name `disk`, as disk2, or the first that is free; with a name it may be repeated. Raises AlreadyExists,
        InvalidInput, StorageFull, WrongState for a VM that is saved; then nothing has changed, as with all of these verbs.
        """

    async def disk_grow(self, name: str, disk: str, size_gib: int) -> list[DiskStatus]:
        """Make a disk larger; raises InvalidInput where it has more, NotFound."""

    async def disk_remove(self, name: str, disk: str, *, force: bool = False) -> list[DiskStatus]:
        """Remove a disk with all that is on it, which wants `force`; snapshots keep what they have of it.

        Raises NotFound, TimedOut where the guest of a running VM does not let go of it, WrongState, and InvalidInput for the
        disk that the VM's image is on.
        """

    async def nic_list(self, name: str) -> list[NicStatus]:
        """The network cards of a VM, and those that leave it at its next boot."""

    async def nic_add(
        self, name: str, network: str = "user", *, mac: str | None = None, nic: str | None = None
    ) -> list[NicStatus]:
        """Give a VM a network card; as `disk_add`."""

    async def nic_remove(self, name: str, nic: str) -> list[NicStatus]:
        """Remove a network card, with the port forwards through it; as `disk_remove`."""

    # Snapshots, clones, and VMs in files

    async def snapshot_create(
        self,
        name: str,
        progress: Progress = silent,
        *,
        snapshot: str | None = None,
        memory: bool | None = None,
        description: str = "",
    ) -> Snapshot:
        """Keep what a VM is at this moment: its disks, its UEFI variables and, by default where it is alive, its memory.

        Without a name it gets a free one. Without memory, the disks of a running VM are as after a power cut. Raises
        AlreadyExists, WrongState for a VM that is saved, Unsupported, StorageFull; then the VM goes on as before.
        """

    async def snapshot_list(self, name: str) -> list[Snapshot]:
        """The snapshots of a VM, the oldest first."""

    async def snapshot_show(self, name: str, snapshot: str) -> Snapshot:
        """One snapshot; raises NotFound with the nearest name."""

    async def snapshot_revert(
        self, name: str, snapshot: str, progress: Progress = silent, *, force: bool = False
    ) -> VMStatus:
        """Let a VM be as it was at a snapshot: stopped, or saved where that has memory, so that `start` goes on from there.

        What the VM has become since its last snapshot is lost. Raises WrongState for a VM that is alive; with `force` it is
        killed before.
        """

    async def snapshot_remove(self, name: str, snapshot: str, progress: Progress = silent) -> None:
        """Delete a snapshot; those that were made after it stay, and so does what clones stand on."""

    async def clone(
        self, name: str, new_name: str, progress: Progress = silent, *, snapshot: str | None = None, full: bool = False
    ) -> VMStatus:
        """Make a new VM, stopped, whose disks are those of a stopped VM, or of a snapshot; it has an identity of its own.

        A `full` clone has disks of its own, another shares what they hold with its source, which may be removed all the
        same. Raises AlreadyExists, WrongState, StorageFull.
        """

    def vm_export(self, name: str) -> AsyncGenerator[bytes]:
        """A stopped VM, with its image and without its snapshots, as one file, in chunks; raises WrongState."""

    async def vm_import(self, source: str, *, name: str | None = None, progress: Progress = silent) -> VMStatus:
        """Make the VM that is in an exported file of this machine; a clone of it where it is here still.

        Raises NotFound, ImageRefused, AlreadyExists, StorageFull, and what keeps it from running here.
        """

    # Inside the VM

    async def console(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The serial console of a VM that is alive, as a stream of bytes; raises Busy where another client has it."""

    def log(self, name: str, *, hypervisor: bool = False, follow: bool = False) -> AsyncIterator[bytes]:
        """What the serial console, or the hypervisor's process, has said; with `follow` it goes on until the VM ends."""

    async def ssh_target(self, name: str) -> SSHTarget:
        """How to log in to the guest; raises WrongState for a VM that does not run or has no way in."""

    async def wait_for_ssh(self, name: str, *, timeout_s: float, progress: Progress = silent) -> SSHTarget:
        """Wait until the guest's SSH server answers; raises TimedOut, and WrongState as soon as the VM ends."""

    def events(self, names: Sequence[str] = ()) -> AsyncIterator[Event]:
        """Changes of the VMs from now on (all of them, or those named), as they are seen."""

    # Images

    async def image_list(self) -> list[StoredImage]:
        """The images in the store."""

    async def image_show(self, name: str) -> StoredImage:
        """One image."""

    async def image_inspect(self, name: str, progress: Progress = silent) -> Inspection:
        """Which hypervisors and modes an image of the store can boot in, with reasons, by reading it; raises ImageRefused."""

    async def image_catalogue(self) -> list[Obtainable]:
        """What else could be here: images that can be built, and those of the catalogue."""

    async def image_pull(self, name: str, progress: Progress = silent) -> Image:
        """The image `name`, built or fetched now where it is not here; raises NotFound with the nearest names."""

    async def image_build(self, kind: str, progress: Progress = silent, **options: str | int | None) -> Image:
        """Build image `kind` (tiny, debian) from Debian's packages."""

    async def image_import(
        self, source: str, *, name: str | None = None, progress: Progress = silent, **options: str | int | None
    ) -> Image:
        """Take in a disk image, or one that was exported, from a file of this machine or an http(s) URL.

        An exported one may go without `name`. Raises ImageRefused, DownloadFailed, AlreadyExists.
        """

    def image_export(self, name: str) -> AsyncGenerator[bytes]:
        """Image `name` as one file, in chunks; in all as many bytes as `images.portable.exported_size` says."""

    async def image_remove(self, name: str) -> None:
        """Delete an image; raises WrongState where a VM stands on it."""
