"""`fork`: VMs that begin as copies of one that runs, memory and all; what they don't write they share.

The source is copied once, with its disks at the same moment, and goes on (`Driver.template`). Then each fork is made as any VM
is, in a directory of its own, and its process started; when all have the memory they are let go. Until a fork has it, the
file `unborn` lies in its directory: what a command leaves that was killed can't be started, only removed, and the same command
does that. Where one fork fails none remains. See docs/design/fork.md.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from polyvisor.drivers.base import Fork, Observed, Template
from polyvisor.drivers.qemu.agent import has_agent_port
from polyvisor.drivers.qemu.fork import let_go
from polyvisor.drivers.qemu.migration import in_long_mode
from polyvisor.errors import AlreadyExists, InvalidInput, PolyvisorError, Unsupported, WrongState
from polyvisor.files import storage_errors, sync_directory, sync_files
from polyvisor.host import disks, identity, prepare
from polyvisor.host.keys import KNOWN_HOSTS, LOGIN, SSH, Reserve, give_host_key, read_host_key
from polyvisor.host.observed import status_of
from polyvisor.host.plan import (
    FORK_SEED,
    SEED_DISK,
    SEEDED_INITRD,
    UEFI_VARIABLES,
    boot_nics,
    boots_directly,
    shares_initrd,
)
from polyvisor.host.record import Launch, Record, boot_id, new_id
from polyvisor.host.store import FORKING, UNBORN, WARM, VMDirectory
from polyvisor.images.image import Image, Seed
from polyvisor.images.mapped import mapped_kernel
from polyvisor.network.ports import with_free_ports
from polyvisor.operation import Progress, Step
from polyvisor.spec.forward import parse_forward
from polyvisor.spec.vm import Mode, Nic, VMSpec
from polyvisor.status import Forked, VMState, VMStatus
from polyvisor.values import dataclass
from polyvisor.waiting import event_loop

if TYPE_CHECKING:
    from polyvisor.host.host import Host

T = TypeVar("T")
MOST = 1000
NO_AGENT = "image '{image}' has no agent of Polyvisor's"
NO_PORT = "it was started by an older Polyvisor, or another hypervisor, without a port for its agent"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What forks are made from: a VM's record and launch record, its directory, and its memory.

    `id` is that of the stored template, where it is one.
    """

    vm: VMDirectory
    record: Record
    launch: Launch
    template: Template
    image: Image
    id: str | None = None

    @property
    def refusal(self) -> str | None:
        return refusal(self.image, self.launch)


def refusal(image: Image, launch: Launch | None) -> str | None:
    """Why a guest that was started so can't be told who it is, or None."""
    if not image.agent:
        return NO_AGENT.format(image=image.name)
    return None if launch and has_agent_port(launch.argv) else NO_PORT


async def fork(host: Host, name: str, names: Sequence[str], progress: Progress) -> Forked:
    """Make the VMs `names` from VM `name`, which runs or is paused, as they are to be. See `HostApi.fork`."""
    await event_loop()
    check_names(names)
    if name in names:
        raise _there_is(name)
    async with AsyncExitStack() as held:
        vm = await held.enter_async_context(host.store.locked(name, "fork"))
        runs = await require_forkable(host, vm)
        places = [await held.enter_async_context(host.store.locked(each, "fork")) for each in sorted(names)]
        for place in places:
            make_room(place)
        began = time.monotonic()
        source = await take(host, vm, progress, runs=runs)
        held.callback(os.close, source.template.memory)
        held.callback(os.close, source.template.state)
        copied = time.monotonic()
        forks, begun_at = await begin(host, source, names, progress, go=runs)
        return Forked(
            forks=forks,
            pause_s=source.template.pause_s,
            copy_s=copied - began,
            begin_s=begun_at - copied,
            same_identity=source.refusal,
        )


