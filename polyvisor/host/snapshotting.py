"""What the verbs about snapshots do; how snapshots lie in a VM's directory is in `snapshots.py`, its disks are `disks.py`'s.

A process may be killed between any two steps, so whoever works on the snapshots of a VM, or starts it, calls `ready` before,
which brings to its end what was begun. See docs/design/snapshots.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.errors import AlreadyExists, CannotStart, InvalidInput, PolyvisorError, Unsupported, WrongState
from polyvisor.files import storage_errors, sync_directory, sync_files, write_atomic
from polyvisor.host import disks, saved
from polyvisor.host.merging import merge
from polyvisor.host.moves import require_settled
from polyvisor.host.plan import FORK_SEED, SEED_DISK, SEEDED_INITRD, UEFI_VARIABLES, disk_count
from polyvisor.host.record import FORMAT, Record, devices_of, disk_name
from polyvisor.host.snapshots import (
    MAX_DESCRIPTION,
    NOTE,
    Kept,
    Snapshot,
    check_snapshot_name,
    directory,
    read,
    read_all,
    to_json,
)
from polyvisor.host.store import VMDirectory
from polyvisor.operation import Progress, Step
from polyvisor.status import VMState

if TYPE_CHECKING:
    from polyvisor.drivers.base import Driver
    from polyvisor.host.host import Host

_STATES = (VMState.RUNNING, VMState.PAUSED, VMState.STOPPED, VMState.CRASHED)
_SEEDS = (SEED_DISK, SEEDED_INITRD, FORK_SEED)


async def create(
    host: Host, name: str, wanted: str | None, memory: bool | None, description: str, progress: Progress
) -> Snapshot:
    """Make a snapshot of VM `name`; where it fails, the VM is as before, and goes on.

    Raises AlreadyExists, WrongState, Unsupported, StorageFull.
    """
    if len(description) > MAX_DESCRIPTION or not description.isprintable():
        raise InvalidInput("description", description, f"is not a line of at most {MAX_DESCRIPTION} characters")
    if wanted is not None:
        check_snapshot_name(wanted)
    async with _locked(host, name) as vm:
        await ready(host, vm, progress)
        state = await _checked(host, vm)
        memory = await _with_memory(host, vm, state, memory)
        there = {each.name for each in read_all(vm)}
        if wanted in there:
            hint = f"choose another name, or: polyvisor snapshot rm {name} {wanted}"
            raise AlreadyExists(f"VM '{name}' has a snapshot '{wanted}' already", hint=hint)
        chosen = wanted or next(each for i in range(1, len(there) + 2) if (each := f"s{i}") not in there)
        kept = await _take(host, vm, chosen, state, memory, description, progress)
        return _shown(host, vm, kept)


async def show(host: Host, name: str, snapshot: str) -> Snapshot:
    """One snapshot; raises NotFound, with the nearest name."""
    vm = host.store.get(name)
    return _shown(host, vm, read(vm, snapshot))


async def listed(host: Host, name: str) -> list[Snapshot]:
    """The snapshots of VM `name`, the oldest first."""
    vm = host.store.get(name)
    return [_shown(host, vm, kept) for kept in read_all(vm)]


async def revert(host: Host, name: str, snapshot: str, force: bool, progress: Progress) -> None:
    """Let VM `name` be as it was at `snapshot`: stopped, or saved where the snapshot has memory.

    What it has written since its last snapshot is gone then. Raises WrongState for a VM that is alive, unless forced.
    """
    async with _locked(host, name) as vm:
        kept = read(vm, snapshot)
        require_settled(vm, "be reverted")
        if await host.drivers.lives(vm):
            if not force:
                state = (await host.drivers.of(vm).inspect(vm)).state
                hint = f"stop it first, or: polyvisor snapshot revert --force {name} {snapshot}"
                raise WrongState(f"VM '{name}' is {state}: what is in its memory would be lost", hint=hint)
            await host.drivers.end(vm)
        require_same_disks(host, vm, kept)
        if kept.memory_bytes is not None:
            _require_same_cards(vm, kept)
        with storage_errors(f"reverting VM '{name}'"):
            write_atomic(_reverting(vm), kept.name)
        await _revert(host, vm, kept, progress)


async def remove(host: Host, name: str, snapshot: str, progress: Progress) -> None:
    """Remove a snapshot; those after it stay, and are after the one before it."""
    async with _locked(host, name) as vm:
        check_snapshot_name(snapshot)
        await ready(host, vm, progress)
        try:
            kept = read(vm, snapshot)
        except PolyvisorError:
            if not (directory(vm, snapshot) / NOTE).exists():
                raise
            kept = Kept(name=snapshot, created_at=0.0)  # one that can't be understood can be removed still
        with storage_errors(f"removing snapshot '{snapshot}' of VM '{name}'"):
            for other in _understood(vm):
                if other.parent == snapshot:
                    write_atomic(directory(vm, other.name) / NOTE, to_json(replace(other, parent=kept.parent)))
            if (record := disks.vm_record(vm)).snapshot == snapshot:
                vm.write_record(replace(record, snapshot=kept.parent))
            gone = vm.path / "snapshots" / f".gone-{snapshot}"
            directory(vm, snapshot).rename(gone)
            sync_directory(gone.parent)
            shutil.rmtree(gone)
        disks.sweep(host)
        await merge(host, name, progress)


async def ready(host: Host, vm: VMDirectory, progress: Progress) -> None:
    """Bring to its end what a command has begun that was killed: a revert, or the making of a snapshot."""
    base = vm.path / "snapshots"
    if not base.is_dir():
        return
    if _reverting(vm).exists() and not vm.alive():
        with storage_errors(f"reading which snapshot VM '{vm.name}' goes back to"):
            target = _reverting(vm).read_text()
        await _revert(host, vm, read(vm, target), progress)
    if vm.is_being_kept():
        if vm.alive() and (await host.drivers.of(vm).inspect(vm)).state is VMState.PAUSED:
            await host.drivers.of(vm).resume(vm)
        drop_interrupted(vm)
    with storage_errors(f"tidying the snapshots of VM '{vm.name}'"):
        for left in [*base.glob(".new-*"), *base.glob(".gone-*")]:
            shutil.rmtree(left)
    record = disks.vm_record(vm)
    begun = [kept.name for kept in _understood(vm) if kept.layers and kept.layers == record.layers]
    if (
        begun and record.snapshot not in begun
    ):  # it was killed when the snapshot was there, and not yet the one to go on from
        vm.write_record(replace(record, snapshot=begun[-1]))


def drop_interrupted(vm: VMDirectory) -> None:
    """The guest goes on, or stands still because the user wants it."""
    with storage_errors(f"tidying the snapshots of VM '{vm.name}'"):
        (vm.path / "snapshots/was-running").unlink(missing_ok=True)


def require_same_disks(host: Host, vm: VMDirectory, kept: Kept) -> None:
    """Raise WrongState where the disks that a VM had at a snapshot are not those, by their numbers, that it has now."""
    record = disks.vm_record(vm)
    now = {disk.number for disk in disks.disks_of(host, record)}
    before = set(kept.disk_numbers)
    if kept.layers and now != before:
        hint = [f"disk add {vm.name} --name {disk_name(number)}" for number in sorted(before - now)]
        hint += [f"disk rm --force {vm.name} {disk_name(number)}" for number in sorted(now - before)]
        raise WrongState(
            f"VM '{vm.name}' had {_list(before)} at snapshot '{kept.name}', and has {_list(now)} now",
            hint=f"let it have them again, empty: {'; '.join(f'polyvisor {each}' for each in hint)}",
        )


def _list(numbers: set[int]) -> str:
    return ", ".join(map(disk_name, sorted(numbers))) or "no disk"


def _require_same_cards(vm: VMDirectory, kept: Kept) -> None:
    """Raise WrongState where the guest that is in the memory of a snapshot has other network cards than the VM now."""
    launch = _state_of(vm, kept).launch
    now = devices_of(disks.vm_record(vm)).nics
    if launch.devices is not None and launch.devices.nics != now:
        had, has = (
            ", ".join(f"{name} ({network})" for name, network in nics.items()) for nics in (launch.devices.nics, now)
        )
        hint = f"add and remove cards until they are the same: polyvisor nic ls {vm.name}"
        raise WrongState(
            f"VM '{vm.name}' had the cards {had or 'none'} at snapshot '{kept.name}', and has {has or 'none'}",
            hint=hint,
        )


def require_none(vm: VMDirectory, verb: str) -> None:
    """Raise WrongState for a VM with snapshots, or whose disks stand on layers: only whole ones can be carried away."""
    if read_all(vm) or vm.record.layers:
        what = "has snapshots" if read_all(vm) else "stands on layers that it shares"
        hint = f"make a full clone, and take that: polyvisor clone --full {vm.name} NEW"
        raise WrongState(f"VM '{vm.name}' {what}: it can't {verb}", hint=hint)


def _locked(host: Host, name: str) -> AbstractAsyncContextManager[VMDirectory]:
    host.store.get(name)
    return host.store.locked(name, "snapshot")


async def _missing(host: Host, vm: VMDirectory, feature: str) -> str | None:
    """Why the driver of a VM lacks `feature`, or None."""
    driver = host.drivers.of(vm).name
    return next(each.missing.get(feature) for each in await host.capabilities() if each.driver == driver)


# Making one


async def _checked(host: Host, vm: VMDirectory) -> VMState:
    """The state of a VM of which a snapshot may be made; raises WrongState, Unsupported."""
    require_settled(vm, "get a snapshot")
    driver = host.drivers.of(vm)
    state = (await driver.inspect(vm)).state
    if vm.is_saved():
        if await host.drivers.lives(vm):
            raise saved.still_restoring(vm)
        hint = f"polyvisor start {vm.name}; then make one with memory, which is as good"
        raise WrongState(f"VM '{vm.name}' is saved: its disks must stay as they are", hint=hint)
    if state not in _STATES:
        raise WrongState(f"VM '{vm.name}' is {state}: it can't get a snapshot", hint=f"polyvisor kill {vm.name}")
    if state.alive and (reason := await _missing(host, vm, "snapshot-live")):
        raise Unsupported(f"VM '{vm.name}' is {state}: {reason}", hint=f"polyvisor stop {vm.name}")
    await host._require_devices_in_force(vm, "get a snapshot")
    return state


async def _with_memory(host: Host, vm: VMDirectory, state: VMState, wanted: bool | None) -> bool:
    """Whether memory belongs to the snapshot: by default where there is any. Raises WrongState, Unsupported."""
    reason = await _missing(host, vm, "snapshot-memory") if state.alive else None
    if wanted and reason:
        raise Unsupported(f"VM '{vm.name}': {reason}", hint="make one without: --no-memory")
    if wanted and not state.alive:
        raise WrongState(f"VM '{vm.name}' is {state}: it has no memory", hint=f"polyvisor start {vm.name}")
    memory = state.alive and reason is None if wanted is None else wanted
    record = vm.record
    if not memory and disk_count(record.spec, host.images.store.by_id(record.image_id)) == 0:
        hint = "make it with memory, while it runs" + ("" if state.alive else f": polyvisor start {vm.name}")
        raise WrongState(f"VM '{vm.name}' has no disk: without memory there is nothing to keep", hint=hint)
    return memory


async def _take(
    host: Host, vm: VMDirectory, name: str, state: VMState, memory: bool, description: str, progress: Progress
) -> Kept:
    driver = host.drivers.of(vm)
    with _staging(vm, name) as staging:
        async with _standing_still(vm, driver, state) as pausing:
            record = await disks.freeze(host, vm)
            _keep_files(vm, staging, memory)
            machine = await _write_memory(vm, driver, staging, progress) if memory else None
            usage = await driver.usage(vm) if memory else None
        progress(Step("checking"))
        if machine is not None:
            await _describe_memory(vm, staging, machine, pausing, usage.vcpus if usage else None, progress)
        kept = Kept(
            name=name,
            created_at=time.time(),
            layers=tuple(layer for layer in record.layers if layer is not None),
            parent=record.snapshot,
            description=description,
            running=state is VMState.RUNNING,
            memory_bytes=(staging / "memory").stat().st_size if memory else None,
            disks=record.disk_numbers,
        )
        with storage_errors(f"keeping snapshot '{name}' of VM '{vm.name}'"):
            write_atomic(staging / NOTE, to_json(kept))
            sync_files(staging)
            staging.rename(directory(vm, name))
            sync_directory(staging.parent)
    vm.write_record(replace(record, snapshot=name))
    return kept


@contextmanager
def _staging(vm: VMDirectory, name: str) -> Iterator[Path]:
    """A directory to make a snapshot in; what is left of it at the end is removed."""
    staging = vm.path / "snapshots" / f".new-{name}"
    with storage_errors(f"making a snapshot of VM '{vm.name}'"):
        staging.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "disks").mkdir(mode=0o700, parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@asynccontextmanager
async def _standing_still(vm: VMDirectory, driver: Driver, state: VMState) -> AsyncIterator[bool]:
    """Let the guest of a VM stand still in the block, if it runs; yields whether it stood still before."""
    if state is not VMState.RUNNING:
        yield state is VMState.PAUSED
        return
    note = vm.path / "snapshots/was-running"
    with storage_errors(f"making a snapshot of VM '{vm.name}'"):
        note.touch(mode=0o600)
    try:
        await driver.pause(vm)
        yield False
    finally:
        await saved.to_its_end(_go_on(vm, driver))


async def _go_on(vm: VMDirectory, driver: Driver) -> None:
    try:
        await driver.resume(vm)
    except PolyvisorError:
        if vm.alive():
            raise
    drop_interrupted(vm)


def _keep_files(vm: VMDirectory, staging: Path, memory: bool) -> None:
    """Copy what belongs to the moment beside the disks; nothing writes to it now."""
    with storage_errors(f"making a snapshot of VM '{vm.name}'"):
        for path in (UEFI_VARIABLES, *(_SEEDS if memory else ())):
            if (vm.path / path).exists():
                copy(vm.path / path, staging / path)


def copy(source: Path, target: Path) -> None:
    """A copy of a file in the reach of a VM's process: never follow a link that it may have put there."""
    fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file, target.open("xb") as made:
        os.fchmod(made.fileno(), 0o600)
        shutil.copyfileobj(file, made, 1 << 20)


