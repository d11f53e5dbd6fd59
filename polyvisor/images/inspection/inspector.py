"""Inspecting an image of the store, or a file: opened and inspected as an import would be, then read, in a thread."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from polyvisor.errors import ImageRefused
from polyvisor.files import storage_errors
from polyvisor.images import portable, unpack
from polyvisor.images.formats import Format, Reader, inspect, parse_format
from polyvisor.images.formats.guest import GuestDisk
from polyvisor.images.image import Image
from polyvisor.images.importer import local_path
from polyvisor.images.incoming import DISK, convert, display_name, private, remove_temporary, unpacked
from polyvisor.images.inspection.budget import Budget
from polyvisor.images.inspection.examine import Direct, Read, examine
from polyvisor.images.inspection.findings import Findings, Inspection
from polyvisor.images.inspection.initrd import MAX_INITRD
from polyvisor.images.inspection.kernel import MAX_KERNEL
from polyvisor.images.inspection.verdicts import verdicts
from polyvisor.images.store import ImageStore
from polyvisor.images.worker import in_thread
from polyvisor.operation import Progress, Step, silent


async def inspect_stored(store: ImageStore, image: Image, progress: Progress = silent) -> Inspection:
    """What `image` of the store can boot in.

    Raises ImageRefused, NotFound (it was removed just now), StorageFull, Unavailable (no qemu-img, where it is needed).
    """
    with store.held(image):
        return await _inspect_image(store, store.directory(image), image, image.name, progress)


async def inspect_file(
    store: ImageStore,
    path: str,
    progress: Progress = silent,
    *,
    format: str | None = None,  # noqa: A002 (as users call it)
) -> Inspection:
    """What the disk image, or exported image, in a file of this machine can boot in; `store` has room for what it takes.

    Raises NotFound, InvalidInput, NotPermitted, ImageRefused, StorageFull, Unavailable.
    """
    expected = None if format is None else parse_format(format)
    name = display_name(path)
    with unpack.open_source(local_path(path)) as file, contextlib.ExitStack() as files:
        staging = files.enter_context(store.staging())
        file = await private(file, staging, name, files, progress)
        file = await unpacked(file, staging, name, files, progress)
        remove_temporary(staging)
        if portable.is_exported(Reader(file, name)):
            return await _inspect_exported(store, staging, file, name, path, progress)
        async with _disk(staging, file, name, expected, progress) as (read, size):
            return await _examined(path, name, read, size, None, progress)


async def _inspect_exported(
    store: ImageStore, staging: Path, file: BinaryIO, name: str, path: str, progress: Progress
) -> Inspection:
    found = await in_thread(lambda report: portable.inspect_exported(Reader(file, name)), progress)
    portable.check_room(found.image, staging, name)
    await in_thread(lambda report: portable.unpack_files(file, found, staging, name, report), progress)
    return await _inspect_image(store, staging, found.image, path, progress)


async def _inspect_image(
    store: ImageStore, directory: Path, image: Image, shown: str, progress: Progress
) -> Inspection:
    """What an image, whose files are in `directory`, can boot in."""
    direct = await in_thread(lambda report: _direct(directory, image), progress)
    if image.disk is None:
        return await _examined(shown, image.name, None, 0, direct, progress)
    with unpack.open_source(directory / image.disk.name) as file, store.staging() as staging:
        async with _disk(staging, file, image.name, Format.QCOW2, progress) as (read, size):
            return await _examined(shown, image.name, read, size, direct, progress)


def _direct(directory: Path, image: Image) -> Direct | None:
    """The kernel of an image with its initramfs; raises ImageRefused where they are absurdly large."""
    if image.kernel is None:
        return None
    with storage_errors(f"reading image '{image.name}'"):
        for file, limit in ((image.kernel, MAX_KERNEL), (image.initrd, MAX_INITRD)):
            if file is not None and (directory / file.name).stat().st_size > limit:
                raise ImageRefused(f"image '{image.name}': {file.name} has more than {limit >> 20} MiB")
        return Direct(
            name=image.kernel.name,
            kernel=(directory / image.kernel.name).read_bytes(),
            cmdline=image.cmdline,
            initrd_name=image.initrd.name if image.initrd else None,
            initrd=(directory / image.initrd.name).read_bytes() if image.initrd else None,
        )


@contextlib.asynccontextmanager
async def _disk(
    staging: Path, file: BinaryIO, name: str, expected: Format | None, progress: Progress
) -> AsyncIterator[tuple[Read, int]]:
    """The disk in `file`, as its guest would read it, and its size.

    raw and most qcow2 are read where they lie; what Python can't unpack, and other formats, qemu-img converts first.
    """
    disk = await in_thread(lambda report: inspect(Reader(file, name), expected), progress)
    if disk.format is Format.RAW:
        yield Reader(file, name).upto, Reader(file, name).size
        return
    if disk.format is Format.QCOW2:
        with GuestDisk(Path(unpack.path_of(file)), name) as guest:
            if guest.readable:
                yield guest.read, guest.size
                return
    await convert(disk, file, staging, name, progress)
    with GuestDisk(staging / DISK, name) as guest:
        yield guest.read, guest.size


async def _examined(
    shown: str, name: str, read: Read | None, size: int, direct: Direct | None, progress: Progress
) -> Inspection:
    def work(report: Progress) -> Findings:
        return examine(name, read, size, direct, Budget(alive=lambda: report(Step("inspect"))))

    with storage_errors(f"reading {name}"):
        findings = await in_thread(work, progress)
    return Inspection(image=shown, verdicts=verdicts(findings), findings=findings)