def check_names(names: Sequence[str]) -> None:
    """Raise InvalidInput where forks can't have these names."""
    from polyvisor.spec.vm import check_name

    if not names:
        raise InvalidInput("names", "", "no fork is named", hint="name one or more")
    if len(names) > MOST:
        raise InvalidInput("count", len(names), "are too many forks at once", hint=f"use 1 to {MOST}")
    for name in names:
        check_name(name)
        if names.count(name) > 1:
            raise InvalidInput("names", name, "stands twice", hint="name each fork once")


async def require_forkable(host: Host, vm: VMDirectory) -> bool:
    """Whether a VM that can be forked is to go on running afterwards; raises NotFound, Unsupported, WrongState."""
    if not vm.path.is_dir():
        host.store.get(vm.name)  # raises
    if reason := (await host._capabilities_of(vm)).missing.get("fork"):
        raise Unsupported(f"VM '{vm.name}' can't be forked: {reason}")
    await host._require_whole(vm, "be forked")
    await host._require_devices_in_force(vm, "be forked")
    state = (await host.drivers.of(vm).inspect(vm)).state
    if state not in (VMState.RUNNING, VMState.PAUSED):
        raise WrongState(f"VM '{vm.name}' is {state}: it can't be forked", hint=f"polyvisor kill {vm.name}")
    return state is VMState.RUNNING or vm.is_forking()


def make_room(place: VMDirectory) -> None:
    """Raise AlreadyExists for a VM that has the name of a fork, unless it was to be one, and that was cut off."""
    if not place.path.is_dir():
        return
    if not place.is_unborn():
        raise _there_is(place.name)


def _there_is(name: str) -> AlreadyExists:
    return AlreadyExists(f"there is a VM '{name}' already", hint=f"choose another name, or: polyvisor rm {name}")


async def take(host: Host, vm: VMDirectory, progress: Progress, *, runs: bool) -> Source:
    """Copy the memory of a VM and freeze its disks, at one moment; it goes on afterwards where it `runs`.

    Its lock is held. The files of the template are the caller's to close.
    """
    progress(Step("copying memory"))
    note = vm.path / FORKING
    host._let_run(vm)
    if runs:
        note.touch(mode=0o600)

    async def at_pause() -> None:
        await disks.freeze(host, vm)

    record = disks.vm_record(vm)
    has_disks = bool(disks.disks_of(host, record))
    try:
        template = await host.drivers.of(vm).template(
            vm, record.user, progress, runs=runs, at_pause=at_pause if has_disks else None
        )
    except PolyvisorError as error:
        error.about(f"VM '{vm.name}' was not forked")
        if (await host.drivers.of(vm).inspect(vm)).state is not VMState.PAUSED:
            note.unlink(missing_ok=True)
        raise
    note.unlink(missing_ok=True)
    record, launch = disks.vm_record(vm), vm.launch()
    assert launch is not None  # noqa: S101 - it is alive
    return Source(
        vm=vm, record=record, launch=launch, template=template, image=host.images.store.by_id(record.image_id)
    )


async def begin(
    host: Host, source: Source, names: Sequence[str], progress: Progress, *, go: bool, warm: bool = False
) -> tuple[tuple[VMStatus, ...], float]:
    """Make a fork of each of these names, whose locks are held, and, with `go`, let them go once all have the memory.

    Returns how they are, in this order, and when (time.monotonic) the last was let go. What is `warm` is no VM so far.
    """
    done = 0

    async def one(name: str) -> tuple[VMDirectory, Observed]:
        nonlocal done
        async with turns:
            fork = await make(host, source, name, undo, shared=initrd is not None, warm=warm)
            observed = await start(host, source, fork, kernel, initrd, together=len(names), go=alone, warm=warm)
        done += 1
        progress(Step("forking", done, len(names), ""))
        return fork, observed

    # One whose firmware is at work may be handed its kernel and initrd at this moment: then they stay those.
    kernel, initrd = None, None
    if in_long_mode(source.template.state):
        kernel, initrd = await asyncio.to_thread(_shared_files, host, source)
    alone = go and len(names) == 1
    turns = asyncio.Semaphore((os.cpu_count() or 1) + 1)
    async with Reserve(host.home.keys) as reserve, AsyncExitStack() as undo:
        made = await _together([one(name) for name in names])
        forks = [fork for fork, _ in made]
        if go and not alone:
            # Many that run leave the host little time to wait for its disk.
            await _make_durable(host, forks)
            await let_go(forks)
            made = [(fork, replace(observed, state=VMState.RUNNING)) for fork, observed in made]
        begun_at = time.monotonic()
        if len(names) == 1:  # many don't wait for one another's keys
            reserve.begin()
        if alone or not go:
            await _make_durable(host, forks)
        undo.pop_all()
    return tuple(status_of(fork, observed) for fork, observed in made), begun_at


