"""VMs that begin from a template (see `templates.py`): from its memory, or, where they were made ready, in some milliseconds.

What is ready is a VM but for its place: its process has the memory, and stands still. To begin it is a rename and a word to its
process. Its name is chosen when it is made ready, since its seed, from which its guest boots again, has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from polyvisor.drivers.base import Template
from polyvisor.drivers.qemu.agent import tell
from polyvisor.drivers.qemu.fork import seal, sealed
from polyvisor.drivers.qemu.vm_process import lock_holders, pid_of
from polyvisor.errors import PolyvisorError
from polyvisor.files import storage_errors, sync_directory, write_atomic
from polyvisor.host import fork, identity
from polyvisor.host.fork import Source
from polyvisor.host.record import boot_id
from polyvisor.host.store import UNBORN, WARM, VMDirectory
from polyvisor.host.templates import INODE, MEMORY, STATE, Note, alone, copy, describe, get, read, ready, template_of
from polyvisor.operation import Progress
from polyvisor.status import Forked, StoredTemplate, VMState, VMStatus
from polyvisor.waiting import event_loop

if TYPE_CHECKING:
    from polyvisor.host.host import Host

_MEMFD = "polyvisor-"


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
        forks: tuple[VMStatus, ...] = ()
        async with AsyncExitStack() as undo:
            for each in sorted(warm):
                await _take(host, place, each, undo)
            begun_at = time.monotonic()
            if cold:
                source = await _open(host, place, note, held, progress)
                forks, begun_at = await fork.begin(host, source, cold, progress, go=True)
            with storage_errors("making the VMs durable"):
                sync_directory(host.home.vms)
            undo.pop_all()
        image = host.images.store.by_id(place.record.image_id)
        begun = {each.name: each for each in forks}
        for each in warm:
            begun[each] = await host._status(host.store.directory(each))
        return Forked(
            forks=tuple(begun[each] for each in chosen),
            pause_s=0.0,
            copy_s=0.0,
            begin_s=begun_at - began,
            same_identity=fork.refusal(image, place.launch()),
        )


async def warm_up(host: Host, name: str, names: Sequence[str], number: int, progress: Progress) -> StoredTemplate:
    """Have VMs ready to begin from template `name`. See `HostApi.template_warm`."""
    await event_loop()
    place = get(host, name)
    note = read(place)
    async with alone(host):
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
                await fork.begin(host, source, wanted, progress, go=False, warm=True)
        return describe(host, place)


async def _swept(host: Host, note: Note) -> list[VMDirectory]:
    """Those that are ready; what is left of others, whose process has ended or never had the memory, is removed."""
    kept = []
    for vm in host.store.all_warm():
        if template_of(vm) not in (note.id, None):
            continue
        state = (await host.drivers.qemu.inspect(vm)).state
        if state is VMState.PAUSED and template_of(vm):
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
    memory = _shared(host, place, note)
    if memory is None:
        memory = await asyncio.to_thread(_load, place, note, progress)
    held.callback(os.close, memory)
    with storage_errors(f"reading template '{place.name}'"):
        state = os.open(place.path / STATE, os.O_RDONLY | os.O_CLOEXEC)
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
            for name in (MEMORY, STATE):
                with (place.path / name).open("rb", buffering=0) as file:
                    if (
                        copy(file.fileno(), memory if name == MEMORY else None, progress, "reading memory")
                        != note.checksums[name]
                    ):
                        hint = f"polyvisor template rm {place.name}, and create it again"
                        raise PolyvisorError(f"template '{place.name}' is damaged: its checksum is wrong", hint=hint)
            seal(memory)
            write_atomic(place.path / INODE, f"{boot_id()} {os.fstat(memory).st_ino}", durable=False)
    except BaseException:
        os.close(memory)
        raise
    return memory


def _shared(host: Host, place: VMDirectory, note: Note) -> int | None:
    """The file in memory that VMs which began from the template have, where there is one.

    A guest may have broken out of its QEMU, and what that shows here be another file: it must be the very one, and sealed. So
    it does not matter either whose process is looked at.
    """
    try:
        boot, inode = (place.path / INODE).read_text().split()
    except (OSError, ValueError):
        return None
    if boot != boot_id():
        return None
    every = [*host.store.all_warm(), *(host.store.directory(name) for name in host.store.names())]
    for vm in every:
        if template_of(vm) != note.id or not vm.alive():
            continue
        for pid in _processes(vm):
            if (found := _file_of(pid, note.id, int(inode))) is not None:
                return found
    return None


def _processes(vm: VMDirectory) -> list[int]:
    """The processes that may be that of a VM which is alive: the one in its pid file, or, where none is, who holds its lock."""
    if (pid := pid_of(vm)) is not None:
        return [pid]
    with contextlib.suppress(FileNotFoundError):
        return lock_holders(vm)
    return []


def _file_of(pid: int, template_id: str, inode: int) -> int | None:
    """The file of a template that a process has open, opened again; `pid` may be any number."""
    wanted = re.compile(rf"/memfd:{_MEMFD}{template_id}\b")
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            if wanted.match(os.readlink(entry.path)) and entry.stat().st_ino == inode:  # noqa: PTH115 - quicker
                fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
                if _is_sealed(fd, inode):
                    return fd
                os.close(fd)
    return None


def _is_sealed(fd: int, inode: int) -> bool:
    try:
        return os.fstat(fd).st_ino == inode and sealed(fd)
    except OSError:  # no file in memory
        return False


def _free_names(host: Host, place: VMDirectory, note: Note, number: int, besides: Sequence[str] = ()) -> list[str]:
    """`number` names: of those that are ready, then the template's name with the lowest numbers that no VM has."""
    taken = set(host.store.names())
    warm = [] if besides else [name for vm in ready(host, note) if (name := vm.name.removeprefix(WARM)) not in taken]
    others = {vm.name.removeprefix(WARM) for vm in host.store.all_warm()} | taken | set(besides)
    free = (name for name in (f"{place.name}-{i}" for i in count(1)) if name not in others)
    return [*warm[:number], *(name for _, name in zip(range(number - len(warm[:number])), free, strict=False))]
