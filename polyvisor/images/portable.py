"""An image as one file, to be carried to other machines: `polyvisor image export`, and what `import` does with that.

It is an uncompressed tar archive: the manifest as in the store (`image.json`) comes first, then the image's files.
Whoever takes one in believes nothing: the manifest is read strictly, the archive must hold what the manifest names and nothing
else, each file must have the size and the checksum that it says, and the disk must stand alone. The files stay as they
are: an image is the same, with the same id, wherever it was copied to. See docs/design/untrusted-images.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from polyvisor.errors import AlreadyExists, InvalidInput, NotFound, PolyvisorError, StorageFull
from polyvisor.files import storage_errors
from polyvisor.images import qemu_img, unpack
from polyvisor.images.formats import Reader, qcow2
from polyvisor.images.formats.tar import MAGIC, MAGIC_OFFSET, Member, members
from polyvisor.images.image import Image, ImageFile, image_to_json
from polyvisor.images.manifest import MANIFEST, MAX_MANIFEST, parse_manifest
from polyvisor.images.store import ImageStore, check_image_name
from polyvisor.images.worker import in_thread
from polyvisor.operation import Progress, Step
from polyvisor.values import dataclass

SUFFIX = ".polyvisor.tar"
_CHUNK = 1 << 20
_SECTOR = 512
_END = bytes(2 * _SECTOR)
_MIB = 1 << 20
_ANEW = "export it anew where it came from: polyvisor image export"


# From the store


def exported_size(image: Image) -> int:
    """How large `image` is as one file, in bytes."""
    sizes = (len(image_to_json(image).encode()), *(file.size for file in image.files))
    return sum(_SECTOR + size + -size % _SECTOR for size in sizes) + len(_END)


def exported(store: ImageStore, image: Image) -> Generator[bytes]:
    """The bytes of `image` as one file, `exported_size` of them; raises NotFound where it was removed just now.

    All files are open before the first byte comes: an image that is removed meanwhile arrives whole all the same.
    """
    with contextlib.ExitStack() as stack:
        files = [(file, stack.enter_context(_opened(store, image, file))) for file in image.files]
        manifest = image_to_json(image).encode()
        yield _header(MANIFEST, len(manifest), image) + manifest + bytes(-len(manifest) % _SECTOR)
        for file, source in files:
            yield _header(file.name, file.size, image)
            yield from _content(source, file.size, file.name)
            yield bytes(-file.size % _SECTOR)
        yield _END


def _opened(store: ImageStore, image: Image, file: ImageFile) -> BinaryIO:
    path = store.file(image, file)
    try:
        opened = path.open("rb")
    except FileNotFoundError as error:
        raise NotFound(f"image '{image.name}' has just been removed, or lacks its file {path}") from error
    if (size := os.fstat(opened.fileno()).st_size) != file.size:
        opened.close()
        raise PolyvisorError(
            f"image '{image.name}': {path} has {size} bytes, not {file.size}", hint="it is damaged: make the image anew"
        )
    return opened


def _header(name: str, size: int, image: Image) -> bytes:
    """A tar header; sizes from 8 GiB on are written in base 256, as GNU tar does."""
    import tarfile

    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, int(image.created_at)
    return info.tobuf(tarfile.GNU_FORMAT)


def _content(source: BinaryIO, size: int, name: str) -> Iterator[bytes]:
    """`size` bytes of an open file, from where it stands; raises PolyvisorError where it ends before."""
    while size > 0:
        with storage_errors(f"reading {name}"):
            chunk = source.read(min(size, _CHUNK))
        if not chunk:
            raise PolyvisorError(f"{name} ended {size} bytes before its end", hint="something is changing it")
        size -= len(chunk)
        yield chunk


# Into the store


@dataclass(frozen=True)
class Exported:
    """An image as one file, looked at: the manifest is sound, and the archive has the files that it names."""

    image: Image
    members: dict[str, Member]


def is_exported(reader: Reader) -> bool:
    """Whether the file begins as an exported image does: a tar archive whose first member is the manifest."""
    head = reader.upto(0, _SECTOR)
    named = head[:100].split(b"\0", 1)[0] == MANIFEST.encode()
    return named and head[MAGIC_OFFSET : MAGIC_OFFSET + len(MAGIC)] == MAGIC


def inspect_exported(reader: Reader) -> Exported:
    """What is in the file; raises ImageRefused where it is not what `exported` writes."""
    found = {member.name: member for member in members(reader, remedy=_ANEW)}
    if (manifest := found.pop(MANIFEST, None)) is None:
        reader.corrupt("it has no manifest")
    if manifest.size > MAX_MANIFEST:
        reader.corrupt("a manifest of absurd size")
    try:
        image = parse_manifest(reader.at(manifest.offset, manifest.size, "manifest"))
        check_image_name(image.name)
    except InvalidInput as error:
        reader.refuse(f"its manifest can't be used: {error.message}", hint=error.hint or _ANEW)
    expected = {file.name: file.size for file in image.files}
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            reader.refuse(f"it lacks the file {name} that its manifest names", hint=_ANEW)
        if name not in expected:
            reader.refuse(f"it contains {name}, which its manifest does not name", hint=_ANEW)
        if found[name].size != expected[name]:
            reader.refuse(f"{name} has {found[name].size} bytes; its manifest says {expected[name]}", hint=_ANEW)
    return Exported(image, found)


async def take_in(
    store: ImageStore, staging: Path, file: BinaryIO, shown: str, name: str | None, progress: Progress
) -> Image:
    """Add the exported image in the open `file`, called `shown` in errors, to the store, as `name` if that is given.

    Raises ImageRefused, StorageFull, and AlreadyExists where another image has the name that this one gives itself.
    """
    found = await in_thread(lambda report: inspect_exported(Reader(file, shown)), progress)
    image = found.image if name is None else replace(found.image, name=name)
    if name is None and (there := store.find(image.name)) and not there.same_as(image):
        raise AlreadyExists(
            f"{shown} calls itself '{image.name}', and there is another image of that name",
            hint=f"say what to call it: --name NAME; --name {image.name} if it shall take the other's place",
        )
    check_room(image, staging, shown)
    await in_thread(lambda report: unpack_files(file, found, staging, shown, report), progress)
    if image.disk is not None:
        await _check_disk(staging / image.disk.name, image, f"{shown}: {image.disk.name}", progress)
    return await in_thread(lambda report: store.add(staging, image, report), progress)


def check_room(image: Image, staging: Path, shown: str) -> None:
    """Raise StorageFull where the files of `image` don't fit into `staging`."""
    if image.size + unpack.SPARE > (free := shutil.disk_usage(staging).free):
        raise StorageFull(
            f"{shown}: it needs {image.size // _MIB} MiB, the image store has {free // _MIB} MiB left",
            hint="free some space: polyvisor image ls; polyvisor ls; or set POLYVISOR_HOME to a larger disk",
        )


