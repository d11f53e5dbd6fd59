"""Clones: a new VM whose disks are what another one's were, when that was stopped or at one of its snapshots.

A linked clone stands on the source's frozen layers, which stay for as long as it does, whatever becomes of the source; a full
one has all in its own overlay, above the image. It is another VM to everybody: its own id (which network addresses and
cloud-init go by), name, host key and user. Ports of the host are the source's; the clone takes free ones in their place.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.errors import AlreadyExists, InvalidInput, StorageFull, WrongState
from polyvisor.files import storage_errors, write_new
from polyvisor.host import disks, prepare, snapshots, snapshotting
from polyvisor.host.keys import LOGIN, SSH
from polyvisor.host.moves import require_settled
from polyvisor.host.plan import UEFI_VARIABLES, disk_path
from polyvisor.host.record import Record, new_id
from polyvisor.host.store import VMDirectory
from polyvisor.images import qemu_img
from polyvisor.images.image import Image
from polyvisor.images.unpack import SPARE
from polyvisor.operation import Progress
from polyvisor.spec.forward import parse_forward
from polyvisor.spec.vm import Nic, VMSpec, check_name
from polyvisor.storage.layers import virtual_size

if TYPE_CHECKING:
    from polyvisor.host.host import Host

_MIB = 1 << 20


async def clone(host: Host, name: str, new_name: str, snapshot: str | None, full: bool, progress: Progress) -> None:
    """Make VM `new_name`, stopped, of VM `name` as it is, or of one of its snapshots.

    Raises AlreadyExists, NotFound, WrongState for a VM that is not stopped, StorageFull. Where it fails there is no clone.
    """
    check_name(new_name)
    if name == new_name:
        raise InvalidInput("name", new_name, "is the VM's own", hint="choose another name for the clone")
    host.store.get(name)
    async with AsyncExitStack() as locks:
        # Always in the same order, so that two who clone each other's VMs never wait for each other.
        held = {each: await locks.enter_async_context(_locked(host, each)) for each in sorted((name, new_name))}
        source, target = held[name], held[new_name]
        if target.path.exists():
            raise AlreadyExists(f"there is a VM '{new_name}' already", hint="choose another name for the clone")
        await snapshotting.ready(host, source, progress)
        files, record, tops = await _source(host, source, snapshot, full)
        made = replace(
            record,
            id=new_id(),
            created_at=time.time(),
            spec=spec_of(record.spec, new_name),
            user=prepare.new_user(host.home),
            generation=0,
            snapshot=None,
            origin=record.id,
        )
        login = read_login(source.path)
        await _make(host, made, files, tops if full else None, login, progress)


def spec_of(spec: VMSpec, name: str) -> VMSpec:
    """The spec of a clone: without addresses and ports that are the source's."""
    return replace(spec, name=name, nics=tuple(map(_other_nic, spec.nics)))


def _other_nic(nic: Nic) -> Nic:
    forwards = tuple(str(replace(parse_forward(text), host_port=0)) for text in nic.forwards)
    return replace(nic, mac=None, forwards=forwards)


def _locked(host: Host, name: str) -> AbstractAsyncContextManager[VMDirectory]:
    return host.store.locked(name, "clone")


async def _source(host: Host, vm: VMDirectory, snapshot: str | None, full: bool) -> tuple[Path, Record, list[Path]]:
    """Where the source's UEFI variables are, its record with the layers to stand on, and the overlays above these, if any.

    To share what a stopped VM's disks hold, they are frozen; a full clone reads them as they are.
    """
    if snapshot is not None:
        kept = snapshots.read(vm, snapshot)
        snapshotting.require_same_disks(host, vm, kept)
        return snapshots.directory(vm, snapshot), replace(disks.vm_record(vm), layers=kept.layers), []
    require_settled(vm, "be cloned")
    if await host.drivers.lives(vm) or vm.is_saved():
        state = "saved" if vm.is_saved() else (await host.drivers.of(vm).inspect(vm)).state
        hint = f"stop it, or clone a snapshot of it: polyvisor snapshot create {vm.name}"
        raise WrongState(f"VM '{vm.name}' is {state}: only a stopped VM can be cloned", hint=hint)
    await host._tidy_devices(vm)
    record = disks.vm_record(vm) if full else await disks.freeze(host, vm)
    return vm.path, record, [vm.path / disk.path for disk in disks.disks_of(host, record)]


async def _make(
    host: Host, record: Record, files: Path, tops: list[Path] | None, login: str | None, progress: Progress
) -> None:
    """Make the clone; it gets disks of its own where `tops` are the overlays to copy, above its layers."""
    image, store = host.images.store.by_id(record.image_id), host.images.store
    name = record.spec.name
    with ExitStack() as held:
        held.enter_context(store.held(image))
        held.enter_context(host.layers.held(*record.layers))
        staging = held.enter_context(host.store.creating(name))
        if tops is not None:
            await copy_disks(host, record, tops, staging.path, progress)
            record = replace(record, layers=())
        else:
            layers = [host.layers.get(layer) if layer else None for layer in record.layers]
            await disks.make_overlays(host, staging.path, record, layers)
        if (files / UEFI_VARIABLES).exists():
            with storage_errors(f"making VM '{name}'"):
                snapshotting.copy(files / UEFI_VARIABLES, staging.path / UEFI_VARIABLES)
        await furnish(staging, record, image, host.home.keys, login)


async def furnish(staging: VMDirectory, record: Record, image: Image, keys: Path, login: str | None) -> None:
    """Put all but its disks into a clone's directory: a host key of its own, and the key that the guest lets in, if any."""
    with storage_errors(f"making VM '{record.spec.name}'"):
        shutil.rmtree(staging.path / SSH, ignore_errors=True)
    await prepare.furnish(staging, record, image, keys)
    if login is not None:
        with storage_errors(f"making VM '{record.spec.name}'"):
            write_new(staging.path / LOGIN, login)


def read_login(directory: Path) -> str | None:
    """The key that the guest of a VM lets in, where that VM came from another host."""
    with storage_errors("reading the VM's key"):
        return (directory / LOGIN).read_text() if (directory / LOGIN).exists() else None


async def copy_disks(host: Host, record: Record, tops: list[Path], directory: Path, progress: Progress) -> None:
    """Write into `directory` the disks of `record`, each as one overlay above the image that holds all that is its own.

    `tops` are the files above its layers, one for each disk, or none.
    """
    for i, disk in enumerate(disks.disks_of(host, replace(record, generation=0))):
        chain = [*tops[i : i + 1], *disk.layers]
        check_room(directory, chain, record.spec.name)
        size = virtual_size(chain[0])
        await qemu_img.flatten(chain, disk.backing, target := directory / disk_path(disk.number), size, progress)
        if i < len(record.spec.disks):  # it may have grown since what is copied was frozen
            await disks.grow(target, record.spec.disks[i].size_gib)


def check_room(directory: Path, chain: Sequence[Path], name: str) -> None:
    """Raise StorageFull where what is in the files of a disk does not fit beside `directory`."""
    needed = sum(path.stat().st_blocks * 512 for path in chain)
    if needed + SPARE > (free := shutil.disk_usage(directory).free):
        raise StorageFull(
            f"VM '{name}' may need {needed // _MIB} MiB, the disk has {free // _MIB} MiB left",
            hint="free some space: polyvisor ls; polyvisor image ls",
        )
