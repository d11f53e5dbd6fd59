"""Reads a qcow2 disk as its guest would: one without backing files, compressed by zlib or not at all.

Source: QEMU, docs/interop/qcow2.txt: an L1 table leads to L2 tables, an L2 entry to a cluster, or to where its compressed
content begins, with the number of further sectors that it takes.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

from polyvisor.images.formats import qcow2
from polyvisor.images.formats.reader import SECTOR, Reader

_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_ZERO = 1


class GuestDisk:
    """A qcow2 file, opened to be read; raises ImageRefused where it is not what `inspect` accepts.

    `readable` is false where its clusters can't be read here: compressed by zstd, or with subclusters.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._file = path.open("rb")
        self._reader = Reader(self._file, name or path.name)
        self.size = qcow2.inspect(self._reader).virtual_size
        self.readable = qcow2.is_plain(self._reader)
        self._bits = self._reader.unpack(">I", 20)[0]
        self._l1 = self._reader.unpack(">Q", 40)[0]
        self._unpacked = (0, b"")  # of the last entry that was compressed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of the guest's disk; fewer where the disk ends."""
        data = b""
        end = min(offset + length, self.size)
        while offset < end:
            within = offset % (1 << self._bits)
            part = min(end - offset, (1 << self._bits) - within)
            data += self._cluster_part(offset >> self._bits, within, part)
            offset += part
        return data

    def _cluster_part(self, cluster: int, within: int, length: int) -> bytes:
        per_table = 1 << (self._bits - 3)
        l2 = self._entry(self._l1 + cluster // per_table * 8) & _OFFSET
        entry = self._entry(l2 + cluster % per_table * 8) if l2 else 0
        if entry & _COMPRESSED:
            return self._compressed(entry)[within : within + length]
        start = 0 if entry & _ZERO else entry & _OFFSET
        return self._reader.upto(start + within, length).ljust(length, b"\0") if start else bytes(length)

    def _compressed(self, entry: int) -> bytes:
        """A whole cluster, from where `entry` says that its compressed content is."""
        if self._unpacked[0] != entry:
            bits = 62 - (self._bits - 8)
            start = entry & ((1 << bits) - 1)
            sectors = (entry & (_COMPRESSED - 1)) >> bits
            packed = self._reader.upto(start, (sectors + 1) * SECTOR - start % SECTOR)
            self._unpacked = (entry, self._inflated(packed))
        return self._unpacked[1]

    def _inflated(self, packed: bytes) -> bytes:
        size = 1 << self._bits
        try:
            data = zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(packed, size)
        except zlib.error:
            data = b""
        if len(data) != size:
            self._reader.refuse("a compressed part of it is damaged", hint="it is corrupt: get it again")
        return data

    def _entry(self, offset: int) -> int:
        return int(self._reader.unpack(">Q", offset)[0])
