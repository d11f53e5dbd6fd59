"""A stranger's file on its way in: into a file that nobody else can change, unpacked, and as a qcow2 disk of ours.

Each step takes the staging directory in which its result is to lie, which its maker removes.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import BinaryIO

from polyvisor.errors import StorageFull
from polyvisor.images import qemu_img, unpack
from polyvisor.images.formats import Compression, Disk, Reader, compression_of
from polyvisor.images.worker import in_thread
from polyvisor.operation import Progress, Step

DISK = "disk.qcow2"
_MIB = 1 << 20
_TEMPORARY = ("copy", "unpacked")


async def private(
    file: BinaryIO, staging: Path, name: str, files: contextlib.ExitStack, progress: Progress
) -> BinaryIO:
    """`file`, or a copy: what others can change must not change between being inspected and being read."""
    if unpack.is_private(file):
        return file
    target = staging / "copy"
    await in_thread(lambda report: unpack.copy(file, target, name, report), progress)
    return files.enter_context(target.open("rb"))


async def unpacked(
    file: BinaryIO, staging: Path, name: str, files: contextlib.ExitStack, progress: Progress
) -> BinaryIO:
    """`file`, or what is in it where it is compressed as a whole."""
    kind = compression_of(Reader(file, name))
    if kind is None:
        return file
    target = staging / "unpacked"
    if kind is Compression.ZSTD:
        progress(Step("unpack"))
        await unpack.decompress_zstd(file, target, name)
    else:
        await in_thread(lambda report: unpack.decompress(file, kind, target, name, report), progress)
    return files.enter_context(target.open("rb"))


def remove_temporary(staging: Path) -> None:
    """Remove what `private` and `unpacked` have made; what is open stays so."""
    for temporary in _TEMPORARY:
        (staging / temporary).unlink(missing_ok=True)


def display_name(source: str) -> str:
    """The file's name, fit for a message."""
    name = source.rstrip("/").rpartition("/")[2] or source
    return "".join(c if c.isprintable() else "?" for c in name)[:80]


async def convert(disk: Disk, file: BinaryIO, staging: Path, name: str, progress: Progress) -> None:
    """Make `DISK` in `staging` from `disk` in `file`: a whole number of MiB, without any reference to other files."""
    path = unpack.path_of(file)
    progress(Step("check"))
    await qemu_img.check(disk, path, name)
    measured = await qemu_img.measure(disk, path, name)
    if measured.required + unpack.SPARE > (free := shutil.disk_usage(staging).free):
        raise StorageFull(
            f"{name}: it needs {measured.required // _MIB} MiB, the image store has {free // _MIB} MiB left",
            hint="free some space: polyvisor image ls; polyvisor ls; or set POLYVISOR_HOME to a larger disk",
        )
    await qemu_img.convert(disk, path, staging / DISK, measured, name, progress)
    size = (await qemu_img.info(staging / DISK))["virtual-size"]
    if size % _MIB:
        await qemu_img.resize(staging / DISK, -(-size // _MIB) * _MIB)
