"""Unpacking what a kernel or an initramfs is packed with, as far as Python can, and never more than was asked for."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from polyvisor.images.inspection import lz4
from polyvisor.images.inspection.budget import Budget, Unreadable

# What each packer writes first. Sources: Linux, lib/decompress.c, and for LZO the file format of lzop.
MAGICS = {
    "gzip": b"\x1f\x8b",
    "xz": b"\xfd7zXZ\0",
    "lzma": b"\x5d\0\0",
    "bzip2": b"BZh",
    "lzo": b"\x89LZO\0",
    "lz4": lz4.MAGIC,
    "zstd": b"\x28\xb5\x2f\xfd",
}
_CHUNK = 1 << 20
_MEMORY = 256 << 20  # for a dictionary; the kernel's own, xz -9, needs 65 MiB


def packing_of(data: bytes) -> str | None:
    """What `data` is packed with, a key of MAGICS; None where it begins as none of them."""
    return next((name for name, magic in MAGICS.items() if data.startswith(magic)), None)


def unpacked(data: bytes, packing: str, budget: Budget) -> Iterator[bytes]:
    """What is in `data`, in pieces; raises Unreadable where it is damaged, or Python can't unpack it.

    What follows the first packed stream is left alone: kernels carry their size behind it.
    """
    if packing == "lz4":
        yield from _lz4(data, budget)
        return
    try:
        stream = _decompressor(packing)
        todo: bytes = data
        while not stream.eof:
            piece = stream.decompress(todo, _CHUNK)
            todo = stream.unconsumed_tail if packing == "gzip" else b""
            if not piece and not todo and not stream.eof:
                return  # cut off: what came before it may do
            budget.unpack(len(piece))
            yield piece
    except _damages() as error:
        raise Unreadable(f"the {packing} data in it is damaged: {str(error)[:80]}") from error


def _decompressor(packing: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "gzip": lambda: zlib.decompressobj(wbits=31),
        "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY),
        "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_MEMORY),
        "bzip2": bz2.BZ2Decompressor,
        "zstd": _zstd,
    }
    if packing not in makers:
        raise Unreadable(f"Python can't unpack {packing}")
    return makers[packing]()


def _zstd() -> Any:
    """Python has zstd since 3.14."""
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise Unreadable("Python can't unpack zstd before its version 3.14") from error
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MEMORY.bit_length() - 1})


def _damages() -> tuple[type[Exception], ...]:
    """What decompressors raise for data that is damaged."""
    always = (OSError, EOFError, ValueError, MemoryError, zlib.error, lzma.LZMAError)
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return always
    return (*always, zstd.ZstdError)


def _lz4(data: bytes, budget: Budget) -> Iterator[bytes]:
    for at, size in lz4.blocks(data):
        try:
            piece = lz4.unpack_block(data, at, size)
        except ValueError as error:
            raise Unreadable(f"the lz4 data in it is damaged: {error}") from error
        budget.unpack(len(piece))
        yield piece


class Unpacked:
    """What is in packed `data`, to be read from anywhere: only as far as the reads go, `limit` bytes at most."""

    def __init__(self, data: bytes, packing: str, budget: Budget, limit: int) -> None:
        self._pieces = unpacked(data, packing, budget)
        self._have = bytearray()
        self._limit = limit

    def at(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; raises Unreadable where they are not there."""
        end = offset + length
        if offset < 0 or end > self._limit:
            raise Unreadable("something in it lies further inside than it can be large")
        while len(self._have) < end:
            piece = next(self._pieces, None)
            if piece is None:
                raise Unreadable("what is packed in it is cut off")
            self._have += piece
        return bytes(self._have[offset:end])