async def make(
    host: Host, source: Source, name: str, undo: AsyncExitStack, *, shared: bool, warm: bool = False
) -> VMDirectory:
    """Make the directory of the fork `name`, whose lock is held, with disks above those of the source.

    Where the initrd is `shared`, it gets none of its own.
    """
    record = Record(
        id=new_id(),
        created_at=time.time(),
        spec=forked_spec(source.record.spec, name),
        image_id=source.record.image_id,
        memory_mib=source.record.memory_mib,
        user=prepare.new_user(host.home),
        layers=source.record.layers,
        disk_numbers=source.record.disk_numbers,
        nic_numbers=source.record.nic_numbers,
        slots=source.record.slots,
    )
    fork = host.store.warm(name) if warm else host.store.directory(name)
    await discard(host, fork)  # what is left of one that was cut off
    with host.store.creating(name, durable=False, warm=warm) as staging:
        (staging.path / UNBORN).touch(mode=0o600)
        layers = [host.layers.get(layer) if layer else None for layer in record.layers]
        await disks.make_overlays(host, staging.path, record, layers, durable=False)
        await _give_keys(host, source, staging, record)
        _copy_files(source, staging)
        prepare.finish(staging, record)
    undo.push_async_callback(discard, host, fork)
    mode = Mode(source.launch.mode)
    await prepare.refresh(fork, record, source.image, host.images.store, host.home.keys, mode, shared=shared)
    return fork


async def discard(host: Host, fork: VMDirectory) -> None:
    """Remove a fork, whose process may run by now."""
    if not fork.path.is_dir():
        return
    await host.drivers.qemu.kill(fork)
    with storage_errors(f"removing {fork.path}"):
        fork.path.rename(gone := fork.path.with_name(f".gone-{fork.name.removeprefix(WARM)}"))
        shutil.rmtree(gone)


def forked_spec(spec: VMSpec, name: str) -> VMSpec:
    """The spec of a fork: addresses and ports of the host are its own."""
    return replace(spec, name=name, nics=tuple(_forked_nic(nic) for nic in spec.nics))


def _forked_nic(nic: Nic) -> Nic:
    asked = [parse_forward(text) for text in nic.forwards]
    return replace(nic, mac=None, forwards=tuple(str(replace(forward, host_port=0)) for forward in asked))


async def _give_keys(host: Host, source: Source, fork: VMDirectory, record: Record) -> None:
    """A host key of the fork's own, where its guest can be given it; otherwise the source's, which it goes on showing."""
    known = fork.path / KNOWN_HOSTS
    if source.image.seed is Seed.NONE or source.refusal:
        with storage_errors("copying the host key"):
            shutil.copytree(source.vm.path / SSH, fork.path / SSH)
            lines = known.read_text().splitlines(keepends=True) if known.exists() else []
            known.write_text("".join(f"{record.spec.name} {line.partition(' ')[2]}" for line in lines))
        return
    await give_host_key(fork.path, host.home.keys)
    with storage_errors("writing the host key"):
        known.write_text(f"{record.spec.name} {read_host_key(fork.path).public}\n")
        if (source.vm.path / LOGIN).exists():  # the guest lets nobody else in
            shutil.copyfile(source.vm.path / LOGIN, fork.path / LOGIN)
            (fork.path / LOGIN).chmod(0o600)