async def _write_memory(vm: VMDirectory, driver: Driver, staging: Path, progress: Progress) -> str:
    with storage_errors(f"keeping the memory of VM '{vm.name}'"):
        fd = os.open(staging / "memory", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            return await driver.save(vm, fd, progress)
        finally:
            os.close(fd)


async def _describe_memory(
    vm: VMDirectory, staging: Path, machine: str, paused: bool, vcpus: int | None, progress: Progress
) -> None:
    """Note what the memory is that was written; its guest goes on meanwhile."""
    launch = vm.launch()
    assert launch is not None  # noqa: S101 - it is alive
    path = staging / "memory"
    state = saved.State(
        saved_at=time.time(),
        size_bytes=path.stat().st_size,
        sha256=await saved.checksum(path, progress),
        paused=paused,
        machine=machine,
        cpu=saved.host_cpu() if launch.hypervisor != "tcg" else (),
        disks={},
        launch=launch,
        vcpus=vcpus,
    )
    with storage_errors(f"keeping the memory of VM '{vm.name}'"):
        write_atomic(staging / "saved.json", _state_json(state))


def _state_json(state: saved.State) -> str:
    return json.dumps({"format": FORMAT, **asdict(state)}, indent=2) + "\n"


# Going back to one


def _reverting(vm: VMDirectory) -> Path:
    return vm.path / "snapshots/reverting"


async def _revert(host: Host, vm: VMDirectory, kept: Kept, progress: Progress) -> None:
    """Bring a VM that is not alive back to a snapshot; `reverting` is there, and gone at the end. It may be repeated."""
    progress(Step("reverting"))
    saved.drop(vm)
    old = disks.vm_record(vm)
    new = replace(old, layers=kept.layers, generation=old.generation + bool(kept.layers), snapshot=kept.name)
    with host.layers.held(*kept.layers):
        await disks.make_overlays(host, vm.path, new, [host.layers.get(layer) for layer in kept.layers])
        _put_back(vm, kept, new)
        vm.write_record(new)
    disks.drop_others(vm, new)
    if kept.memory_bytes is not None:
        _put_memory_back(host, vm, kept, new)
    with storage_errors(f"reverting VM '{vm.name}'"):
        _reverting(vm).unlink()
        sync_directory(_reverting(vm).parent)
    disks.sweep(host)


def _put_back(vm: VMDirectory, kept: Kept, record: Record) -> None:
    """The UEFI variables of then, or none, where there were none; with memory also the seed."""
    source = directory(vm, kept.name)
    with storage_errors(f"reverting VM '{vm.name}'"):
        for path in (UEFI_VARIABLES, *(_SEEDS if kept.memory_bytes is not None else ())):
            if not (source / path).exists():
                (vm.path / path).unlink(missing_ok=True)
                continue
            new = (vm.path / path).with_suffix(".new")
            new.unlink(missing_ok=True)
            copy(source / path, new)
            disks.give_to_user([new], record.user)
            sync_files(new)
            new.replace(vm.path / path)
        sync_directory(vm.disks)


def _put_memory_back(host: Host, vm: VMDirectory, kept: Kept, record: Record) -> None:
    """Let the VM be saved, as it was then; its memory is the snapshot's own file, by a second name."""
    state = _state_of(vm, kept)
    driver = host.drivers.running(state.launch.hypervisor)
    launch = driver.with_disks(state.launch, disks.disks_of(host, record))
    with storage_errors(f"reverting VM '{vm.name}'"):
        vm.saved.mkdir(mode=0o700)
        state = replace(state, launch=launch, disks=saved.disk_states(vm))
        write_atomic(vm.saved / "saved.json", _state_json(state))
        os.link(directory(vm, kept.name) / "memory", vm.saved / "memory")
        sync_directory(vm.saved)


def _state_of(vm: VMDirectory, kept: Kept) -> saved.State:
    try:
        return saved.read_state(directory(vm, kept.name) / "saved.json")
    except (OSError, ValueError, InvalidInput) as error:
        hint = f"its disks are there still: polyvisor clone {vm.name} NEW --snapshot {kept.name}"
        raise CannotStart(f"snapshot '{kept.name}': its memory can't be understood: {error}", hint=hint) from error


# Looking


def _understood(vm: VMDirectory) -> list[Kept]:
    found = []
    for path in sorted((vm.path / "snapshots").glob(f"[!.]*/{NOTE}")):
        with contextlib.suppress(PolyvisorError):
            found.append(read(vm, path.parent.name))
    return found


def _shown(host: Host, vm: VMDirectory, kept: Kept) -> Snapshot:
    return Snapshot(
        name=kept.name,
        created_at=kept.created_at,
        parent=kept.parent,
        current=disks.vm_record(vm).snapshot == kept.name,
        description=kept.description,
        running=kept.running,
        memory_bytes=kept.memory_bytes,
        disk_bytes=sum(_allocated(host.layers.file(layer)) for layer in kept.layers),
    )


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