def unpack_files(file: BinaryIO, found: Exported, staging: Path, shown: str, report: Progress) -> None:
    """Write the image's files into `staging`."""
    done = 0
    for one in found.image.files:
        file.seek(found.members[one.name].offset)
        with storage_errors(f"importing {shown}"), (staging / one.name).open("xb") as target:
            for chunk in _content(file, one.size, shown):
                target.write(chunk)
                done += len(chunk)
                report(Step("copy", done, found.image.size, "B"))


async def _check_disk(path: Path, image: Image, shown: str, progress: Progress) -> None:
    """Refuse a disk that is not what an image's disk is: one sound qcow2 file that names no other."""
    progress(Step("check"))
    with path.open("rb") as file:
        reader = Reader(file, shown)
        if reader.upto(0, len(qcow2.MAGIC)) != qcow2.MAGIC:
            reader.refuse("it is not a qcow2 disk", hint=_ANEW)
        disk = qcow2.inspect(reader)
        if reader.unpack(">I", 60)[0]:
            reader.refuse("it has snapshots", hint=_ANEW)
        if disk.virtual_size != (image.disk_size_mib or 0) * _MIB:
            reader.refuse(f"a disk of {disk.virtual_size} bytes, not of {image.disk_size_mib} MiB", hint=_ANEW)
        await qemu_img.check(disk, str(path), shown)
