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
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

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
from polyvisor.host import disks, fork
from polyvisor.host.fork import Source
from polyvisor.host.keys import SSH
from polyvisor.host.plan import SEED_DISK, UEFI_VARIABLES
from polyvisor.host.record import FORMAT, checked, new_id
from polyvisor.host.store import WARM, VMDirectory
from polyvisor.operation import Progress, Step
from polyvisor.spec.parse import structure, unstructure
from polyvisor.spec.vm import check_name
from polyvisor.status import StoredTemplate
from polyvisor.values import dataclass
from polyvisor.waiting import event_loop

if TYPE_CHECKING:
    from polyvisor.host.host import Host

_PIECE = 8 << 20
MEMORY, STATE, _NOTE, INODE = "memory", "state", "template.json", "inode"


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
        await held.enter_async_context(alone(host))
        place = directory(host, name)
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
                file: await asyncio.to_thread(_write, fd, staging.path / file, progress)
                for file, fd in ((MEMORY, template.memory), (STATE, template.state))
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


def _write(source: int, target: Path, progress: Progress) -> str:
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        return copy(source, fd, progress, "writing memory")
    finally:
        os.close(fd)


def copy(source: int, target: int | None, progress: Progress, phase: str) -> str:
    """Copy an open file into another, zeroes as holes, or only read it; returns its SHA-256. Raises OSError."""
    digest, size, done = hashlib.sha256(), os.fstat(source).st_size, 0
    if target is not None:
        os.ftruncate(target, size)
    while piece := os.pread(source, _PIECE, done):
        digest.update(piece)
        if target is not None and piece.strip(b"\0"):
            os.pwrite(target, piece, done)
        done += len(piece)
        progress(Step(phase, done, size, "B"))
    return digest.hexdigest()


def listed(host: Host) -> list[StoredTemplate]:
    try:
        names = sorted(path.name for path in host.home.templates.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        with contextlib.suppress(NotFound):
            found.append(describe(host, get(host, name)))
    return found


def get(host: Host, name: str) -> VMDirectory:
    """The directory of a template; raises NotFound, with the names of those that are there."""
    place = directory(host, name)
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
    place = directory(host, name)
    async with alone(host):
        if not place.path.is_dir():
            get(host, name)  # raises
        with contextlib.suppress(PolyvisorError):
            template_id = read(place).id
            for vm in host.store.all_warm():
                if template_of(vm) in (template_id, None):
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


def ready(host: Host, note: Note) -> list[VMDirectory]:
    """The VMs that are ready to begin from a template."""
    return [vm for vm in host.store.all_warm() if template_of(vm) == note.id and vm.alive()]


def template_of(vm: VMDirectory) -> str | None:
    try:
        launch = vm.launch()
    except PolyvisorError:
        return None
    return launch.template if launch else None


def directory(host: Host, name: str) -> VMDirectory:
    return VMDirectory(host.home.templates / check_name(name))


@contextlib.asynccontextmanager
async def alone(host: Host) -> AsyncIterator[None]:
    """Hold the lock on all templates, of which there are few, and which are seldom made."""
    with storage_errors("locking the templates"):
        make_directory(host.home.templates, 0o700)
        fd = os.open(host.home.templates, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        await take_flock(fd)
        yield
    finally:
        os.close(fd)
