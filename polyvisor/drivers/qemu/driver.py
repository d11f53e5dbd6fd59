"""The QEMU driver: guests under KVM or under TCG, each a QEMU process that outlives the command that started it.

A VM is alive while its process holds the lock on the VM's `alive` file, which it has inherited; every later command finds
the process again through the VM's directory and its QMP sockets. QEMU removes its pid file when it ends in good order, so
a pid file without a process means a crash.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.drivers.base import Boot, BootDisk, BootNic, Command, Fork, Observed, Template
from polyvisor.drivers.qemu.argv import CONSOLE_SOCKET, OBSERVE_SOCKET, PID_FILE, QMP_SOCKET, build_argv
from polyvisor.drivers.qemu.devices import hostfwd, with_disks
from polyvisor.drivers.qemu.kvm import nested_refusal, prove_kvm
from polyvisor.drivers.qemu.programs import Qemu, find_qemu, find_uefi, version_numbers
from polyvisor.drivers.qemu.qmp import Monitor, QMPLost, QMPRefused, answer, connected
from polyvisor.drivers.qemu.vm_process import ended, last_words, lock_holders, pid_of, send_signal, started
from polyvisor.errors import CannotStart, InvalidInput, PolyvisorError, TimedOut, Unavailable, WrongState
from polyvisor.host.record import Launch, boot_id
from polyvisor.host.store import VMDirectory
from polyvisor.operation import Progress
from polyvisor.spec.cpus import ALL_CPUS
from polyvisor.spec.forward import Forward
from polyvisor.spec.resources import Resources
from polyvisor.spec.vm import Firmware
from polyvisor.status import Accelerator, Capabilities, Usage, VMState
from polyvisor.waiting import pause

if TYPE_CHECKING:
    import asyncio


START_S = 60.0
ANSWER_S = 10.0
OBSERVE_S = 3.0
KILL_S = 10.0
TERMINATE_S = 2.0

_STATES = {
    "running": VMState.RUNNING,
    "paused": VMState.PAUSED,
    "prelaunch": VMState.PAUSED,
    "suspended": VMState.PAUSED,
    "io-error": VMState.PAUSED,
    "shutdown": VMState.PAUSED,
    "inmigrate": VMState.PAUSED,
    "finish-migrate": VMState.PAUSED,
    "postmigrate": VMState.PAUSED,
    "save-vm": VMState.PAUSED,
    "restore-vm": VMState.PAUSED,
    "guest-panicked": VMState.CRASHED,
    "internal-error": VMState.CRASHED,
}
_REASONS = {
    "io-error": "a disk write failed; free space on the host, then: polyvisor resume",
    "shutdown": "the guest has shut down; its process is about to end",
    "suspended": "the guest has put itself to sleep",
    "guest-panicked": "the guest's kernel has panicked",
    "internal-error": "QEMU met an internal error",
}

_NO_PORTS = "the machine of guests with UEFI (q35) has no places where devices come and go while it runs"
MISSING = {
    **dict.fromkeys(("disk-add-uefi", "disk-remove-uefi", "nic-add-uefi", "nic-remove-uefi"), _NO_PORTS),
    "cpu-weight": "QEMU's processes are not put into control groups so far: all have the same weight",
    "cpu-limit": "QEMU's processes are not put into control groups so far, and nothing else limits them",
    "vcpus-remove-tcg": "QEMU's emulation damages its own memory when a vCPU is pulled out, and crashes later",
}


class QemuDriver:
    """QEMU with the accelerators kvm and tcg; `cache` is where probe results are kept."""

    name = "qemu"

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._qemu: Qemu | None = None
        # A socket serves one client: what is called while one is open (`template`) goes by that.
        self._open: dict[Path, Monitor] = {}

    async def qemu(self) -> Qemu:
        """The QEMU of this host; raises Unavailable."""
        if self._qemu is None:
            self._qemu = await find_qemu(self._cache)
        return self._qemu

    async def probe(self) -> Capabilities:
        """What QEMU can do here; where there is none, no accelerator is available, and the reason says so."""
        try:
            qemu = await self.qemu()
        except Unavailable as error:
            reason = f"{error.message}: {error.hint}"
            absent = tuple(Accelerator(name=name, available=False, reason=reason) for name in ("kvm", "tcg"))
            return Capabilities(
                driver=self.name,
                version=None,
                accelerators=absent,
                modes=(),
                missing={"start": reason, "save": reason},
            )
        missing = {"pv": "paravirtualized guests need Xen", **MISSING}
        try:
            find_uefi()
        except Unavailable as error:
            missing["uefi"] = f"{error.message}: {error.hint}"
        kvm = prove_kvm()
        if kvm.available and (refusal := nested_refusal()):
            missing["nested-kvm"] = refusal
        return Capabilities(
            driver=self.name,
            version=qemu.version,
            accelerators=(
                kvm,
                Accelerator(name="tcg", available=True, reason="emulation needs no hardware support"),
            ),
            modes=("pvh", "hvm"),
            missing=missing,
            cpus=host_cpus(),
        )

    async def command(self, boot: Boot) -> Command:
        """The exact command that `start` runs; raises Unavailable."""
        qemu = await self.qemu()
        code = find_uefi()[0] if boot.firmware is Firmware.UEFI else None
        return Command(argv=qemu.complete(build_argv(qemu.binary, boot, code)), version=qemu.version)

    async def start(
        self,
        vm: VMDirectory,
        boot: Boot,
        command: Command,
        user: int | None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Observed:
        """Run `command` in directory `vm` and wait until QEMU answers; raises CannotStart.

        As root, QEMU runs as numeric `user`, which can use /dev/kvm through that device's group alone.
        """
        with started(vm, command, user, boot.cpu_affinity) as process:
            meanwhile()
            await answer(vm.path / QMP_SOCKET, timeout_s=START_S, gone=lambda: process.poll() is not None)
            resources = boot.resources
            ballooned = resources.memory_mib < resources.memory_max_mib
            if resources.limits_disks or ballooned:
                from polyvisor.drivers.qemu.resize import ask_for_memory

                async with self._monitor(vm) as monitor:
                    await _throttle(monitor, resources)
                    if ballooned:
                        await ask_for_memory(monitor, resources.memory_mib)
        return Observed(state=VMState.RUNNING, pid=process.pid)

    async def save(self, vm: VMDirectory, file: int, progress: Progress) -> str:
        from polyvisor.drivers.qemu.migration import runs_guest, write_memory

        try:
            async with self._monitor(vm) as monitor:
                machine = await write_memory(monitor, file, progress)
        except QMPLost as error:
            raise PolyvisorError(f"QEMU has ended: {last_words(vm) or error.message}") from error
        if (launch := vm.launch()) and launch.hypervisor == "tcg" and runs_guest(file):
            hint = "pause or stop the VMs in it first (polyvisor lab down does); one that idles may do with another try"
            raise WrongState("emulation can't read it back: a VM was running in it at that moment", hint=hint)
        return machine

    async def restore_command(
        self, launch: Launch, machine: str, nics: tuple[BootNic, ...], vcpus: int | None = None
    ) -> Command:
        from polyvisor.drivers.qemu.incoming import restoring_argv

        qemu = await self.qemu()
        if qemu.numbers < version_numbers(launch.version):
            raise CannotStart(f"it was saved by QEMU {launch.version}, and this host's is older: {qemu.version}")
        return Command(argv=qemu.renewed(restoring_argv(launch.argv, machine, nics, vcpus)), version=qemu.version)

    async def restore(
        self,
        vm: VMDirectory,
        command: Command,
        nics: tuple[BootNic, ...],
        user: int | None,
        file: int,
        progress: Progress,
    ) -> Observed:
        """The command has the cards already."""
        from polyvisor.drivers.qemu.migration import read_memory

        launch = vm.launch()
        resources = launch.resources if launch else None
        with started(vm, command, user, _affinity(resources)) as process:
            async with connected(
                vm.path / QMP_SOCKET, timeout_s=START_S, gone=lambda: process.poll() is not None
            ) as monitor:
                await _throttle(monitor, resources)
                await read_memory(monitor, file, os.fstat(file).st_size, progress)
        return Observed(state=VMState.PAUSED, pid=process.pid)

    async def template(
        self,
        vm: VMDirectory,
        user: int | None,
        progress: Progress,
        *,
        runs: bool,
        at_pause: Callable[[], Awaitable[None]] | None = None,
    ) -> Template:
        from polyvisor.drivers.qemu.fork import take_template

        launch = vm.launch()
        assert launch is not None  # noqa: S101 - it is alive
        try:
            async with self._monitor(vm) as monitor:
                self._open[vm.path] = monitor
                return await take_template(
                    monitor, vm, launch, await self.qemu(), user, progress, runs=runs, at_pause=at_pause
                )
        except QMPLost as error:
            raise PolyvisorError(f"QEMU has ended: {last_words(vm) or error.message}") from error
        finally:
            self._open.pop(vm.path, None)

    async def fork_command(self, launch: Launch, template: Template, fork: Fork) -> Command:
        from polyvisor.drivers.qemu.incoming import Machine, fork_argv

        qemu = await self.qemu()
        machine = Machine(type=template.machine, vcpus=template.vcpus)
        return Command(argv=qemu.renewed(fork_argv(launch.argv, machine, template.memory, fork)), version=qemu.version)

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
        from polyvisor.drivers.qemu.agent import tell
        from polyvisor.drivers.qemu.fork import begin

        def ready() -> None:
            tell(vm, told)
            born()

        with started(vm, command, user, _affinity(resources), inherit=(template.memory,)) as process:
            told = meanwhile()
            async with connected(
                vm.path / QMP_SOCKET, timeout_s=START_S, gone=lambda: process.poll() is not None
            ) as monitor:
                await _throttle(monitor, resources)
                await begin(monitor, template, ready, go=go)
        return Observed(state=VMState.RUNNING if go else VMState.PAUSED, pid=process.pid)

    async def inspect(self, vm: VMDirectory) -> Observed:
        """How the VM is now: by its lock whether it lives, by QMP whether it runs."""
        if not vm.alive():
            return self.ended(vm)
        pid = pid_of(vm)
        try:
            async with self._monitor(vm, OBSERVE_SOCKET, OBSERVE_S) as monitor:
                run_state = await monitor.run_state()
        except (QMPLost, TimedOut, OSError) as error:
            if not vm.alive():
                return self.ended(vm)
            return Observed(state=VMState.UNRESPONSIVE, reason=str(error), pid=pid)
        state = _STATES.get(run_state, VMState.UNRESPONSIVE)
        return Observed(state=state, reason=_REASONS.get(run_state), pid=pid)

    def ended(self, vm: VMDirectory) -> Observed:
        """A VM without a process: stopped in good order, or crashed, and why."""
        if not os.path.exists(f"{vm.path}/{PID_FILE}") or (launch := vm.launch()) is None:  # noqa: PTH110 - quicker, for long lists
            return Observed(state=VMState.STOPPED)
        if launch.boot_id != boot_id():
            return Observed(state=VMState.CRASHED, reason="the host went down while it ran")
        said = last_words(vm)
        killed = "its process was killed (by someone, or by the kernel for want of memory: see dmesg)"
        return Observed(state=VMState.CRASHED, reason=f"QEMU said: {said}" if said else killed)

    async def console(self, vm: VMDirectory) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        import asyncio

        directory = os.open(vm.run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return await asyncio.open_unix_connection(f"/proc/self/fd/{directory}/{Path(CONSOLE_SOCKET).name}")
        finally:
            os.close(directory)

    async def shutdown(self, vm: VMDirectory) -> None:
        async with self._monitor(vm) as monitor:
            await monitor.execute("system_powerdown")

    async def kill(self, vm: VMDirectory) -> None:
        """End QEMU: by QMP where it answers at once, otherwise by signal. Returns when it has ended."""
        patience_s = KILL_S
        try:
            async with self._monitor(vm, timeout_s=1.0) as monitor:
                await monitor.execute("quit")
        except QMPLost:
            pass  # it ends
        except (TimedOut, OSError):
            patience_s = 0.0
        if await ended(vm, patience_s):
            return
        for number, patience_s in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, KILL_S)):
            send_signal(vm, number)
            if await ended(vm, patience_s):
                (vm.path / PID_FILE).unlink(missing_ok=True)
                return
        raise TimedOut(f"the process of VM '{vm.name}' does not end", hint="look for it with ps")

    def ends_where_it_reboots(self, vm: VMDirectory) -> bool:
        # Told otherwise for a while it would end a moment later: SeaBIOS resets the machine once more by itself.
        launch = vm.launch()
        return launch is not None and "reboot=shutdown" in launch.argv

    async def reboot(self, vm: VMDirectory, timeout_s: float) -> None:
        """Press the power button, keep the process when the guest is down, and boot it again in there.

        So consoles, port forwards and whoever watches stay connected.
        """
        async with self._monitor(vm) as monitor:
            await monitor.execute("set-action", shutdown="pause")
            try:
                await monitor.execute("system_powerdown")
                await _until(lambda: _is_down(monitor), timeout_s, f"the guest of VM '{vm.name}' did not shut down")
                await monitor.execute("system_reset")
                await monitor.execute("cont")
            finally:
                with contextlib.suppress(PolyvisorError):
                    await monitor.execute("set-action", shutdown="poweroff")

    async def reset(self, vm: VMDirectory) -> None:
        async with self._monitor(vm) as monitor:
            await monitor.execute("system_reset")

    async def pause(self, vm: VMDirectory) -> None:
        async with self._monitor(vm) as monitor:
            await monitor.execute("stop")

    async def resume(self, vm: VMDirectory) -> None:
        from polyvisor.drivers.qemu.migration import end_migration

        async with self._monitor(vm) as monitor:
            await end_migration(monitor)
            if await monitor.run_state() == "suspended":
                await monitor.execute("system_wakeup")
            await monitor.execute("cont")

    async def switch_disks(self, vm: VMDirectory, disks: Sequence[BootDisk]) -> None:
        from polyvisor.drivers.qemu.disks import forget, switch

        async with self._monitor(vm) as monitor:
            try:
                await switch(monitor, disks)
            except QMPRefused:
                await forget(monitor, disks)
                raise
            except QMPLost as error:
                raise TimedOut(f"QEMU has ended: {last_words(vm) or error.message}") from error

    def with_disks(self, launch: Launch, disks: Sequence[BootDisk]) -> Launch:
        return replace(launch, argv=with_disks(launch.argv, disks))

    async def attached(self, vm: VMDirectory) -> frozenset[str]:
        from polyvisor.drivers.qemu.hotplug import attached

        async with self._monitor(vm) as monitor:
            return await attached(monitor)

    async def attach(self, vm: VMDirectory, device: BootDisk | BootNic, slots: Mapping[str, int]) -> None:
        from polyvisor.drivers.qemu.hotplug import attach

        async with self._monitor(vm) as monitor:
            await attach(monitor, device, slots)
            if isinstance(device, BootDisk) and (launch := vm.launch()):
                await _throttle(monitor, launch.resources)

    async def detach(self, vm: VMDirectory, name: str) -> None:
        from polyvisor.drivers.qemu.hotplug import detach

        async with self._monitor(vm) as monitor:
            await detach(monitor, name)

    async def grow_disk(self, vm: VMDirectory, disk: BootDisk, size: int) -> None:
        from polyvisor.drivers.qemu.hotplug import grow

        async with self._monitor(vm) as monitor:
            await grow(monitor, disk, size)

    def with_device(self, launch: Launch, device: BootDisk | BootNic, slots: Mapping[str, int]) -> Launch:
        from polyvisor.drivers.qemu.hotplug import with_device

        return replace(launch, argv=with_device(launch.argv, device, slots))

    def without_device(self, launch: Launch, name: str, slots: Mapping[str, int]) -> Launch:
        from polyvisor.drivers.qemu.hotplug import without_device

        return replace(launch, argv=without_device(launch.argv, name, slots))

    async def add_forward(self, vm: VMDirectory, nic: int, forward: Forward) -> None:
        async with self._monitor(vm) as monitor:
            if printed := await monitor.human(f"hostfwd_add nic{nic} {hostfwd(forward)}"):
                raise InvalidInput(
                    "forward", str(forward), f"QEMU refused it: {printed}", hint="choose another host port"
                )

    async def remove_forward(self, vm: VMDirectory, nic: int, forward: Forward) -> None:
        place = hostfwd(forward).rpartition("-")[0]
        async with self._monitor(vm) as monitor:
            printed = await monitor.human(f"hostfwd_remove nic{nic} {place}")
            if not printed.endswith("removed"):
                raise WrongState(f"VM '{vm.name}': {printed or 'QEMU did not remove the forward'}")

    async def usage(self, vm: VMDirectory) -> Usage:
        from polyvisor.drivers.qemu.resize import usage

        async with self._monitor(vm, OBSERVE_SOCKET, OBSERVE_S) as monitor:
            return await usage(monitor)

    async def set_vcpus(self, vm: VMDirectory, count: int) -> None:
        from polyvisor.drivers.qemu.resize import set_vcpus

        launch = vm.launch()
        async with self._monitor(vm) as monitor:
            await set_vcpus(monitor, count, emulated=launch is not None and launch.hypervisor == "tcg")

    async def set_memory(self, vm: VMDirectory, memory_mib: int, *, wait: bool = True) -> None:
        from polyvisor.drivers.qemu.resize import ask_for_memory, set_memory

        async with self._monitor(vm) as monitor:
            await (set_memory if wait else ask_for_memory)(monitor, memory_mib)

    async def set_scheduling(self, vm: VMDirectory, resources: Resources) -> None:
        from polyvisor.drivers.qemu.affinity import pin
        from polyvisor.drivers.qemu.throttle import throttle

        for pid in lock_holders(vm):
            pin(pid, resources.cpu_affinity)
        async with self._monitor(vm) as monitor:
            await throttle(monitor, resources)

    @contextlib.asynccontextmanager
    async def _monitor(
        self, vm: VMDirectory, socket: str = QMP_SOCKET, timeout_s: float = ANSWER_S
    ) -> AsyncIterator[Monitor]:
        if socket == QMP_SOCKET and (monitor := self._open.get(vm.path)):
            yield monitor
            return
        async with connected(vm.path / socket, timeout_s=timeout_s, gone=lambda: not vm.alive()) as monitor:
            yield monitor


def host_cpus() -> str:
    """The CPUs of this host that are online, as Linux lists them (Documentation/ABI/stable/sysfs-devices-system-cpu)."""
    try:
        return Path("/sys/devices/system/cpu/online").read_text().strip()
    except OSError:
        return ""


def _affinity(resources: Resources | None) -> str:
    return resources.cpu_affinity if resources else ALL_CPUS


async def _throttle(monitor: Monitor, resources: Resources | None) -> None:
    """Put the limits of a new process' disks in force, where there are any."""
    if resources is not None and resources.limits_disks:
        from polyvisor.drivers.qemu.throttle import throttle

        await throttle(monitor, resources)


async def _is_down(monitor: Monitor) -> bool:
    return await monitor.run_state() == "shutdown"


async def _until(condition: Callable[[], Awaitable[bool]], timeout_s: float, problem: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline:
            raise TimedOut(problem, hint="it may ignore the power button; use --force to press reset")
        await pause(0.1)
