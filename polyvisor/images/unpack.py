"""Getting a disk image's bytes into one file that nobody else can change: copying and decompressing.

Zeros are not written, so a mostly empty disk stays small. Compressed files are unpacked with bounds on the result and on
memory: a few kilobytes can unpack to terabytes.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from polyvisor.errors import ImageRefused, InvalidInput, NotFound, ProcessFailed, StorageFull
from polyvisor.files import storage_errors
from polyvisor.images.formats import Compression
from polyvisor.operation import Progress, Step
from polyvisor.process import find_program, run

MAX_UNPACKED = 256 << 30
SPARE = 256 << 20  # bytes to leave on the file system
_MEMORY = 512 << 20  # for a decompressor's dictionary; xz -9 needs 65 MiB
_CHUNK = 1 << 20
_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)


def open_source(path: Path) -> BinaryIO:
    """A regular file, opened to be read; raises NotFound, InvalidInput, NotPermitted."""
    try:
        with storage_errors(f"reading {path}"):
            # Opening a named pipe must not wait for a writer.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except Exception as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise NotFound(f"there is no file {path}") from error.__cause__
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidInput("source", str(path), "is not a regular file", hint="copy it into a file first")
    return os.fdopen(fd, "rb")


def is_private(file: BinaryIO) -> bool:
    """Whether only this user (and root) can change the file while it is being looked at."""
    status = os.fstat(file.fileno())
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def path_of(file: BinaryIO) -> str:
    """A path by which a program that this process starts opens this very file, whatever happens to its name."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def copy(file: BinaryIO, target: Path, name: str, report: Progress) -> None:
    """Copy an open file; raises StorageFull."""
    _spool(_chunks(file), target, name, file, report, "copy")


def decompress(file: BinaryIO, kind: Compression, target: Path, name: str, report: Progress) -> None:
    """Unpack an open gzip, bzip2 or xz file; raises ImageRefused where it is damaged or grows beyond MAX_UNPACKED."""
    readers: dict[Compression, Callable[[BinaryIO], Iterator[bytes]]] = {
        Compression.GZIP: lambda raw: _chunks(gzip.GzipFile(fileobj=raw)),
        Compression.BZIP2: lambda raw: _chunks(bz2.BZ2File(raw)),
        Compression.XZ: _xz_chunks,
    }
    file.seek(0)
    try:
        _spool(readers[kind](file), target, name, file, report, "unpack")
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(name, kind, str(error)) from error


async def decompress_zstd(file: BinaryIO, target: Path, name: str) -> None:
    """Unpack an open Zstandard file with the program zstd; raises as `decompress`, and Unavailable."""
    limits = [find_program("prlimit", package="util-linux"), f"--fsize={MAX_UNPACKED}", "--core=0"]
    zstd = [find_program("zstd", package="zstd"), "-d", "-q", "-f", "--sparse", f"-M{_MEMORY >> 20}MB"]
    try:
        await run([*limits, *zstd, "-o", str(target), path_of(file)])
    except ProcessFailed as error:
        if "No space left" in error.stderr:
            raise _full(name, target) from error
        raise _damaged(name, Compression.ZSTD, error.stderr.strip().rpartition(": ")[2]) from error


def _chunks(file: BinaryIO | gzip.GzipFile | bz2.BZ2File) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(_CHUNK):
        yield chunk


def _xz_chunks(raw: BinaryIO) -> Iterator[bytes]:
    """The content of an xz file, which may be several streams; the library's own reader has no bound on memory."""
    pending = raw.read(_CHUNK)
    while pending:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
        while not stream.eof:
            if stream.needs_input and not pending:
                pending = raw.read(_CHUNK)
                if not pending:
                    raise EOFError("it is cut off")
            yield stream.decompress(pending if stream.needs_input else b"", _CHUNK)
            pending = b""
        pending = (stream.unused_data or raw.read(_CHUNK)).lstrip(b"\0")


def _spool(chunks: Iterator[bytes], target: Path, name: str, source: BinaryIO, report: Progress, phase: str) -> None:
    """Write `chunks` to `target`, leaving holes for zeros; progress is told in bytes of `source`."""
    total = os.fstat(source.fileno()).st_size
    with storage_errors(f"importing {name}"), target.open("xb") as out:
        for chunk in _reading(chunks, name):
            for start in range(0, len(chunk), _BLOCK):
                block = chunk[start : start + _BLOCK]
                if block == _ZEROS:
                    out.seek(_BLOCK, os.SEEK_CUR)
                else:
                    out.write(block)
            if out.tell() > MAX_UNPACKED:
                raise ImageRefused(f"{name}: it unpacks to more than {MAX_UNPACKED >> 30} GiB", hint="is it a bomb?")
            if shutil.disk_usage(target.parent).free < SPARE:
                raise _full(name, target)
            report(Step(phase, min(source.tell(), total), total, "B"))
        out.truncate(out.tell())


def _reading(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """`chunks`, with the errors of reading them kept apart from those of writing."""
    try:
        yield from chunks
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile) or error.errno is None:  # so do bz2 and gzip report damage
            raise EOFError(str(error)) from error
        raise


def _damaged(name: str, kind: Compression, words: str) -> ImageRefused:
    return ImageRefused(
        f"{name}: the .{kind} file is damaged: {words[:120]}", hint="it is truncated or corrupt: get it again"
    )


def _full(name: str, target: Path) -> StorageFull:
    return StorageFull(
        f"{name}: there is no room for it in {target.parent}",
        hint="free some space: polyvisor image ls; polyvisor ls; or set POLYVISOR_HOME to a larger disk",
    )
