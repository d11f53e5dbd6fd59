"""Taking a stranger's disk image into the store.

    fetch (an address) → copy (a file that others can change) → checksum → unpack → inspect → check → convert → store

Everything up to `inspect` treats the file as bytes. `inspect` parses its headers and refuses what reaches outside the
file; only then does qemu-img read it, with every driver named, into a new qcow2 file of ours. An image that was exported
by another Polyvisor is told by its content, and taken in as it is (`portable.py`). All of it happens in a
staging directory that is gone if anything fails; a download stays, to be gone on with. See
docs/design/untrusted-images.md.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from polyvisor.errors import DownloadFailed, ImageRefused, InvalidInput
from polyvisor.images import portable, qemu_img, unpack
from polyvisor.images.checksum import Checksum, checksum_of, parse_checksum
from polyvisor.images.download import held, is_url
from polyvisor.images.formats import Format, Reader, compression_of, inspect, parse_format
from polyvisor.images.formats.firmware import firmware_of
from polyvisor.images.formats.guest import GuestDisk
from polyvisor.images.http import shown_url
from polyvisor.images.image import Image, ImageFile, Seed
from polyvisor.images.incoming import DISK, convert, display_name, private, remove_temporary, unpacked
from polyvisor.images.store import ImageStore, check_image_name
from polyvisor.images.worker import in_thread
from polyvisor.operation import Progress, silent
from polyvisor.values import dataclass

_MIB = 1 << 20
_MEMORY_MIB = 512


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What the image shall be called and be, and what its file must be; None where the user did not say."""

    name: str | None
    source: str
    checksum: Checksum | None
    format: Format | None
    user: str | None
    seed: Seed | None
    os: str | None
    memory_mib: int | None


async def import_image(
    store: ImageStore,
    cache: Path,
    source: str,
    *,
    name: str | None = None,
    checksum: str | None = None,
    format: str | None = None,  # noqa: A002 (as users call it)
    user: str | None = None,
    seed: Seed | None = None,
    os: str | None = None,
    memory_mib: int | None = None,
    progress: Progress = silent,
) -> Image:
    """Import the disk image at `source`, a path or an http, https or file address, as image `name`.

    `checksum` (`sha256:…`, `sha512:…` or the bare digits) is of the file as it is offered, compressed or not. `format` is
    only needed for a raw disk without a boot signature. `user`, `seed` (by default NOCLOUD), `os` and `memory_mib` (by
    default 512) describe the image. An exported image describes itself and has a name of its own: it is taken under that
    where `name` is left out, unless another image here has that name (AlreadyExists).

    Raises InvalidInput, NotFound, NotPermitted, DownloadFailed (also for a wrong checksum), ImageRefused, StorageFull,
    Unavailable (no qemu-img). Whatever it raises, the store is as it was; a download that broke off is gone on with.
    """
    wanted = _Wanted(
        name=None if name is None else check_image_name(name),
        source=shown_url(source) if is_url(source) else str(local_path(source)),
        checksum=None if checksum is None else parse_checksum(checksum),
        format=None if format is None else parse_format(format),
        user=user,
        seed=seed,
        os=os,
        memory_mib=memory_mib,
    )
    if is_url(source):
        qemu_img.program()  # rather than after a long download
        return await _import_url(store, cache, source, wanted, progress)
    with unpack.open_source(local_path(source)) as file:
        return await _import_file(store, file, wanted, wanted.checksum, progress)


def local_path(source: str) -> Path:
    """The path that `source` means; raises InvalidInput for addresses of other kinds."""
    if "\0" in source or not source:
        raise InvalidInput("source", source, "is not a path")
    if "://" not in source:
        return _absolute(source)
    parts = urlsplit(source)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or "%00" in parts.path:
        raise InvalidInput("source", source, "can't be fetched", hint="give a path, or an http, https or file address")
    return _absolute(unquote(parts.path))


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()


