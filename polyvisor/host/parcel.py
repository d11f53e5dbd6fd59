"""A stopped VM as one stream of bytes, to be carried to another host.

    magic
    u32 length, manifest      JSON: the move, the cargo (see `moves.py`), and the files with their sizes
    for each file:
      u64 offset, u64 length, data     what it holds; holes are not sent
      …
      u64 size, u64 0                  its end
      32 bytes                         SHA-256 of all that since the file's beginning
    magic of the end

Numbers are big-endian. Whoever takes one in believes nothing: the manifest is read strictly, which files there must be follows
from spec and image, extents must ascend, and what they hold in all is bounded by what was announced, for which there is room.
What is in the files is for `arrival.py` to judge.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path

from polyvisor.errors import ConnectionLost, ImageRefused, InvalidInput, PolyvisorError
from polyvisor.files import storage_errors
from polyvisor.host.keys import HOST_KEY, KNOWN_HOSTS, LOGIN, SSH
from polyvisor.host.moves import Cargo, Move
from polyvisor.host.plan import UEFI_VARIABLES, disk_count, disk_path
from polyvisor.images.image import Image, Seed, image_to_json
from polyvisor.images.manifest import parse_manifest, strict_json
from polyvisor.spec.parse import structure, unstructure
from polyvisor.spec.vm import VMSpec
from polyvisor.values import dataclass

FORMAT = 1
MAX_SMALL = 64 << 10
MAX_VARIABLES = 64 << 20
_MAGIC, _END = b"polyvisor parcel 1\n", b"polyvisor parcel ends\n"
_MAX_MANIFEST = 8 << 20  # user data may have 512 KiB, of which JSON can make six times as much
_CHUNK = 1 << 20
_BLOCK = 512  # the unit of st_blocks: inode(7)
_EXTENT = struct.Struct(">QQ")
_LENGTH = struct.Struct(">I")
_DISK = re.compile(r"disks/disk[0-9]{1,2}\.qcow2\Z")
_TRY_AGAIN = "try again"


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a VM's directory: its path there, its size, and how much of that is data, in bytes."""

    path: str
    size: int
    data: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a parcel says of itself."""

    move: Move
    cargo: Cargo
    files: tuple[File, ...]


def expected(spec: VMSpec, image: Image) -> tuple[set[str], set[str]]:
    """The files that a VM must have to be carried, and those that it may have."""
    must = {str(disk_path(i)) for i in range(disk_count(spec, image))}
    may = {str(UEFI_VARIABLES)} if image.disk is not None else set()
    if image.seed is Seed.NONE:
        may.add(str(KNOWN_HOSTS))  # of others the target writes it anew
    else:
        must |= {f"{SSH}/{HOST_KEY}", f"{SSH}/{HOST_KEY}.pub"}
    if image.seed is not Seed.INITRD:
        may.add(str(LOGIN))  # whom such a guest lets in stands on its disk
    return must, may


# Out of a host


def packed(move: Move, cargo: Cargo, paths: Sequence[tuple[str, Path]]) -> Iterator[bytes]:
    """The parcel of `paths` (as they are called, where they are), in chunks. Nobody may change them meanwhile.

    All files are open before the first byte comes. Where they have data is asked once: as pages are written back and read,
    file systems take more and less of a file that nobody changes for a hole.
    """
    opened = [(name, _open(path)) for name, path in paths]
    try:
        held = [list(_extents(fd)) for _, fd in opened]
        files = tuple(
            File(path=name, size=os.fstat(fd).st_size, data=_total(extents))
            for (name, fd), extents in zip(opened, held, strict=True)
        )
        text = json.dumps({"format": FORMAT, **unstructure(Manifest(move=move, cargo=cargo, files=files))}).encode()
        yield _MAGIC + _LENGTH.pack(len(text)) + text
        for file, (_, fd), extents in zip(files, opened, held, strict=True):
            yield from _content(file, fd, extents)
        yield _END
    finally:
        for _, fd in opened:
            os.close(fd)


def data_bytes(paths: Sequence[Path]) -> int:
    """How much the files hold at most, without holes: what `packed` finds there later is no more."""
    total = 0
    for path in paths:
        fd = _open(path)
        try:
            total += max(_total(_extents(fd)), os.fstat(fd).st_blocks * _BLOCK)
        finally:
            os.close(fd)
    return total


def _open(path: Path) -> int:
    with storage_errors(f"reading {path}"):
        # The VM's process could write in some of its directories: never follow a link that it may have put there.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def _total(extents: Iterable[tuple[int, int]]) -> int:
    return sum(length for _, length in extents)


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Where the file has data: offset and length (lseek(2), SEEK_DATA; a file system that can't tell has no holes)."""
    offset, size = 0, os.fstat(fd).st_size
    while offset < size:
        try:
            begin = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        offset = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        yield begin, offset - begin


