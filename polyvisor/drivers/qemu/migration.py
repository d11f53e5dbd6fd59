"""A guest's memory and devices, written to a file and read back, by QEMU's own migration.

QEMU runs as a user that may open nothing, so it gets the open file. How it is named then depends on the version: before 9.1 as
`fd:NAME`, which QEMU 11 takes for sockets alone, since then as a `file:` in a set of descriptors.
Commands: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (migrate, migrate-incoming, query-migrate).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from polyvisor.drivers.qemu.qmp import Monitor, QMPLost, QMPRefused
from polyvisor.errors import PolyvisorError, StorageFull, TimedOut, Unsupported, WrongState
from polyvisor.operation import Progress, Step
from polyvisor.waiting import pause

# QEMU answers nothing while it reads, nor while it empties its caches; a disk may be slow.
PATIENCE_S = 900.0
_POLL_S = 0.02
_READING_S = 0.001  # a fork reads for some milliseconds in all
_NAME = "memory"
_SET = 5  # the number of our set of descriptors; nothing else here uses any
_FILE_IN_SET = (9, 1)
UNDER_WAY = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")
# Makes a migration wait for its last part; a copy for forks sets it, and may be killed before it takes that back.
PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
# Leaves memory out that is a file, of what is written and read. As a property (-global migration.…) QEMU 7.2 does not have it.
IGNORE_SHARED = "x-ignore-shared"
# In these run states the vCPUs stand still until they are told to go on, in the others a guest may wake by itself.
_SAVABLE = ("running", "paused", "io-error", "postmigrate")
_DEVICES_BYTES = 4 << 20  # they come after the memory, and take a tenth of that
_CPU_SECTION = re.compile(rb"\x04.{4}\x03cpu.{8}", re.DOTALL)
_HFLAGS = 18 * 8
_HF_LONG_MODE, _HF_GUEST = 1 << 14, 1 << 21


async def write_memory(monitor: Monitor, file: int, progress: Progress) -> str:
    """Stop the vCPUs and write all that the guest is to `file`, open for writing; returns the machine's versioned type.

    Raises Unsupported, WrongState, StorageFull, PolyvisorError; the vCPUs stand still in any case.
    """
    monitor.timeout_s = PATIENCE_S
    await end_migration(monitor)
    await _stop(monitor)
    machine = await machine_type(monitor)
    await as_by_default(monitor)  # or a copy that was cut off would leave out the memory
    await monitor.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    try:
        async with handed_over(monitor, file) as uri:
            await monitor.execute("migrate", uri=uri)
            await _written(monitor, progress)
    except BaseException:
        with contextlib.suppress(PolyvisorError):
            await end_migration(monitor)
        raise
    return machine


async def as_by_default(monitor: Monitor) -> None:
    """Let migrations write everything, without a stop on the way."""
    names = (PAUSE_BEFORE_SWITCHOVER, IGNORE_SHARED)
    off = [{"capability": name, "state": False} for name in names]
    await monitor.execute("migrate-set-capabilities", capabilities=off)


async def machine_type(monitor: Monitor) -> str:
    """The machine under its versioned name, as pc-i440fx-7.2."""
    return str(await monitor.execute("qom-get", path="/machine", property="type")).removesuffix("-machine")


async def require_movable(monitor: Monitor) -> str:
    """The guest's state, where it can be written; raises WrongState, Unsupported. One that was written already can be again."""
    state = await monitor.run_state()
    if state not in _SAVABLE:
        raise WrongState(f"its guest is in the state '{state}'", hint="let it go on first: polyvisor resume")
    status = await monitor.execute("query-migrate")
    if reasons := status.get("blocked-reasons"):
        raise Unsupported(f"QEMU can't save this guest: {reasons[0]}")
    if state == "postmigrate":  # QEMU writes a guest once; only vCPUs that have been let go on make it write again
        await monitor.execute("cont")
        await monitor.execute("stop")
    return state


async def _stop(monitor: Monitor) -> None:
    """Let the vCPUs stand still; raises WrongState, Unsupported where this guest can't be saved."""
    await require_movable(monitor)
    await monitor.execute("stop")


async def _written(monitor: Monitor, progress: Progress) -> None:
    while (status := await monitor.execute("query-migrate")).get("status") in UNDER_WAY:
        if ram := status.get("ram"):
            progress(Step("saving", ram["total"] - ram["remaining"], ram["total"], "B"))
        await asyncio.sleep(_POLL_S)
    if status.get("status") == "completed":
        return
    said = str(status.get("error-desc") or f"it ended as '{status.get('status')}'")
    if any(os.strerror(number) in said for number in (28, 122)):  # ENOSPC, EDQUOT
        raise StorageFull("the disk is full", hint="free some space: polyvisor image ls; polyvisor ls")
    raise PolyvisorError(f"QEMU could not write its memory: {said}")


