"""A running guest as a template, and forks that begin from it: memory is shared until it is written.

The guest goes on in its own QEMU, with its connections. Its memory becomes a file in memory that nobody writes to any more: it
is sealed, so that neither a QEMU that its guest has broken out of can, nor one that punches holes where the guest's balloon
grows. A fork is a QEMU that maps the file privately and reads the state of the devices, which migration writes alone where
memory is a shared file (capability `x-ignore-shared`). There are two ways to such a file:

- Where QEMU shares its memory, it is copied from there (`shared_memory.py`), and QEMU itself writes its devices' state.
- Elsewhere a second QEMU, which will never run a vCPU, has such a file for its RAM, and gets the guest's by QEMU's own live
  migration; the guest is let go on as soon as the last page has been sent (older emulation can't copy while the guest
  writes: `TCG_COPIES_LIVE`). That one writes the state of the devices, and ends.

Seals: memfd_create(2), fcntl(2). See docs/design/fork.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

from polyvisor.drivers.base import Template
from polyvisor.drivers.qemu.argv import QMP_SOCKET
from polyvisor.drivers.qemu.devices import groups_for
from polyvisor.drivers.qemu.incoming import TEMPLATE_SOCKET, Machine, memory_size, template_argv
from polyvisor.drivers.qemu.migration import (
    IGNORE_SHARED,
    PAUSE_BEFORE_SWITCHOVER,
    UNDER_WAY,
    as_by_default,
    end_migration,
    handed_over,
    machine_type,
    read_memory,
    require_movable,
    set_capability,
)
from polyvisor.drivers.qemu.programs import Qemu
from polyvisor.drivers.qemu.qmp import Monitor, QMPLost, QMPRefused, connected, tell_all
from polyvisor.drivers.qemu.resize import usage
from polyvisor.drivers.qemu.shared_memory import Copy, memory_of
from polyvisor.drivers.qemu.vm_process import lock_holders
from polyvisor.errors import PolyvisorError, TimedOut
from polyvisor.host.record import Launch
from polyvisor.host.store import VMDirectory
from polyvisor.operation import Progress, Step, silent
from polyvisor.process import ending_with_us, spawn_detached
from polyvisor.waiting import pause

if TYPE_CHECKING:
    from polyvisor.process import Program

AtPause = Callable[[], Awaitable[None]]
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
START_S = 60.0
END_S = 10.0
TOGETHER = 200  # connections at a time: a process may have 1024 open files
# How long the guest may stand still, in ms, by how long it has been tried, in s: one that writes faster than its memory can
# be copied is stopped for longer in the end.
DOWNTIMES = ((0.0, 60), (3.0, 500), (10.0, 10_000))
# Before this version emulation misses some of what a guest writes while its memory is copied, which ends in a kernel panic of
# the copy: clearing the list of written pages did not reach the translated code that writes (system/physmem.c, "Fix migration
# dirty bitmap coherency with TCG memory access"). So such a guest stands still for all of the copy.
TCG_COPIES_LIVE = (9, 0)
# From this version on memory counts as shared, and is left out, only where it is a file with a name.
KNOWS_FILES = (8, 1)
_POLL_S = 0.001
_NAME = "template"


async def take_template(
    monitor: Monitor,
    vm: VMDirectory,
    launch: Launch,
    qemu: Qemu,
    user: int | None,
    progress: Progress,
    *,
    runs: bool,
    at_pause: AtPause | None = None,
) -> Template:
    """Copy a guest that was started as in `launch`; see `Driver.template`. Raises WrongState, Unsupported, PolyvisorError."""
    await end_migration(monitor)
    if await require_movable(monitor) != "running" and runs:
        await monitor.execute("cont")  # an earlier copy was cut off
    machine = Machine(type=await machine_type(monitor), vcpus=(await usage(monitor)).vcpus)
    with contextlib.ExitStack() as kept, contextlib.ExitStack() as used:
        memory = _kept(kept, os.memfd_create(f"polyvisor-{vm.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        state = _kept(kept, os.memfd_create("polyvisor-state", os.MFD_CLOEXEC))
        os.ftruncate(memory, size := int(memory_size(launch.argv).removesuffix("M")) << 20)
        version = monitor.version
        shared = _shared_memory(vm, size) if version < KNOWS_FILES else None
        if shared is not None:
            copy = used.enter_context(contextlib.closing(Copy(_kept(used, shared), memory, size)))
            pause_s = await _follow(monitor, copy, state, progress, at_pause, runs=runs)
        else:
            argv = qemu.renewed(template_argv(launch.argv, machine, memory, await _disk_sizes(monitor)))
            live = launch.hypervisor != "tcg" or version >= TCG_COPIES_LIVE
            async with _second(vm, argv, user, memory) as second:
                pause_s = await _copy(monitor, second, progress, at_pause, runs=runs, live=live)
                await _write_devices(second, state)
        used.close()
        seal(memory)
        kept.pop_all()
    return Template(memory=memory, state=state, machine=machine.type, vcpus=machine.vcpus, pause_s=pause_s)


def _shared_memory(vm: VMDirectory, size: int) -> int | None:
    """The file that is the memory of the VM's QEMU, where it shares it."""
    with contextlib.suppress(FileNotFoundError):  # it has ended, as whoever asks it next will find
        return next((fd for pid in lock_holders(vm) if (fd := memory_of(pid, size)) is not None), None)
    return None