def _content(file: File, fd: int, extents: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for begin, length in extents:
        head = _EXTENT.pack(begin, length)
        digest.update(head)
        yield head
        while length > 0:
            with storage_errors(f"reading {file.path}"):
                chunk = os.pread(fd, min(length, _CHUNK), begin)
            if not chunk:
                raise PolyvisorError(f"{file.path} became shorter while it was sent", hint="something is changing it")
            digest.update(chunk)
            yield chunk
            begin, length = begin + len(chunk), length - len(chunk)
    end = _EXTENT.pack(file.size, 0)
    digest.update(end)
    yield end + digest.digest()


# Into a host


class Parcel:
    """A parcel as it comes in: first `manifest`, then `unpack`.

    Both raise ConnectionLost where it breaks off before its end, and ImageRefused where it is not what `packed` makes.
    """

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()

    async def manifest(self) -> Manifest:
        """What the parcel says of itself, looked at as closely as that can be done without the files."""
        if await self._take(len(_MAGIC)) != _MAGIC:
            raise refused("it is not one")
        [length] = _LENGTH.unpack(await self._take(_LENGTH.size))
        if length > _MAX_MANIFEST:
            raise refused("a manifest of absurd size")
        try:
            return parse(await self._take(length))
        except InvalidInput as error:
            raise refused(f"its manifest can't be used: {error.message}", hint=error.hint) from error

    async def unpack(self, manifest: Manifest, directory: Path) -> None:
        """Write the files below `directory`, for nobody else to read; their directories must be there."""
        left = sum(file.data for file in manifest.files)
        for file in manifest.files:
            left -= await self._file(file, directory / file.path, left)
        if await self._take(len(_END)) != _END:
            raise refused("it has no end")

    async def _file(self, file: File, path: Path, room: int) -> int:
        """Take in a file that has `room` bytes of data at most; returns how many it had."""
        digest, done, place = hashlib.sha256(), 0, 0
        with storage_errors(f"receiving {file.path}"):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                while True:
                    digest.update(head := await self._take(_EXTENT.size))
                    offset, length = _EXTENT.unpack(head)
                    if length == 0:
                        break
                    if offset < place or offset + length > file.size or (done := done + length) > room:
                        raise refused(f"{file.path} does not hold what was announced")
                    place = offset + length
                    while offset < place:
                        digest.update(chunk := await self._some(place - offset))
                        _write(fd, chunk, offset)
                        offset += len(chunk)
                if offset != file.size:
                    raise refused(f"{file.path} does not end where its end was announced")
                os.ftruncate(fd, file.size)
            finally:
                os.close(fd)
        if await self._take(digest.digest_size) != digest.digest():
            raise refused(f"{file.path} was damaged on its way", hint=_TRY_AGAIN)
        return done

    async def _some(self, most: int) -> bytes:
        """The next bytes, at least one and at most so many."""
        if not self._buffer:
            await self._more()
        taken = bytes(self._buffer[:most])
        del self._buffer[:most]
        return taken

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            await self._more()
        return await self._some(count) if count else b""

    async def _more(self) -> None:
        async for chunk in self._chunks:
            if chunk:
                self._buffer += chunk
                return
        raise ConnectionLost("the VM broke off on its way", hint=_TRY_AGAIN)


def _write(fd: int, data: bytes, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def refused(problem: str, *, hint: str | None = None) -> ImageRefused:
    return ImageRefused(f"the parcel with the VM: {problem}", hint=hint or "are both hosts what they should be?")


def parse(data: bytes) -> Manifest:
    """The manifest in `data`, which a stranger wrote; raises InvalidInput."""
    raw = strict_json(data)
    version = raw.pop("format", None)
    if type(version) is not int or version != FORMAT:
        raise InvalidInput("format", version, f"is not {FORMAT}", hint="is the other Polyvisor of another version?")
    manifest = structure(raw, Manifest)
    check_image(manifest.cargo.image)
    _check_files(manifest)
    return manifest


def check_image(image: Image) -> None:
    """Raise InvalidInput for an image that can't be meant, by the rules for a stranger's."""
    parse_manifest(image_to_json(image).encode())


def _check_files(manifest: Manifest) -> None:
    must, may = expected(manifest.cargo.spec, manifest.cargo.image)
    names = [file.path for file in manifest.files]
    for name in names:
        if name not in must | may or names.count(name) > 1:
            raise InvalidInput("files", name, "is not a file of such a VM")
    if missing := must - set(names):
        raise InvalidInput("files", sorted(missing)[0], "is missing")
    for file in manifest.files:
        most = MAX_VARIABLES if file.path == str(UEFI_VARIABLES) else MAX_SMALL
        if not 0 <= file.data <= file.size < 1 << 62 or (not _DISK.match(file.path) and file.size > most):
            raise InvalidInput("files", file.path, "is of absurd size")
    if sum(file.data for file in manifest.files) > manifest.cargo.data_bytes:
        raise InvalidInput("files", manifest.cargo.data_bytes, "is less than what the files hold")
