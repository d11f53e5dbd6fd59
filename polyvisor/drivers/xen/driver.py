"""The Xen driver: guests in modes pv, pvh and hvm, each a domain that `xl create -F` waits for.

That process runs in the VM's directory, holds the lock on the VM's `alive` file, starts the guest anew when it reboots, and
writes into the VM's log what becomes of the domain. By that log, a VM whose `xl` was killed is known to be alive for as long as
its domain is. What a domain does is asked of `xl list`. See docs/design/xen-driver.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyvisor.drivers.base import Boot, BootDisk, BootNic, Command, Fork, Observed, Template
from polyvisor.drivers.xen import resize, xl
from polyvisor.drivers.xen.config import CONSOLE_SOCKET, bridge_of, build_config, has_qemu_disks, with_resources
from polyvisor.drivers.xen.follow import CONSOLE_INPUT, follow_console
from polyvisor.drivers.xen.listing import OURS, Domain, parse_list, read_errors
from polyvisor.drivers.xen.loaders import find_loader, missing_loaders
from polyvisor.drivers.xen.log import is_xl, log_text, note, told
from polyvisor.drivers.xen.migration import MARK, settle, wake_keeper, was_paused
from polyvisor.drivers.xen.probe import MISSING, probe
from polyvisor.errors import CannotStart, PolyvisorError, ProcessFailed, TimedOut, Unavailable, Unsupported, WrongState
from polyvisor.files import storage_errors, write_atomic
from polyvisor.host.record import Launch, boot_id, kind_of, nic_name
from polyvisor.host.store import VMDirectory
from polyvisor.network.bridge import Bridge
from polyvisor.network.nat import Card
from polyvisor.network.ports import hold_port
from polyvisor.operation import Progress
from polyvisor.process import spawn_detached
from polyvisor.spec.forward import Forward
from polyvisor.spec.resources import Resources
from polyvisor.spec.vm import Mode, OnReboot
from polyvisor.status import Capabilities, Usage, VMState
from polyvisor.waiting import event_loop, pause

if TYPE_CHECKING:
    import asyncio

    from polyvisor.process import Program

CONFIG = "xl.cfg"
START_S = 240.0
KILL_S = 90.0
RESET_S = 60.0
_POLL_S = 0.05


class XenDriver:
    """Xen through `xl`, on the control domain."""

    name = "xen"

    def __init__(self) -> None:
        self._look: asyncio.Future[Mapping[str, Domain]] | None = None
        self._bridge = Bridge()
        self._version: str | None = None  # of the Xen below, which stays for as long as this system runs

    async def probe(self) -> Capabilities:
        found = await probe()
        if found is None:
            raise Unavailable("this system is not the control domain of a Xen", hint="polyvisor doctor")
        self._version = found.version
        return found

    async def free_memory_mib(self) -> int | None:
        """Memory of the machine that no domain has; None where Xen does not answer."""
        try:
            return (await xl.info()).free_memory_mib
        except PolyvisorError:
            return None

    async def command(self, boot: Boot) -> Command:
        """The exact command that `start` runs; the configuration that it reads is written then."""
        version = self._version or (await xl.info()).version
        return Command(argv=(xl.program(), "create", "-F", CONFIG), version=version)

    async def start(
        self,
        vm: VMDirectory,
        boot: Boot,
        command: Command,
        user: int | None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Observed:
        """Run `command` in directory `vm` and wait until the domain runs; raises CannotStart, with what xl said.

        The domain's QEMU and `xl` itself are root's, as Xen's toolstack is: `user` is nobody here.
        """
        if not self.settled(vm) and (domain := await _find(vm)):
            raise WrongState(f"VM '{vm.name}' has a domain already ({domain.id})", hint=f"polyvisor kill {vm.name}")
        with contextlib.ExitStack() as held:
            config = build_config(boot, vm.path, _loader(boot))
            process = await self._spawned(vm, replace(command, config=config), boot.nics, boot.mode, held)
        try:
            meanwhile()
            await self._until_begun(vm, process)
            await _require_disks(vm, config)
        except BaseException:
            await self._undo(vm, process)
            raise
        return Observed(state=VMState.RUNNING, pid=process.pid)

    async def _spawned(
        self,
        vm: VMDirectory,
        command: Command,
        nics: tuple[BootNic, ...],
        mode: Mode,
        held: contextlib.ExitStack,
        stdin: int | None = None,
    ) -> Program:
        """Write the configuration, prepare the networks and start xl, which inherits the VM's lock and its ports' sockets.

        The lock is taken first: by it, whoever looks after the network knows that the cards are somebody's.
        """
        with storage_errors(f"starting VM '{vm.name}'"):
            alive = _locked(vm, held)
            write_atomic(vm.path / CONFIG, command.config)
            for leftover in (CONSOLE_SOCKET, MARK):
                (vm.path / leftover).unlink(missing_ok=True)
        ports = [held.enter_context(hold_port(forward)) for nic in nics for forward in nic.forwards]
        if cards := _cards(vm, nics):
            await self._bridge.join(vm.alive_file, cards)
        with storage_errors(f"starting VM '{vm.name}'"):
            process = _spawn(vm, command.argv, [alive, *(port.fileno() for port in ports)], stdin)
            if mode is not Mode.HVM:
                follow_console(vm, process.pid)
            return process

    async def _until_begun(self, vm: VMDirectory, process: Program) -> None:
        deadline = time.monotonic() + START_S
        while told(vm).boots == 0:
            if process.poll() is not None and told(vm).boots == 0:
                said = read_errors(log_text(vm)) or "it ended without a word"
                raise CannotStart(f"xl: {said}", hint="on that host, see also /var/log/xen")
            if time.monotonic() > deadline:
                raise TimedOut(f"xl did not make the domain of VM '{vm.name}' within {START_S:.0f} s")
            await pause(_POLL_S)

    async def _undo(self, vm: VMDirectory, process: Program) -> None:
        """Leave nothing of a start that failed: xl may have made a domain and have been ended before it took it back."""
        process.kill()
        process.wait()
        with contextlib.suppress(PolyvisorError):
            if domain := await _find(vm):
                await xl.xl("destroy", str(domain.id))
        note(vm, OURS)  # it has not crashed
        with contextlib.suppress(PolyvisorError):
            await self._bridge.leave(vm.alive_file)

    async def inspect(self, vm: VMDirectory) -> Observed:
        """How the VM is now: by its lock whether it lives, by Xen's list whether it runs."""
        if not vm.alive() and self.settled(vm):
            return self.ended(vm)
        try:
            domain = (await self._listed()).get(vm.record.id)
        except PolyvisorError as error:
            return Observed(state=VMState.UNRESPONSIVE, reason=error.message, pid=told(vm).pid)
        return self._observed(vm, domain)

    async def _listed(self) -> Mapping[str, Domain]:
        """The domains of this host; whoever asks while another does shares the answer: a list of many VMs calls xl once."""
        import asyncio

        await event_loop()
        if self._look is None or self._look.done():
            self._look = asyncio.ensure_future(_domains())
        return await asyncio.shield(self._look)

    def settled(self, vm: VMDirectory) -> bool:
        """Whether nothing can be left of the VM's last domain: it has ended before somebody's eyes, or the host went down."""
        if not (vm.path / CONFIG).exists() or (launch := vm.launch()) is None or launch.boot_id != boot_id():
            return True
        return told(vm).state is not None

    def _observed(self, vm: VMDirectory, domain: Domain | None) -> Observed:
        said = told(vm)
        if domain is None:
            if vm.alive():  # between two boots of a guest that reboots, or a moment before xl ends
                return Observed(state=VMState.RUNNING, pid=said.pid)
            return self.ended(vm)
        lost = None if said.pid and is_xl(said.pid) else "its xl was killed: it can't reboot, and stays when it ends"
        if domain.suspended or was_paused(vm):  # it is being saved
            return Observed(state=VMState.PAUSED, reason=lost, pid=said.pid)
        if domain.shut_down and lost:
            return Observed(
                state=VMState.UNRESPONSIVE, reason=f"the guest has ended; polyvisor kill {vm.name} frees it"
            )
        state = VMState.PAUSED if domain.paused else VMState.RUNNING
        return Observed(state=state, reason=lost, pid=said.pid)

    def ended(self, vm: VMDirectory) -> Observed:
        """A VM without a process, by what xl said at its end."""
        launch = vm.launch()
        if launch is None or not (vm.path / CONFIG).exists():
            return Observed(state=VMState.STOPPED)
        said = told(vm)
        if said.state is not None or said.boots == 0:
            return Observed(state=said.state or VMState.STOPPED, reason=said.reason)
        if launch.boot_id != boot_id():
            return Observed(state=VMState.CRASHED, reason="the host went down while it ran")
        return Observed(state=VMState.CRASHED, reason="its xl was killed (by someone, or by the kernel: see dmesg)")

    async def lives(self, vm: VMDirectory) -> bool:
        """Whether a domain of this VM is there, even where every process of it was killed."""
        return vm.alive() or (not self.settled(vm) and await _find(vm) is not None)

    async def console(self, vm: VMDirectory) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        from polyvisor.drivers.xen.console import connect

        return await connect(vm, CONSOLE_INPUT, CONSOLE_SOCKET)

    async def shutdown(self, vm: VMDirectory) -> None:
        await xl.xl("shutdown", "-F", str((await self._settled(vm)).id))

    async def kill(self, vm: VMDirectory) -> None:
        """Destroy the domain, return when everything of it has ended, and take back what it has of the host's network."""
        deadline = time.monotonic() + KILL_S
        while await self.lives(vm):
            if domain := await _find(vm):
                note(vm, OURS)
                with contextlib.suppress(ProcessFailed):  # it has ended meanwhile, or the next look finds it again
                    await xl.xl("destroy", str(domain.id))
            wake_keeper(vm)
            if time.monotonic() > deadline:
                raise TimedOut(f"the domain of VM '{vm.name}' does not end", hint="look for it with: xl list -v")
            await pause(_POLL_S)
        (vm.path / MARK).unlink(missing_ok=True)
        await self._bridge.leave(vm.alive_file)

    def ends_where_it_reboots(self, vm: VMDirectory) -> bool:
        """What xl does when a guest reboots was settled when it started."""
        return vm.record.spec.on_reboot is OnReboot.STOP

    async def reboot(self, vm: VMDirectory, timeout_s: float) -> None:
        """Ask the guest to reboot, upon which xl starts it anew; raises TimedOut."""
        await self._anew(vm, timeout_s, lambda domain: xl.xl("reboot", "-F", str(domain.id)))

    async def reset(self, vm: VMDirectory) -> None:
        from polyvisor.drivers.xen.xenctrl import shut_down

        async def press(domain: Domain) -> str:
            shut_down(domain.id)
            return ""

        await self._anew(vm, RESET_S, press)

    async def _anew(self, vm: VMDirectory, timeout_s: float, act: Callable[[Domain], Awaitable[object]]) -> None:
        boots, deadline = told(vm).boots, time.monotonic() + timeout_s
        await act(await self._settled(vm))
        while told(vm).boots == boots:
            if time.monotonic() > deadline or not vm.alive():
                problem = f"the guest of VM '{vm.name}' did not reboot"
                raise TimedOut(problem, hint="it may not listen; use --force to press reset")
            await pause(_POLL_S)

    async def pause(self, vm: VMDirectory) -> None:
        domain = await self._settled(vm)
        if not domain.paused:  # Xen counts pauses
            await xl.xl("pause", str(domain.id))

    async def resume(self, vm: VMDirectory) -> None:
        domain = await self._settled(vm)
        if domain.paused:
            await xl.xl("unpause", str(domain.id))

    async def save(self, vm: VMDirectory, file: int, progress: Progress) -> str:
        """What makes the same machine again is the configuration that this one has by now."""
        from polyvisor.drivers.xen.migration import flush_disks, write_memory

        domain = await self._settled(vm)
        with storage_errors(f"saving VM '{vm.name}'"):
            config = (vm.path / CONFIG).read_text()
        try:
            await write_memory(vm, domain, file, progress)
            if has_qemu_disks(config):
                await flush_disks(domain)
        finally:
            await settle(vm, lambda: _find(vm))
        return config

    async def restore_command(
        self, launch: Launch, machine: str, nics: tuple[BootNic, ...], vcpus: int | None = None
    ) -> Command:
        """Xen takes what the same or an older one has saved (docs/process/xen-release-management in its source)."""
        version = self._version or (await xl.info()).version
        if xl.release(version) < xl.release(launch.version):
            raise CannotStart(f"it was saved on Xen {launch.version}, and this host's is older: {version}")
        return Command(
            argv=(xl.program(), "restore", "-F", "-p", CONFIG, "/dev/stdin"), version=version, config=machine
        )

    async def restore(
        self,
        vm: VMDirectory,
        command: Command,
        nics: tuple[BootNic, ...],
        user: int | None,
        file: int,
        progress: Progress,
    ) -> Observed:
        from polyvisor.drivers.xen.migration import open_pipe, read_memory

        launch = vm.launch()
        assert launch is not None  # noqa: S101 - it was saved
        reading, writing = open_pipe()
        with writing:
            with contextlib.ExitStack() as held:
                held.enter_context(reading)
                process = await self._spawned(vm, command, nics, Mode(launch.mode), held, reading.fileno())
            try:
                await read_memory(process, writing, file, progress)
                await self._until_begun(vm, process)
                await _require_disks(vm, command.config)
            except BaseException:
                await self._undo(vm, process)
                raise
        return Observed(state=VMState.PAUSED, pid=process.pid)

    async def switch_disks(self, vm: VMDirectory, disks: Sequence[BootDisk]) -> None:
        raise Unsupported(MISSING["snapshot-live"])

    def with_disks(self, launch: Launch, disks: Sequence[BootDisk]) -> Launch:
        return launch  # its configuration is written anew at every start

    async def template(
        self,
        vm: VMDirectory,
        user: int | None,
        progress: Progress,
        *,
        runs: bool,
        at_pause: Callable[[], Awaitable[None]] | None = None,
    ) -> Template:
        raise Unsupported(MISSING["fork"])

    async def fork_command(self, launch: Launch, template: Template, fork: Fork) -> Command:
        raise Unsupported(MISSING["fork"])

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
        raise Unsupported(MISSING["fork"])

    async def attached(self, vm: VMDirectory) -> frozenset[str]:
        """What it was started with: nothing is plugged in later."""
        launch = vm.launch()
        given = launch.devices if launch else None
        return frozenset((*given.disks, *given.nics)) if given else frozenset()

    async def attach(self, vm: VMDirectory, device: BootDisk | BootNic, slots: Mapping[str, int]) -> None:
        raise Unsupported(MISSING[f"{kind_of(device.name)}-add"])

    async def detach(self, vm: VMDirectory, name: str) -> None:
        raise Unsupported(MISSING[f"{kind_of(name)}-remove"])

    async def grow_disk(self, vm: VMDirectory, disk: BootDisk, size: int) -> None:
        raise Unsupported(MISSING["disk-grow"])

    def with_device(self, launch: Launch, device: BootDisk | BootNic, slots: Mapping[str, int]) -> Launch:
        return launch  # its configuration is written anew at every start

    def without_device(self, launch: Launch, name: str, slots: Mapping[str, int]) -> Launch:
        return launch

    async def add_forward(self, vm: VMDirectory, nic: int, forward: Forward) -> None:
        await self._bridge.add_forward(vm.alive_file, _position(vm, nic), forward)

    async def remove_forward(self, vm: VMDirectory, nic: int, forward: Forward) -> None:
        await self._bridge.remove_forward(vm.alive_file, _position(vm, nic), forward)

    async def usage(self, vm: VMDirectory) -> Usage:
        domain = await self._domain(vm)
        return Usage(vcpus=domain.vcpus, memory_mib=domain.memory_mib)

    async def set_vcpus(self, vm: VMDirectory, count: int) -> None:
        await self._settled(vm)
        await resize.set_vcpus(lambda: self._domain(vm), count)
        await self._keep(vm, vcpus=count)

    async def set_memory(self, vm: VMDirectory, memory_mib: int, *, wait: bool = True) -> None:
        await self._settled(vm)
        await resize.set_memory(lambda: self._domain(vm), memory_mib, wait=wait)
        await self._keep(vm, memory_mib=memory_mib)

    async def set_scheduling(self, vm: VMDirectory, resources: Resources) -> None:
        await resize.set_scheduling((await self._domain(vm)).id, resources)
        wanted = {name: getattr(resources, name) for name in ("cpu_weight", "cpu_limit", "cpu_affinity")}
        await self._keep(vm, **wanted)

    async def _keep(self, vm: VMDirectory, **changes: Any) -> None:
        """Let a guest that reboots, and so becomes another domain, have the same again."""
        if (launch := vm.launch()) is None or launch.resources is None:
            return
        with storage_errors(f"changing VM '{vm.name}'"):
            text = (vm.path / CONFIG).read_text()
            write_atomic(vm.path / CONFIG, with_resources(text, replace(launch.resources, **changes)))
        await xl.xl("config-update", str((await self._domain(vm)).id), str(vm.path / CONFIG))

    async def _settled(self, vm: VMDirectory) -> Domain:
        """The VM's domain, of which no save is under way, or was cut off; raises WrongState, TimedOut."""
        await settle(vm, lambda: _find(vm))
        return await self._domain(vm)

    async def _domain(self, vm: VMDirectory) -> Domain:
        """The VM's domain; raises WrongState where it has none, as for a moment while the guest reboots."""
        deadline = time.monotonic() + 5.0
        while (domain := await _find(vm)) is None:
            if time.monotonic() > deadline or not vm.alive():
                raise WrongState(f"VM '{vm.name}' has no domain at this moment", hint="try again")
            await pause(_POLL_S)
        return domain


