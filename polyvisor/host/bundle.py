"""A VM as one file: `polyvisor export`, and what `polyvisor import` does with that.

    magic
    u64 size, image       the image that the VM stands on, as `images/portable.py` writes it
    parcel                the VM itself, as `parcel.py` writes it for a move

Both parts are those that travel between hosts too, and are believed as little. Snapshots and layers stay behind: each disk goes
as one overlay above the image. An imported VM is the one that was exported, with its id, addresses and keys, unless that one is
on this host still: then it is a clone of it.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from polyvisor.errors import AlreadyExists, ConnectionLost, ImageRefused, InvalidInput, NotFound, WrongState
from polyvisor.files import storage_errors
from polyvisor.host import arrival, cloning, disks, moves, moving, parcel, prepare, snapshotting
from polyvisor.host.keys import SSH
from polyvisor.host.moves import Cargo, Move
from polyvisor.host.plan import disk_count, disk_path
from polyvisor.host.record import Record, new_id
from polyvisor.host.store import VMDirectory
from polyvisor.images import portable, unpack
from polyvisor.images.formats import Reader
from polyvisor.images.image import Image
from polyvisor.operation import Progress, Step, silent
from polyvisor.spec.vm import check_name

if TYPE_CHECKING:
    from polyvisor.host.host import Host

T = TypeVar("T")

SUFFIX = ".polyvisor"
MAGIC = b"polyvisor vm 1\n"
_SIZE = struct.Struct(">Q")
_CHUNK = 1 << 20
_ANEW = "export it anew where it came from: polyvisor export"


async def exported(host: Host, name: str) -> AsyncGenerator[bytes]:
    """VM `name`, which must be stopped, as one file, in chunks."""
    host.store.get(name)
    async with AsyncExitStack() as stack:
        vm = await stack.enter_async_context(host.store.locked(name, "export"))
        await snapshotting.ready(host, vm, silent)
        vm = VMDirectory(vm.path)  # its record may be another one now
        await _require_stopped(host, vm)
        place = await _whole(host, vm, stack)
        cargo, paths = await moving.loaded(host, vm, place)
        image = cargo.image
        yield MAGIC + _SIZE.pack(portable.exported_size(image))
        with contextlib.closing(portable.exported(host.images.store, image)) as chunks:
            for chunk in chunks:
                yield chunk
        for chunk in parcel.packed(_move(host, cargo), cargo, paths):
            yield chunk


async def _require_stopped(host: Host, vm: VMDirectory) -> None:
    moves.require_settled(vm, "be exported")
    if await host.drivers.lives(vm) or vm.is_saved():
        state = "saved" if vm.is_saved() else (await host.drivers.of(vm).inspect(vm)).state
        hint = f"stop it, or clone a snapshot of it and export that: polyvisor clone {vm.name} NEW --snapshot NAME"
        raise WrongState(f"VM '{vm.name}' is {state}: only a stopped VM can be exported", hint=hint)


async def _whole(host: Host, vm: VMDirectory, stack: AsyncExitStack) -> Path | None:
    """Where the VM's disks are as one file each, made until the end of `stack`; None where they are so already."""
    record = disks.vm_record(vm)
    await host._tidy_devices(vm)
    if not record.layers:
        return None
    host.home.prepare()
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="export-", dir=host.home.cache)))
    (place / "disks").mkdir(mode=0o700)
    tops = [vm.path / disk.path for disk in disks.disks_of(host, record)]
    await cloning.copy_disks(host, record, tops, place, silent)
    return place


def _move(host: Host, cargo: Cargo) -> Move:
    """What a parcel says of its way; this one's is to whoever takes it in."""
    this, name = moves.host_id(host.home), cargo.spec.name
    return Move(
        token=new_id(),
        vm_id=cargo.id,
        name=name,
        new_name=name,
        source="file",
        source_id=this,
        target="file",
        target_id=this,
    )


# Into a host


async def take_in(host: Host, source: str, name: str | None, progress: Progress) -> str:
    """Make the VM that is in the file `source`; returns its name. Where it fails there is none.

    Raises NotFound, ImageRefused, AlreadyExists, StorageFull, and what keeps it from running here.
    """
    if name is not None:
        check_name(name)
    path = local_path(source)
    host.home.prepare()
    with unpack.open_source(path) as file:
        size, offset = _image_part(file, path.name)
        found = portable.inspect_exported(Reader(file, path.name, offset=offset, size=size))
        coming = parcel.Parcel(_chunks(file, offset + size))
        manifest = await _broken_off(coming.manifest(), path.name)
        cargo = manifest.cargo
        if cargo.image != found.image:
            raise ImageRefused(f"{path.name}: the VM in it stands on another image than the one in it", hint=_ANEW)
        chosen = name or cargo.spec.name
        async with host.store.locked(chosen, "import") as vm:
            if vm.path.exists():
                raise AlreadyExists(f"there is a VM '{chosen}' already", hint="give this one another name: --name NEW")
            image = await _image(host, file, offset, size, cargo.image, path.name, progress)
            record = _record(host, cargo, image, chosen)
            await arrival.check_runs(host, record, image)
            arrival.check_storage(host, cargo.data_bytes)
            progress(Step("importing"))
            move = replace(manifest.move, new_name=chosen)
            await _make(host, vm, record, image, coming, replace(manifest, move=move), path.name)
    return chosen


