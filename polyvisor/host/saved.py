"""Saving a VM, memory and all, and starting it again from there.

    <vm>/saved/memory        what the driver wrote; the VM is saved from the moment that this name is there
    <vm>/saved/saved.json    what it is, and what has to be as it was then
    <vm>/saved/memory.new    what is being written
    <vm>/saved/was-running   where it is being written, or that was cut off: the VM was not paused before
    <vm>/saved/restoring     a process was started that reads it

It counts for a VM that is not alive, and must fit its disks: so it is deleted before any vCPU may run again. Each function
here wants the VM's lock to be held. A process may be killed between any two steps: docs/design/save-and-restore.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Coroutine
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from polyvisor.drivers.base import BootNic, Driver
from polyvisor.errors import CannotStart, InvalidInput, PolyvisorError, WrongState
from polyvisor.files import read_small, storage_errors, sync_directory, translated, write_atomic
from polyvisor.host.record import FORMAT, Launch, boot_id, checked
from polyvisor.host.store import FORKING, VMDirectory
from polyvisor.network.ports import with_free_ports
from polyvisor.operation import Progress, Step
from polyvisor.spec.parse import structure
from polyvisor.status import Saved, VMState
from polyvisor.values import dataclass
from polyvisor.waiting import event_loop

_PIECE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class State:
    """What lies in `memory`, which has `size_bytes` bytes, and what has to be as it was.

    `machine` is the driver's name of it; `launch` how the VM ran; `cpu` what its guest may use of this host's processor
    (nothing where that is emulated); `disks` size and last change of each disk; `vcpus` how many it had by then.
    """

    saved_at: float
    size_bytes: int
    sha256: str
    paused: bool
    machine: str
    cpu: tuple[str, ...]
    disks: dict[str, str]
    launch: Launch
    vcpus: int | None = None


def read(vm: VMDirectory) -> State:
    """The state of a VM that is saved; raises PolyvisorError where it can't be understood."""
    try:
        return read_state(vm.saved / "saved.json")
    except PermissionError as error:
        raise translated(error, f"reading the saved state of VM '{vm.name}'") from error
    except (OSError, ValueError, InvalidInput) as error:
        raise CannotStart(
            f"VM '{vm.name}': {vm.saved}/saved.json can't be understood: {error}", hint=_fresh(vm)
        ) from error


def read_state(path: Path) -> State:
    """The state in a file `saved.json`; raises OSError, ValueError, InvalidInput."""
    return structure(checked(read_small(str(path))), State)


def describe(vm: VMDirectory) -> Saved | None:
    """For those who look: what is saved of a VM that is not alive."""
    if not vm.is_saved():
        return None
    state = read(vm)
    return Saved(at=state.saved_at, size_bytes=state.size_bytes, paused=state.paused)


def drop(vm: VMDirectory) -> None:
    """Delete what is saved of a VM, or was being written; whoever lets its vCPUs run does so before."""
    if not vm.saved.exists():
        return
    with storage_errors(f"deleting the saved state of VM '{vm.name}'"):
        drop_memory(vm)
        for path in sorted(vm.saved.iterdir(), key=lambda path: path.name == "restoring"):
            path.unlink()
        vm.saved.rmdir()


def drop_memory(vm: VMDirectory) -> None:
    """Delete the memory alone: from here on the VM is not saved."""
    if not vm.saved.exists():
        return
    with storage_errors(f"deleting the saved memory of VM '{vm.name}'"):
        for name in ("memory", "memory.new"):
            (vm.saved / name).unlink(missing_ok=True)
        sync_directory(vm.saved)


def tidy(vm: VMDirectory) -> None:
    """Delete what a save that was cut off has left of a VM that is not alive any more."""
    if not vm.is_saved():
        drop(vm)


# Saving