def _loader(boot: Boot) -> Path | None:
    """What boots a guest from its disk that has neither firmware nor a kernel of the image; raises Unavailable."""
    if boot.kernel is not None or boot.mode is Mode.HVM:
        return None
    if found := find_loader(boot.mode):
        return found
    raise Unavailable(missing_loaders()[f"disk-{boot.mode}"])


async def _require_disks(vm: VMDirectory, config: str) -> None:
    """Raise CannotStart where the domain that xl has just made lacks one of its disks."""
    if has_qemu_disks(config) and (domain := told(vm).domain) is not None:
        from polyvisor.drivers.xen.disks import require_served

        await require_served(domain, vm.name)


async def _find(vm: VMDirectory) -> Domain | None:
    """The domain with the VM's id; raises what `xl` raises."""
    return (await _domains()).get(vm.record.id)


async def _domains() -> Mapping[str, Domain]:
    """The domains of this host by UUID, but for those of which only memory is left; raises what `xl` raises."""
    return {uuid: each for uuid, each in parse_list(await xl.xl("list", "-v")).items() if not each.dying}


def _cards(vm: VMDirectory, nics: tuple[BootNic, ...]) -> tuple[Card, ...]:
    """The cards that hang on a bridge of this host."""
    return tuple(
        Card(owner=str(vm.alive_file), mac=nic.mac, bridge=bridge, forwards=nic.forwards)
        for nic in nics
        if (bridge := bridge_of(nic))
    )


