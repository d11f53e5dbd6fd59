"""Templates: memory and devices of a VM, kept, from which VMs begin at any later time.

    <home>/templates/<name>/template.json   what it is
                           /memory, state   the guest's memory, and its devices, as `drivers/qemu/fork.py` gives them
                           /vm.json, launch.json, disks/, ssh/   the VM's, as in its directory (see `store.py`)
                           /inode           which file in memory has the content of `memory`, as long as a process has it
    <home>/vms/.warm-<name>/                a VM that is ready: its process has the memory and stands still

What begins from a template maps one sealed file in memory, as forks do. It is gone with the last process that has it, and is
made anew from `memory` then. A VM that is ready becomes one by a rename and a word to its process. docs/design/fork.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.drivers.base import Template
from polyvisor.drivers.qemu.agent import tell
from polyvisor.drivers.qemu.fork import seal, sealed
from polyvisor.errors import AlreadyExists, InvalidInput, NotFound, PolyvisorError
from polyvisor.files import (
    make_directory,
    read_small,
    storage_errors,
    sync_directory,
    sync_files,
    take_flock,
    write_atomic,
)
from polyvisor.host import disks, fork, identity
from polyvisor.host.fork import Source
from polyvisor.host.keys import SSH
from polyvisor.host.plan import SEED_DISK, UEFI_VARIABLES
from polyvisor.host.record import FORMAT, boot_id, checked, new_id
from polyvisor.host.store import UNBORN, WARM, VMDirectory
from polyvisor.operation import Progress, Step
from polyvisor.spec.parse import structure, unstructure
from polyvisor.spec.vm import check_name
from polyvisor.status import Forked, StoredTemplate, VMState
from polyvisor.values import dataclass
from polyvisor.waiting import event_loop

if TYPE_CHECKING:
    from polyvisor.host.host import Host

_PIECE = 8 << 20
_MEMORY, _STATE, _NOTE, _INODE = "memory", "state", "template.json", "inode"
_MEMFD = "polyvisor-"


@dataclass(frozen=True, kw_only=True)
class Note:
    """What stands in template.json: `machine` and `vcpus` are as in `Template`, `checksums` SHA-256 by file."""

    id: str
    created_at: float
    source: str
    machine: str
    vcpus: int | None
    checksums: dict[str, str]


# Making, listing and removing


async def create(host: Host, name: str, vm_name: str, progress: Progress) -> StoredTemplate:
    """Keep memory and devices of VM `vm_name`, which goes on, as template `name`. See `HostApi.template_create`."""
    await event_loop()
    check_name(name)
    async with AsyncExitStack() as held:
        vm = await held.enter_async_context(host.store.locked(vm_name, "template"))
        runs = await fork.require_forkable(host, vm)
        await held.enter_async_context(_alone(host))
        place = _directory(host, name)
        if place.path.exists():
            hint = f"choose another name, or: polyvisor template rm {name}"
            raise AlreadyExists(f"there is a template '{name}' already", hint=hint)
        source = await fork.take(host, vm, progress, runs=runs)
        held.callback(os.close, source.template.memory)
        held.callback(os.close, source.template.state)
        await _keep(host, place, source, progress)
        return describe(host, place)


async def _keep(host: Host, place: VMDirectory, source: Source, progress: Progress) -> None:
    staging = VMDirectory(place.path.with_name(f".new-{place.name}"))
    template = source.template
    with storage_errors(f"writing template '{place.name}'"):
        shutil.rmtree(staging.path, ignore_errors=True)
        try:
            staging.path.mkdir(mode=0o700)
            staging.disks.mkdir(mode=0o700)
            sums = {
                file: await asyncio.to_thread(copy, fd, staging.path / file, progress)
                for file, fd in ((_MEMORY, template.memory), (_STATE, template.state))
            }
            for path in (SEED_DISK, UEFI_VARIABLES):
                if (source.vm.path / path).exists():
                    shutil.copyfile(source.vm.path / path, staging.path / path)
            if (source.vm.path / SSH).is_dir():
                shutil.copytree(source.vm.path / SSH, staging.path / SSH)
            staging.write_record(source.record)
            staging.write_launch(source.launch)
            note = Note(
                id=new_id(),
                created_at=time.time(),
                source=source.vm.name,
                machine=template.machine,
                vcpus=template.vcpus,
                checksums=sums,
            )
            write_atomic(staging.path / _NOTE, json.dumps({"format": FORMAT, **unstructure(note)}, indent=2) + "\n")
            await asyncio.to_thread(sync_files, staging.path)
            staging.path.rename(place.path)
            sync_directory(host.home.templates)
        except BaseException:
            shutil.rmtree(staging.path, ignore_errors=True)
            raise


def copy(source: int, target: Path, progress: Progress) -> str:
    """Copy an open file, where it has zeroes as holes, and return its SHA-256. Raises OSError."""
    digest, size, done = hashlib.sha256(), os.fstat(source).st_size, 0
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        while piece := os.pread(source, _PIECE, done):
            digest.update(piece)
            if piece.strip(b"\0"):
                file.seek(done)
                file.write(piece)
            done += len(piece)
            progress(Step("writing memory", done, size, "B"))
        file.truncate(size)
    return digest.hexdigest()


def listed(host: Host) -> list[StoredTemplate]:
    try:
        names = sorted(entry.name for entry in os.scandir(host.home.templates) if not entry.name.startswith("."))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        with contextlib.suppress(NotFound):
            found.append(describe(host, get(host, name)))
    return found


def get(host: Host, name: str) -> VMDirectory:
    """The directory of a template; raises NotFound, with the names of those that are there."""
    place = _directory(host, name)
    if not (place.path / _NOTE).exists():
        there = [path.name for path in host.home.templates.glob("[!.]*")] if host.home.templates.is_dir() else []
        hint = f"there are: {', '.join(sorted(there))}" if there else "polyvisor template create makes one"
        raise NotFound(f"there is no template '{name}'", hint=hint)
    return place


def describe(host: Host, place: VMDirectory) -> StoredTemplate:
    note, record = read(place), place.record
    size = sum(path.stat().st_blocks * 512 for path in place.path.rglob("*") if path.is_file())
    return StoredTemplate(
        name=place.name,
        created_at=note.created_at,
        source=note.source,
        image=record.spec.image,
        vcpus=note.vcpus or record.spec.vcpus,
        memory_mib=record.memory_mib,
        size_bytes=size,
        warm=tuple(vm.name.removeprefix(WARM) for vm in ready(host, note)),
    )


def read(place: VMDirectory) -> Note:
    """What template.json says; raises NotFound, PolyvisorError."""
    try:
        return structure(checked(read_small(f"{place.path}/{_NOTE}")), Note)
    except FileNotFoundError as error:
        raise NotFound(f"there is no template '{place.name}'", hint="polyvisor template ls") from error
    except (OSError, ValueError, InvalidInput) as error:
        hint = f"polyvisor template rm {place.name}"
        raise PolyvisorError(f"{place.path / _NOTE} can't be understood: {error}", hint=hint) from error


async def remove(host: Host, name: str) -> None:
    """Remove a template and the VMs that are ready to begin from it; those that have begun go on."""
    place = _directory(host, name)
    async with _alone(host):
        if not place.path.is_dir():
            get(host, name)  # raises
        with contextlib.suppress(PolyvisorError):
            template_id = read(place).id
            for vm in host.store.all_warm():
                if _template_of(vm) in (template_id, None):
                    await fork.discard(host, vm)
        with storage_errors(f"removing template '{name}'"):
            place.path.rename(gone := place.path.with_name(f".gone-{name}"))
            shutil.rmtree(gone)
    disks.sweep(host)


def records(host: Host) -> Iterator[VMDirectory]:
    """The templates that are there, for who asks what they stand on."""
    if host.home.templates.is_dir():
        for path in sorted(host.home.templates.iterdir()):
            if (path / "vm.json").exists():
                yield VMDirectory(path)


# Beginning from one


async def run(host: Host, name: str, names: Sequence[str], number: int, progress: Progress) -> Forked:
    """Make VMs that begin from template `name`, those that are ready first. See `HostApi.run_from`."""
    await event_loop()
    place = get(host, name)
    note = read(place)
    chosen = list(names) or _free_names(host, place, note, number)
    fork.check_names(chosen)
    async with AsyncExitStack() as held:
        places = [await held.enter_async_context(host.store.locked(each, "run")) for each in sorted(chosen)]
        for vm in places:
            fork.make_room(vm)
        began = time.monotonic()
        warm = {vm.name.removeprefix(WARM) for vm in ready(host, note)} & set(chosen)
        cold = [each for each in chosen if each not in warm]
        async with AsyncExitStack() as undo:
            for each in sorted(warm):
                await _take(host, place, each, undo)
            if cold:
                source = await _open(host, place, note, held, progress)
                await fork.begin(host, source, cold, progress, go=True)
            undo.pop_all()
        image = host.images.store.by_id(place.record.image_id)
        return Forked(
            forks=tuple([await host._status(host.store.directory(each)) for each in chosen]),
            pause_s=0.0,
            copy_s=0.0,
            begin_s=time.monotonic() - began,
            same_identity=fork.refusal(image, place.launch()),
        )


async def warm_up(host: Host, name: str, names: Sequence[str], number: int, progress: Progress) -> StoredTemplate:
    """Have VMs ready to begin from template `name`. See `HostApi.template_warm`."""
    await event_loop()
    place = get(host, name)
    note = read(place)
    async with _alone(host):
        there = [vm.name.removeprefix(WARM) for vm in await _swept(host, note)]
        for vm in there[number:] if not names else ():
            await fork.discard(host, host.store.warm(vm))
        wanted = (
            [each for each in names if each not in there]
            if names
            else _free_names(host, place, note, max(0, number - len(there)), besides=there)
        )
        if wanted:
            fork.check_names(wanted)
            async with AsyncExitStack() as held:
                for each in sorted(wanted):
                    fork.make_room(await held.enter_async_context(host.store.locked(each, "warm")))
                source = await _open(host, place, note, held, progress)
                await fork.begun(host, source, wanted, progress, go=False, warm=True)
        return describe(host, place)


def ready(host: Host, note: Note) -> list[VMDirectory]:
    """The VMs that are ready to begin from a template."""
    return [vm for vm in host.store.all_warm() if _template_of(vm) == note.id and vm.alive()]


async def _swept(host: Host, note: Note) -> list[VMDirectory]:
    """Those that are ready; what is left of others, whose process has ended or never had the memory, is removed."""
    kept = []
    for vm in host.store.all_warm():
        if _template_of(vm) not in (note.id, None):
            continue
        state = (await host.drivers.qemu.inspect(vm)).state
        if state is VMState.PAUSED and _template_of(vm):
            kept.append(vm)
        else:
            await fork.discard(host, vm)
    return kept


async def _take(host: Host, place: VMDirectory, name: str, undo: AsyncExitStack) -> None:
    """Make a VM of the one that is ready under this name, whose lock is held, and let it go."""
    vm = host.store.directory(name)
    with storage_errors(f"making VM '{name}'"):
        host.store.warm(name).path.rename(vm.path)
    undo.push_async_callback(fork.discard, host, vm)
    if launch := vm.launch():
        vm.write_launch(replace(launch, started_at=time.time()), durable=False)
    (vm.path / UNBORN).unlink(missing_ok=True)
    source = place.record
    image = host.images.store.by_id(source.image_id)
    if fork.refusal(image, place.launch()) is None:
        tell(vm, identity.to_be_told(vm, source, image))
    await host.drivers.qemu.resume(vm)


async def _open(host: Host, place: VMDirectory, note: Note, held: AsyncExitStack, progress: Progress) -> Source:
    """The template as something to fork from; its open files are closed with `held`."""
    memory = await _shared(host, place, note)
    if memory is None:
        memory = await asyncio.to_thread(_load, place, note, progress)
    held.callback(os.close, memory)
    with storage_errors(f"reading template '{place.name}'"):
        state = os.open(place.path / _STATE, os.O_RDONLY | os.O_CLOEXEC)
    held.callback(os.close, state)
    launch = place.launch()
    assert launch is not None  # noqa: S101 - it was written with the template
    template = Template(memory=memory, state=state, machine=note.machine, vcpus=note.vcpus, pause_s=0.0)
    record = place.record
    image = host.images.store.by_id(record.image_id)
    return Source(vm=place, record=record, launch=launch, template=template, image=image, id=note.id)


def _load(place: VMDirectory, note: Note, progress: Progress) -> int:
    """A sealed file in memory with the content of `memory`; raises PolyvisorError where that is damaged."""
    memory = os.memfd_create(f"{_MEMFD}{note.id}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with storage_errors(f"reading template '{place.name}'"):
            for name in (_MEMORY, _STATE):
                with (place.path / name).open("rb", buffering=0) as file:
                    if _digest(file.fileno(), memory if name == _MEMORY else None, progress) != note.checksums[name]:
                        hint = f"polyvisor template rm {place.name}, and create it again"
                        raise PolyvisorError(f"template '{place.name}' is damaged: its checksum is wrong", hint=hint)
            seal(memory)
            write_atomic(place.path / _INODE, f"{boot_id()} {os.fstat(memory).st_ino}", durable=False)
    except BaseException:
        os.close(memory)
        raise
    return memory


def _digest(file: int, target: int | None, progress: Progress) -> str:
    """The SHA-256 of an open file, which is copied into `target`, holes left as holes."""
    digest, size, done = hashlib.sha256(), os.fstat(file).st_size, 0
    if target is not None:
        os.ftruncate(target, size)
    while piece := os.pread(file, _PIECE, done):
        digest.update(piece)
        if target is not None and piece.strip(b"\0"):
            os.pwrite(target, piece, done)
        done += len(piece)
        progress(Step("reading memory", done, size, "B"))
    return digest.hexdigest()


async def _shared(host: Host, place: VMDirectory, note: Note) -> int | None:
    """The file in memory that VMs which began from the template have, where there is one.

    A guest may have broken out of its QEMU, and what that shows here be another file: it must be the very one, and sealed.
    """
    try:
        boot, inode = (place.path / _INODE).read_text().split()
    except (OSError, ValueError):
        return None
    if boot != boot_id():
        return None
    every = [*host.store.all_warm(), *(host.store.directory(name) for name in host.store.names())]
    for vm in every:
        if _template_of(vm) != note.id or not vm.alive():
            continue
        pid = (await host.drivers.qemu.inspect(vm)).pid
        if pid is not None and (found := _file_of(pid, note.id, int(inode))) is not None:
            return found
    return None


def _file_of(pid: int, template_id: str, inode: int) -> int | None:
    wanted = re.compile(rf"/memfd:{_MEMFD}{template_id}\b")
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            if wanted.match(str(Path(entry.path).readlink())) and entry.stat().st_ino == inode:
                fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
                if os.fstat(fd).st_ino == inode and sealed(fd):
                    return fd
                os.close(fd)
    return None


def _template_of(vm: VMDirectory) -> str | None:
    try:
        launch = vm.launch()
    except PolyvisorError:
        return None
    return launch.template if launch else None


def _free_names(host: Host, place: VMDirectory, note: Note, number: int, besides: Sequence[str] = ()) -> list[str]:
    """`number` names: of those that are ready, then the template's name with the lowest numbers that no VM has."""
    taken = set(host.store.names())
    warm = [] if besides else [name for vm in ready(host, note) if (name := vm.name.removeprefix(WARM)) not in taken]
    others = {vm.name.removeprefix(WARM) for vm in host.store.all_warm()} | taken | set(besides)
    free = (name for name in (f"{place.name}-{i}" for i in count(1)) if name not in others)
    return [*warm[:number], *(name for _, name in zip(range(number - len(warm[:number])), free, strict=False))]


def _directory(host: Host, name: str) -> VMDirectory:
    return VMDirectory(host.home.templates / check_name(name))


@contextlib.asynccontextmanager
async def _alone(host: Host) -> AsyncIterator[None]:
    """Hold the lock on all templates, of which there are few, and which are seldom made."""
    with storage_errors("locking the templates"):
        make_directory(host.home.templates, 0o700)
        fd = os.open(host.home.templates, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        await take_flock(fd)
        yield
    finally:
        os.close(fd)