async def read_memory(
    monitor: Monitor, file: int, size: int, progress: Progress, *, ignore_shared: bool = False
) -> None:
    """Let a QEMU that was started with the arguments of `incoming.restoring_argv` read what `write_memory` wrote, `size` bytes.

    The vCPUs stand still afterwards. With `ignore_shared` memory that is a file was left out; the capability stays on. Raises
    QMPLost where QEMU does not understand it and ends, QMPRefused, TimedOut.
    """
    monitor.timeout_s = PATIENCE_S
    uri, handing_over = _handing_over(monitor, file)
    first = [set_capability(monitor, IGNORE_SHARED, True)] if ignore_shared else []
    try:
        # QEMU takes one after the other: to wait for each answer would make a fork wait.
        await asyncio.gather(*first, handing_over, monitor.execute("migrate-incoming", uri=uri))
        while (status := await _asked_while_reading(monitor, file, size, progress)) in (None, *UNDER_WAY):
            await pause(_READING_S)
    finally:
        await _take_back(monitor)
    if status != "completed":
        raise QMPRefused(f"QEMU could not read its memory: it ended as '{status}'")


async def _asked_while_reading(monitor: Monitor, file: int, size: int, progress: Progress) -> Any:
    """The status; QEMU may answer late, and its place in the file, which is ours too, tells meanwhile how far it is."""
    asked = asyncio.ensure_future(monitor.execute("query-migrate"))
    try:
        while not (await asyncio.wait({asked}, timeout=_POLL_S))[0]:
            progress(Step("restoring", min(os.lseek(file, 0, os.SEEK_CUR), size), size, "B"))
        return (await asked).get("status")
    finally:
        asked.cancel()


def runs_guest(file: int) -> bool:
    """Whether one of the vCPUs in the open file that `write_memory` wrote was executing a guest of its own.

    Emulation writes such a state (HF_GUEST_MASK in `hflags`) and refuses to read it: QEMU's target/i386/machine.c takes every
    vCPU in guest mode for one of KVM's.
    """
    return any(flags & _HF_GUEST for flags in _hidden_flags(file))


def in_long_mode(file: int) -> bool:
    """Whether one of the vCPUs in such a file is in 64-bit mode: then a guest that is handed its kernel is past firmware."""
    return any(flags & _HF_LONG_MODE for flags in _hidden_flags(file))


def _hidden_flags(file: int) -> list[int]:
    """The `hflags` of the vCPUs (QEMU, target/i386/cpu.h).

    A section is 4, its number, its name, instance and version; that of a CPU begins with 16 registers, eip and eflags
    (`vmstate_x86_cpu`), all in network byte order.
    """
    copy = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)  # the caller's is for writing alone
    try:
        size = os.fstat(copy).st_size
        tail = os.pread(copy, _DEVICES_BYTES, max(0, size - _DEVICES_BYTES))
    finally:
        os.close(copy)
    places = (found.end() + _HFLAGS for found in _CPU_SECTION.finditer(tail))
    return [int.from_bytes(tail[place : place + 4], "big") for place in places]


async def end_migration(monitor: Monitor) -> None:
    """Let no migration be under way: one that a command left which was killed would stop the vCPUs at its end."""
    while (await monitor.execute("query-migrate")).get("status") in UNDER_WAY:
        await monitor.execute("migrate_cancel")
        await asyncio.sleep(_POLL_S)


async def set_capability(monitor: Monitor, name: str, state: bool) -> None:
    await monitor.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": state}])


@contextlib.asynccontextmanager
async def handed_over(monitor: Monitor, file: int) -> AsyncIterator[str]:
    """Give QEMU the open file, and the URI by which it knows it there."""
    uri, handing_over = _handing_over(monitor, file)
    await handing_over
    try:
        yield uri
    finally:
        await _take_back(monitor)


def _handing_over(monitor: Monitor, file: int) -> tuple[str, Coroutine[Any, Any, Any]]:
    """The URI by which QEMU knows the open file once the command is done that gives it that."""
    if monitor.version < _FILE_IN_SET:
        return f"fd:{_NAME}", monitor.execute_with(file, "getfd", fdname=_NAME)
    return f"file:/dev/fdset/{_SET}", monitor.execute_with(file, "add-fd", **{"fdset-id": _SET})


async def _take_back(monitor: Monitor) -> None:
    """Let QEMU close the file, where it has not done so by itself, having used it."""
    if monitor.version >= _FILE_IN_SET:
        with contextlib.suppress(QMPLost, QMPRefused, TimedOut):
            await monitor.execute("remove-fd", **{"fdset-id": _SET})