def _position(vm: VMDirectory, nic: int) -> int:
    """Which of its cards on bridges is the VM's card number `nic`: those that it was started with."""
    launch = vm.launch()
    if launch is None or launch.devices is None:
        return sum(1 for each in vm.record.spec.nics[:nic] if each.network != "none")
    return [name for name, network in launch.devices.nics.items() if network != "none"].index(nic_name(nic))


def _locked(vm: VMDirectory, held: contextlib.ExitStack) -> int:
    """The VM's `alive` file, locked until `held` ends, or the last process does that inherits it."""
    fd = os.open(vm.alive_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    held.callback(os.close, fd)
    _lock(vm, fd)
    return fd


def _spawn(vm: VMDirectory, argv: tuple[str, ...], inherit: Sequence[int], stdin: int | None) -> Program:
    """Start xl so that it holds the lock on the VM's `alive` file from its first moment to its last."""
    vm.log.unlink(missing_ok=True)
    with vm.log.open("ab") as log:  # to append, since others note there what they did while xl goes on writing
        return spawn_detached(argv, cwd=vm.path, output=log, inherit=inherit, stdin=stdin)


def _lock(vm: VMDirectory, fd: int) -> None:
    """Lock the `alive` file; whoever only looks holds it for some microseconds, so try for a while."""
    deadline = time.monotonic() + 1.0
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise WrongState(f"VM '{vm.name}' has a process already", hint=f"polyvisor kill {vm.name}") from error
            time.sleep(0.001)