async def _import_url(store: ImageStore, cache: Path, url: str, wanted: _Wanted, progress: Progress) -> Image:
    started = time.time()
    async with held(url, cache, progress) as download:
        # Another command may have imported just this while we waited for it.
        image = None if wanted.name is None else store.find(wanted.name)
        if image is not None and image.source == wanted.source and image.created_at >= started:
            return image
        path = await download.fetch(checksum=wanted.checksum, progress=progress)
        try:
            with unpack.open_source(path) as file:
                image = await _import_file(store, file, wanted, None, progress)
        except ImageRefused:
            download.discard()
            raise
        download.discard()
        return image


async def _import_file(
    store: ImageStore, file: BinaryIO, wanted: _Wanted, checksum: Checksum | None, progress: Progress
) -> Image:
    """Import an open file, which must have `checksum` (if any)."""
    name = display_name(wanted.source)
    with store.staging() as staging, contextlib.ExitStack() as files:
        file = await private(file, staging, name, files, progress)
        if checksum is not None:
            await _verify(file, checksum, name, progress)
        file = await unpacked(file, staging, name, files, progress)
        exported = portable.is_exported(Reader(file, name))
        _check_wanted(wanted, exported=exported)
        if exported:
            remove_temporary(staging)  # it is open still, and its name may be that of one of the image's files
            return await portable.take_in(store, staging, file, name, wanted.name, progress)
        qemu_img.program()
        disk = await in_thread(lambda report: inspect(Reader(file, name), wanted.format), progress)
        await convert(disk, file, staging, name, progress)
        remove_temporary(staging)
        image = await _described(staging / DISK, wanted)
        return await in_thread(lambda report: store.add(staging, image, report), progress)


def _check_wanted(wanted: _Wanted, *, exported: bool) -> None:
    described = {"format": wanted.format, "user": wanted.user, "seed": wanted.seed, "memory": wanted.memory_mib}
    check_options(wanted.source, exported=exported, name=wanted.name, **described)


def check_options(source: str, *, exported: bool, name: str | None, **described: str | int | None) -> None:
    """Raise InvalidInput where a disk image has no name, or an exported one, which describes itself, is described anew."""
    if not exported and name is None:
        raise InvalidInput(
            "name", None, f"is needed: {display_name(source)} has no name of its own", hint="add --name NAME"
        )
    for key, value in described.items():
        if exported and value is not None:
            problem = f"{display_name(source)} is an exported image, which describes itself"
            raise InvalidInput(key, value, problem, hint=f"leave out --{key}")


def check_before_upload(path: Path, name: str | None, **described: str | int | None) -> None:
    """Raise InvalidInput, as `import_image` would in the end, for what can be told without unpacking the file at `path`."""
    with unpack.open_source(path) as file:
        reader = Reader(file, path.name)
        if compression_of(reader) is None:
            check_options(str(path), exported=portable.is_exported(reader), name=name, **described)


async def _verify(file: BinaryIO, checksum: Checksum, name: str, progress: Progress) -> None:
    size = Reader(file, name).size
    found = await in_thread(lambda report: checksum_of(file, checksum.algorithm, size, report), progress)
    if found != checksum:
        raise DownloadFailed(
            f"{name}: its {found.algorithm} is {found.hex}, not {checksum.hex}",
            hint="the file is damaged, or the checksum belongs to another version",
        )


async def _described(path: Path, wanted: _Wanted) -> Image:
    """The image's description; a last look at our own file makes sure that it stands alone."""
    assert wanted.name is not None  # noqa: S101 (checked before)
    found = await qemu_img.info(path)
    if found["format"] != "qcow2" or "backing-filename" in found or "full-backing-filename" in found:
        raise ImageRefused(f"{wanted.source}: the converted disk does not stand alone")
    with GuestDisk(path) as guest:  # which inspects it as it does every stranger's
        return Image(
            id="",
            name=wanted.name,
            created_at=0.0,
            source=wanted.source,
            os=wanted.os,
            disk=ImageFile(name=DISK, sha256="", size=0),
            disk_size_mib=guest.size // _MIB,
            firmware=firmware_of(guest.read),
            seed=Seed.NOCLOUD if wanted.seed is None else wanted.seed,
            user=wanted.user,
            memory_mib=_MEMORY_MIB if wanted.memory_mib is None else wanted.memory_mib,
        )