async def save(vm: VMDirectory, driver: Driver, progress: Progress) -> None:
    """Save a VM and end its process; one that is saved stays so. Where it fails the VM goes on as before."""
    if await _is_done(vm, driver):
        return
    # An earlier save, snapshot or fork that was cut off may have paused it, rather than the user.
    by_us = _note(vm).exists() or vm.is_being_kept() or vm.is_forking()
    paused = (await driver.inspect(vm)).state is VMState.PAUSED and not by_us
    try:
        _begin(vm, paused)
        (vm.path / FORKING).unlink(missing_ok=True)
        await _write(vm, driver, paused, progress)
    except BaseException as error:
        await _undo(vm, driver, paused)
        if isinstance(error, PolyvisorError):
            error.about(f"VM '{vm.name}' was not saved")
        raise
    await to_its_end(driver.kill(vm))


async def _is_done(vm: VMDirectory, driver: Driver) -> bool:
    """Whether it is saved already; a save that was cut off at its very end is ended. Raises WrongState."""
    state = (await driver.inspect(vm)).state
    if vm.alive():
        if vm.is_restoring() and vm.is_saved():
            raise still_restoring(vm)
        if state not in (VMState.RUNNING, VMState.PAUSED):
            raise WrongState(f"VM '{vm.name}' is {state}: it can't be saved", hint=f"polyvisor kill {vm.name}")
        if vm.is_saved():  # and no vCPU has run since
            await driver.kill(vm)
    elif not vm.is_saved():
        raise WrongState(
            f"VM '{vm.name}' is {state}: it has no memory to save", hint=f"start it first: polyvisor start {vm.name}"
        )
    return vm.is_saved()


def _note(vm: VMDirectory) -> Path:
    return vm.saved / "was-running"


def _begin(vm: VMDirectory, paused: bool) -> None:
    """Make room, and note whether the VM is to run again."""
    note = _note(vm)
    with storage_errors(f"saving VM '{vm.name}'"):
        vm.saved.mkdir(mode=0o700, exist_ok=True)
        drop_memory(vm)
        for other in vm.saved.iterdir():
            if other != note or paused:
                other.unlink()
        if not paused:
            note.touch(mode=0o600)


async def _write(vm: VMDirectory, driver: Driver, paused: bool, progress: Progress) -> None:
    launch = vm.launch()
    assert launch is not None  # noqa: S101 - it is alive
    new = vm.saved / "memory.new"
    with storage_errors(f"saving VM '{vm.name}'"):
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            machine = await driver.save(vm, fd, progress)
            usage = await driver.usage(vm)
            await asyncio.to_thread(os.fsync, fd)
        finally:
            os.close(fd)
        state = State(
            saved_at=time.time(),
            size_bytes=new.stat().st_size,
            sha256=await checksum(new, progress),
            paused=paused,
            machine=machine,
            cpu=host_cpu() if launch.hypervisor != "tcg" else (),
            disks=disk_states(vm),
            launch=launch,
            vcpus=usage.vcpus,
        )
        if not state.size_bytes:
            raise PolyvisorError("its memory is empty")
        write_atomic(vm.saved / "saved.json", json.dumps({"format": FORMAT, **asdict(state)}, indent=2) + "\n")
        new.rename(vm.saved / "memory")
        sync_directory(vm.saved)


async def _undo(vm: VMDirectory, driver: Driver, paused: bool) -> None:
    """Let a VM that could not be saved go on as before."""
    drop_memory(vm)
    try:
        if not paused:
            await driver.resume(vm)
    except PolyvisorError:
        if vm.alive():
            raise
    drop(vm)