async def _follow(
    source: Monitor, copy: Copy, state: int, progress: Progress, at_pause: AtPause | None, *, runs: bool
) -> float:
    """Copy memory that QEMU shares while the guest runs, and then, while it stands still, what has changed, and its devices.

    Returns for how many seconds it stood still.
    """
    progress(Step("copying memory"))
    await asyncio.to_thread(copy.copy)
    with source.events("STOP", "RESUME") as events:
        try:
            if runs:
                await source.execute("stop")
            if at_pause is not None:
                await at_pause()
            await as_by_default(source)
            await _write_devices(source, state)
            await asyncio.to_thread(copy.follow)
        finally:
            await _let_go(source, runs=runs)
        times = {event["event"]: _seconds(event["timestamp"]) for event in events()}
    return times["RESUME"] - times["STOP"] if runs else 0.0


def seal(memory: int) -> None:
    """Let nobody write to a file in memory any more, not even who has it open for writing. Raises OSError."""
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)


def sealed(memory: int) -> bool:
    """Whether that was done."""
    return bool(fcntl.fcntl(memory, fcntl.F_GET_SEALS) & SEALS == SEALS)


async def begin(monitor: Monitor, template: Template, ready: Callable[[], None], *, go: bool) -> None:
    """Let a QEMU with the arguments of `incoming.fork_argv` become the fork; `ready` is called when it has all of the memory.

    Its vCPUs stand still until then, and afterwards, too, unless it is to `go` on. Raises QMPLost, QMPRefused.
    """
    # A description of its own, since each has a place of its own in the file.
    own = os.open(f"/proc/self/fd/{template.state}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        await read_memory(monitor, own, os.fstat(own).st_size, silent, ignore_shared=True)
    finally:
        os.close(own)
    ready()
    # The capability goes, or what is saved of the fork one day would want it too; the guest need not wait for that.
    last = [monitor.execute("cont")] if go else []
    await asyncio.gather(*last, set_capability(monitor, IGNORE_SHARED, False))


async def let_go(vms: Sequence[VMDirectory]) -> None:
    """Let the vCPUs of forks go that have just been made, as nearly at once as can be; raises QMPLost, QMPRefused, TimedOut."""
    for first in range(0, len(vms), TOGETHER):
        sockets = [vm.path / QMP_SOCKET for vm in vms[first : first + TOGETHER]]
        await tell_all(sockets, "cont", timeout_s=START_S)


@contextlib.asynccontextmanager
async def _second(vm: VMDirectory, argv: tuple[str, ...], user: int | None, memory: int) -> AsyncIterator[Monitor]:
    """The QEMU that receives the memory. It ends with the block, and with this process, however that ends."""
    socket_path = vm.path / TEMPLATE_SOCKET
    socket_path.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as log:
        groups = groups_for(argv)
        command = ending_with_us(argv)
        process = spawn_detached(command, cwd=vm.path, output=log, inherit=[memory], user=user, groups=groups)
        try:
            async with connected(socket_path, timeout_s=START_S, gone=lambda: process.poll() is not None) as monitor:
                yield monitor
                with contextlib.suppress(QMPLost, TimedOut):
                    await monitor.execute("quit")
            await _ended(process)
        except (QMPLost, QMPRefused, TimedOut) as error:
            raise PolyvisorError(f"the QEMU that receives the memory failed: {_said(log) or error.message}") from error
        finally:
            process.kill()
            process.wait()
            socket_path.unlink(missing_ok=True)


async def _copy(
    source: Monitor, second: Monitor, progress: Progress, at_pause: AtPause | None, *, runs: bool, live: bool
) -> float:
    """Send the guest from one QEMU to the other and let it go on where it `runs`; returns how many seconds it stood still.

    With `live` that is for the last part alone.
    """
    with source.events("STOP", "RESUME") as events:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            await second.execute_with(theirs.fileno(), "getfd", fdname=_NAME)
            await second.execute("migrate-incoming", uri=f"fd:{_NAME}")
            await source.execute_with(ours.fileno(), "getfd", fdname=_NAME)
        try:
            await source.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
            await as_by_default(source)
            await set_capability(source, PAUSE_BEFORE_SWITCHOVER, at_pause is not None)
            if runs and not live:
                await source.execute("stop")
            await source.execute("migrate", uri=f"fd:{_NAME}")
            if at_pause is not None:
                await _sent(source, progress, until="pre-switchover")
                await at_pause()
                await source.execute("migrate-continue", state="pre-switchover")
            await _sent(source, progress)
        finally:
            await _let_go(source, runs=runs)
        times = {event["event"]: _seconds(event["timestamp"]) for event in events()}
    await _settled(second)
    return times["RESUME"] - times["STOP"] if runs else 0.0


async def _sent(source: Monitor, progress: Progress, until: str = "completed") -> None:
    """Wait until the source has sent everything; the longer that takes, the longer its guest may stand still for it."""
    began, patient = time.monotonic(), list(DOWNTIMES)
    while (state := (status := await source.execute("query-migrate")).get("status")) in UNDER_WAY and state != until:
        if patient and time.monotonic() - began >= patient[0][0]:
            await source.execute("migrate-set-parameters", **{"downtime-limit": patient.pop(0)[1]})
        if ram := status.get("ram"):
            progress(Step("copying memory", ram["total"] - ram["remaining"], ram["total"], "B"))
        await pause(_POLL_S)
    if state != until:
        _require_completed(status)


async def _let_go(source: Monitor, *, runs: bool) -> None:
    """Let the guest go on as before, whatever became of the copy."""
    with contextlib.suppress(QMPLost):  # it has ended, as whoever waits for it will find
        await end_migration(source)
        if runs:
            await source.execute("cont")
        await as_by_default(source)


async def _settled(second: Monitor) -> None:
    while (status := await second.execute("query-migrate")).get("status") in (None, *UNDER_WAY):
        await pause(_POLL_S)
    _require_completed(status)


async def _write_devices(second: Monitor, state: int) -> None:
    """Have the state of the devices written to the open file `state`."""
    await set_capability(second, IGNORE_SHARED, True)
    async with handed_over(second, state) as uri:
        await second.execute("migrate", uri=uri)
        await _settled(second)


async def _disk_sizes(monitor: Monitor) -> dict[str, int]:
    """The sizes of the nodes that guests see, in bytes."""
    nodes = await monitor.execute("query-named-block-nodes", flat=True)
    return {node["node-name"]: node["image"]["virtual-size"] for node in nodes}


def _require_completed(status: dict[str, Any]) -> None:
    if status.get("status") != "completed":
        said = status.get("error-desc") or f"it ended as '{status.get('status')}'"
        raise PolyvisorError(f"QEMU could not copy its memory: {said}")


def _seconds(timestamp: dict[str, int]) -> float:
    return timestamp["seconds"] + timestamp["microseconds"] / 1e6


async def _ended(process: Program) -> None:
    deadline = time.monotonic() + END_S
    while process.poll() is None and time.monotonic() < deadline:
        await pause(_POLL_S)


def _said(log: IO[bytes]) -> str:
    """The last line in `log`."""
    log.seek(0)
    lines = log.read(64 << 10).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _kept(stack: contextlib.ExitStack, fd: int) -> int:
    """`fd`, closed with the stack."""
    stack.callback(os.close, fd)
    return fd