def _copy_files(source: Source, fork: VMDirectory) -> None:
    """The files beside disks that its process opens: the seed, from which the guest may be reading, and UEFI variables."""
    with storage_errors(f"copying what VM '{source.vm.name}' boots with"):
        for place in (SEED_DISK, UEFI_VARIABLES):
            if (source.vm.path / place).exists():
                shutil.copyfile(source.vm.path / place, fork.path / place)
                (fork.path / place).chmod(0o600)


async def start(
    host: Host,
    source: Source,
    fork: VMDirectory,
    kernel: Path | None,
    initrd: Path | None,
    *,
    together: int = 1,
    go: bool,
    warm: bool = False,
) -> Observed:
    """Start the process of a fork, and let it have the memory; with `go` it runs. A `warm` one is not a VM so far.

    `kernel` and `initrd` are what the guest boots by from then on, where they are not its own.
    """
    driver, record = host.drivers.qemu, fork.record

    async def launch() -> Observed:
        nics = boot_nics(record, None, str(host.home.path))
        wanted = Fork(
            name=record.spec.name,
            id=record.id,
            together=together,
            nics=nics,
            disks=disks.disks_of(host, record),
            kernel=kernel,
            initrd=initrd,
            seed=FORK_SEED if initrd else None,
        )
        command = await driver.fork_command(source.launch, source.template, wanted)

        def meanwhile() -> bytes:
            """What its process need not wait for; where we are killed before, the file `unborn` says enough."""
            fork.write_launch(
                replace(
                    source.launch,
                    started_at=time.time(),
                    boot_id=boot_id(),
                    reason=f"forked from {source.vm.name}: {source.launch.reason}",
                    version=command.version,
                    argv=command.argv,
                    forwards=tuple(forward for nic in nics for forward in nic.forwards),
                    template=source.id,
                ),
                durable=False,
            )
            return b"" if warm else _told(source, fork)

        born = _nothing if warm else _born(fork)
        return await driver.fork(
            fork, command, record.user, source.template, source.launch.resources, meanwhile, born, go=go
        )

    return await with_free_ports(launch)


def _shared_files(host: Host, source: Source) -> tuple[Path | None, Path | None]:
    """The kernel and the initrd of the source's image, as far as its forks share them."""
    image, mode, store = source.image, Mode(source.launch.mode), host.images.store
    kernel = mapped_kernel(store, image) if boots_directly(image, mode) else None
    return kernel, store.file(image, image.initrd) if image.initrd and shares_initrd(image, mode) else None


def _nothing() -> None:
    """A fork that is warm is not born before it is taken."""


def _told(source: Source, fork: VMDirectory) -> bytes:
    if source.refusal:
        return b""
    return identity.to_be_told(fork, source.record, source.image)


def _born(fork: VMDirectory) -> Callable[[], None]:
    """Note that the fork has all of its memory: from now on it is a VM like any other."""
    return lambda: (fork.path / UNBORN).unlink(missing_ok=True)


async def _make_durable(host: Host, forks: Sequence[VMDirectory]) -> None:
    """See to it that the forks are VMs after a power cut too.

    Some wait at a time: the disk takes as long for all of these as for one, and for a hundred one by one seconds.
    """
    await _together([asyncio.to_thread(_sync, fork) for fork in forks])
    with storage_errors("writing the forks to the disk"):
        await asyncio.to_thread(sync_files, *(path for path in [host.home.next_user] if path.exists()))
        await asyncio.to_thread(sync_directory, host.home.vms)


def _sync(fork: VMDirectory) -> None:
    """Make what is in a fork's directory durable, but for what a start makes anew."""
    with storage_errors("writing the forks to the disk"):
        sync_files(*(path for path in fork.path.rglob("*") if path.name != SEEDED_INITRD.name and path.is_file()))
        for directory in (fork.path, fork.disks):
            sync_directory(directory)


async def _together(work: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """What each of them returns; where one fails the others are given up, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as failed:
        first: BaseException = failed
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from failed
    return [task.result() for task in tasks]