async def checksum(path: Path, progress: Progress) -> str:
    """SHA-256 of a file, with progress; others go on meanwhile."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb", buffering=0) as file:
        while piece := await asyncio.to_thread(file.read, _PIECE):
            await asyncio.to_thread(digest.update, piece)
            done += len(piece)
            progress(Step("checking", done, total, "B"))
    return digest.hexdigest()


# Restoring


async def restore(vm: VMDirectory, driver: Driver, place: str, progress: Progress) -> None:
    """Start a saved VM where it was. Where it fails no process is left, and what is saved is kept; raises CannotStart.

    `place` is the home's path, by which private networks are told apart.
    """
    from polyvisor.host.plan import boot_nics
    from polyvisor.host.prepare import shorten_log

    await event_loop()
    state = read(vm)
    try:
        await _check(vm, state, progress)
        with storage_errors(f"shortening the console log of VM '{vm.name}'"):
            shorten_log(vm.console_log)
        await with_free_ports(lambda: _load(vm, driver, state, boot_nics(vm.record, vm.launch(), place), progress))
    except CannotStart as error:
        error.about(f"VM '{vm.name}' can't be restored")
        error.hint = _fresh(vm)
        raise
    drop_memory(vm)
    await to_its_end(finish(vm, driver, state))


async def _load(vm: VMDirectory, driver: Driver, state: State, nics: tuple[BootNic, ...], progress: Progress) -> None:
    """Start a process that reads the memory; its vCPUs stand still."""
    command = await driver.restore_command(state.launch, state.machine, nics, state.vcpus)
    forwards = tuple(forward for nic in nics for forward in nic.forwards)
    now = replace(state.launch, started_at=time.time(), boot_id=boot_id(), forwards=forwards)
    vm.write_launch(replace(now, version=command.version, argv=command.argv))
    with storage_errors(f"restoring VM '{vm.name}'"):
        (vm.saved / "restoring").touch(mode=0o600)
        fd = os.open(vm.saved / "memory", os.O_RDONLY | os.O_CLOEXEC)
    try:
        await driver.restore(vm, command, nics, vm.record.user, fd, progress)
    finally:
        os.close(fd)
    if vm.is_renewing():
        from polyvisor.drivers.qemu.agent import tell
        from polyvisor.host.identity import told_again

        tell(vm, told_again(vm))


async def finish(vm: VMDirectory, driver: Driver, state: State | None = None) -> None:
    """Let a VM go on whose process has read all of its memory, which is deleted by now.

    The last that is deleted beside it says that it was read: where there is no state any more, the VM has gone on.
    """
    if state is None and (vm.saved / "saved.json").exists():
        state = read(vm)
    if state is not None and not state.paused:
        await driver.resume(vm)
    drop(vm)


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Do what is no use when it is half done; whoever cancels it (Ctrl-C) waits for it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def still_restoring(vm: VMDirectory) -> WrongState:
    return WrongState(f"VM '{vm.name}' was being restored when that was cut off", hint=f"polyvisor start {vm.name}")


async def _check(vm: VMDirectory, state: State, progress: Progress) -> None:
    """Raise CannotStart where memory, disks or processor are not what they were."""
    memory = vm.saved / "memory"
    with storage_errors(f"reading the saved memory of VM '{vm.name}'"):
        if (size := memory.stat().st_size) != state.size_bytes:
            raise CannotStart(f"its memory has {size} bytes instead of {state.size_bytes}")
        if (found := disk_states(vm)) != state.disks:
            changed = sorted(name for name in found.keys() | state.disks if found.get(name) != state.disks.get(name))
            raise CannotStart(f"its disks have changed since it was saved ({', '.join(changed)})")
        if state.cpu and (missing := sorted(set(state.cpu) - set(host_cpu()))):
            raise CannotStart(f"this host's processor lacks what its guest may use: {' '.join(missing[:5])}")
        if await checksum(memory, progress) != state.sha256:
            raise CannotStart("its memory is damaged: its checksum is wrong")


def disk_states(vm: VMDirectory) -> dict[str, str]:
    """What shows that a disk was changed by somebody else."""
    return {
        path.name: f"{status.st_size} {status.st_mtime_ns}"
        for path in sorted(vm.disks.iterdir())
        if (status := path.stat())
    }


def host_cpu() -> tuple[str, ...]:
    """The maker and the features of this host's processor, as the kernel lists them."""
    wanted = ("vendor_id", "flags")
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    return tuple(word for key, _, value in lines if key.strip() in wanted for word in value.split())


def _fresh(vm: VMDirectory) -> str:
    return f"what was saved is kept; to give it up and boot: polyvisor start --fresh {vm.name}"