def check_before_upload(source: str, name: str | None) -> Path:
    """The file `source`, where it begins as an exported VM does; raises NotFound, ImageRefused, InvalidInput."""
    if name is not None:
        check_name(name)
    path = local_path(source)
    with unpack.open_source(path) as file:
        _image_part(file, path.name)
    return path


def local_path(source: str) -> Path:
    """The path that `source` means; raises InvalidInput."""
    if "\0" in source or not source:
        raise InvalidInput("source", source, "is not a path")
    return Path(source).absolute()


async def _make(
    host: Host,
    vm: VMDirectory,
    record: Record,
    image: Image,
    coming: parcel.Parcel,
    manifest: parcel.Manifest,
    shown: str,
) -> None:
    record = replace(record, user=prepare.new_user(host.home))
    with host.images.store.held(image), host.store.creating(vm.name) as staging:
        with storage_errors(f"importing VM '{vm.name}'"):
            (staging.path / SSH).mkdir(mode=0o700)
        await _broken_off(coming.unpack(manifest, staging.path), shown)
        for i in range(disk_count(record.spec, image)):
            backing = host.images.store.file(image, image.disk) if i == 0 and image.disk else None
            await arrival.settle_disk(staging.path / disk_path(i), backing, arrival.disk_size(record.spec, image, i))
        arrival.settle_keys(staging, manifest, image)
        if record.origin is None:
            with storage_errors(f"importing VM '{vm.name}'"):
                prepare.finish(staging, record)
            return
        await cloning.furnish(staging, record, image, host.home.keys, cloning.read_login(staging.path))


def _record(host: Host, cargo: Cargo, image: Image, name: str) -> Record:
    """The record of the VM here: the same one, or a clone where there is one of that id."""
    spec = replace(cargo.spec, name=name)
    record = Record(id=cargo.id, created_at=cargo.created_at, spec=spec, image_id=image.id, memory_mib=cargo.memory_mib)
    if not any(_has_id(host, each, cargo.id) for each in host.store.names()):
        return record
    return replace(record, id=new_id(), created_at=time.time(), spec=cloning.spec_of(spec, name), origin=cargo.id)


def _has_id(host: Host, name: str, vm_id: str) -> bool:
    try:
        return host.store.directory(name).record.id == vm_id
    except NotFound:
        return False


def _image_part(file: BinaryIO, shown: str) -> tuple[int, int]:
    """Size and offset of the image in the file; raises ImageRefused for what is no exported VM."""
    reader = Reader(file, shown)
    if reader.upto(0, len(MAGIC)) != MAGIC:
        hint = "a disk image is taken in by: polyvisor image import" if reader.size else _ANEW
        reader.refuse("it is not an exported VM", hint=hint)
    [size] = reader.unpack(">Q", len(MAGIC))
    offset = len(MAGIC) + _SIZE.size
    if size > reader.size - offset:
        reader.refuse("it is cut off", hint=_ANEW)
    return int(size), offset


async def _image(
    host: Host, file: BinaryIO, offset: int, size: int, image: Image, shown: str, progress: Progress
) -> Image:
    """The image for the VM: one that is here already, or the one in the file, added to the store."""
    if there := arrival.find_image(host.images.store, image):
        return there
    name = image.name if host.images.store.find(image.name) is None else f"{image.name[:50]}-{image.id}"
    with (
        tempfile.TemporaryDirectory(prefix="import-", dir=host.home.cache) as directory,
        _part(file, offset, size, Path(directory, "image"), shown) as part,
        host.images.store.staging() as staging,
    ):
        return await portable.take_in(host.images.store, staging, part, shown, name, progress)


def _part(file: BinaryIO, offset: int, size: int, target: Path, shown: str) -> BinaryIO:
    """A copy of a part of `file`, open for reading: nobody else can change it."""
    with storage_errors(f"importing {shown}"):
        with target.open("xb") as copy:
            file.seek(offset)
            while size > 0 and (chunk := file.read(min(size, _CHUNK))):
                copy.write(chunk)
                size -= len(chunk)
        return target.open("rb")


async def _broken_off(reading: Awaitable[T], shown: str) -> T:
    """What is read from a file has not been cut off by a connection."""
    try:
        return await reading
    except ConnectionLost as error:
        raise ImageRefused(f"{shown}: it is cut off", hint=_ANEW) from error


async def _chunks(file: BinaryIO, offset: int) -> AsyncIterator[bytes]:
    while True:
        file.seek(offset)  # the image is read in between
        with storage_errors("reading the exported VM"):
            chunk = file.read(_CHUNK)
        if not chunk:
            return
        offset += len(chunk)
        yield chunk
