"""Reads ext2, ext3 and ext4 file systems: superblock, inodes, extents and block maps, directories, symbolic links.

Source: Linux, Documentation/filesystems/ext4 (all numbers little-endian). The journal is not replayed, so what a system that
was not shut down wrote last may be missing. Features that change where things lie and are not known here are refused.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from uuid import UUID

from polyvisor.images.inspection.budget import Unreadable
from polyvisor.images.inspection.disk import Area
from polyvisor.images.inspection.files import (
    MAX_DIRECTORY,
    MAX_LINKS,
    MAX_NAMES,
    MAX_PARTS,
    MAX_TEXT,
    missing,
    too_large,
)
from polyvisor.values import dataclass

SUPERBLOCK = 1024
MAGIC_AT, MAGIC = 0x38, 0xEF53
_FILETYPE, _RECOVER, _EXTENTS, _64BIT, _MMP, _FLEX, _EA, _SEED, _LARGE_DIR, _INLINE, _ENCRYPT, _FOLD = (
    *(0x2, 0x4, 0x40, 0x80, 0x100, 0x200, 0x400, 0x2000, 0x4000, 0x8000, 0x10000, 0x20000),
)
_KNOWN = _FILETYPE | _RECOVER | _EXTENTS | _64BIT | _MMP | _FLEX | _EA | _SEED | _LARGE_DIR | _INLINE | _ENCRYPT | _FOLD
_INCOMPATIBLE = {0x1: "compression", 0x8: "it is a journal", 0x10: "meta_bg", 0x1000: "dirdata"}
_ROOT = 2
_INODE_ENCRYPTED, _INODE_EXTENTS, _INODE_INLINE = 0x800, 0x80000, 0x10000000
_EXTENT_MAGIC = 0xF30A
_MAX_DEPTH = 5
_MAX_RUNS = 100_000
_MAX_INLINE_LINK = 60
_MAX_LINK = 4096
_CACHED_DIRECTORIES = 64
_PIECE = 4 << 20


@dataclass(frozen=True)
class _Inode:
    number: int
    mode: int
    size: int
    flags: int
    block: bytes  # the map, or the root of the tree of extents, or a short symbolic link's target
    sectors: int


class Ext:
    """The file system in an area; implements `Files`. Raises Unreadable where it is damaged or not known here."""

    def __init__(self, area: Area) -> None:
        self._area = area
        raw = area.at(SUPERBLOCK, 1024)
        magic, self._revision = struct.unpack_from("<H", raw, MAGIC_AT)[0], struct.unpack_from("<I", raw, 0x4C)[0]
        if magic != MAGIC:
            raise Unreadable("it is no ext file system")
        self._inodes, low = struct.unpack_from("<II", raw, 0)
        first, log_size = struct.unpack_from("<II", raw, 0x14)
        (self._per_group,) = struct.unpack_from("<I", raw, 0x28)
        compatible, incompatible = struct.unpack_from("<II", raw, 0x5C)
        self._check_features(incompatible)
        if log_size > 6 or not self._per_group:
            raise Unreadable("its superblock is damaged")
        self._block_size = 1024 << log_size
        high = struct.unpack_from("<I", raw, 0x150)[0] if incompatible & _64BIT else 0
        self._blocks = min(high << 32 | low, area.size // self._block_size)
        self._inode_size = struct.unpack_from("<H", raw, 0x58)[0] if self._revision else 128
        self._descriptor = struct.unpack_from("<H", raw, 0xFE)[0] if incompatible & _64BIT else 32
        if not 128 <= self._inode_size <= self._block_size or not 32 <= self._descriptor <= 1024:
            raise Unreadable("its superblock is damaged")
        self._descriptors_at = (first + 1) * self._block_size
        self._typed = bool(incompatible & _FILETYPE)
        self.kind = "ext4" if incompatible & _EXTENTS else "ext3" if compatible & 0x4 else "ext2"
        self.label = raw[0x78:0x88].split(b"\0")[0].decode(errors="replace") or None
        self.uuid: str | None = str(UUID(bytes=raw[0x68:0x78]))
        self.note = "it was not shut down cleanly" if incompatible & _RECOVER else None
        self._directories: dict[int, dict[str, int]] = {}

    def _check_features(self, incompatible: int) -> None:
        if unknown := incompatible & ~_KNOWN:
            names = [name for bit, name in _INCOMPATIBLE.items() if unknown & bit]
            raise Unreadable(f"it has a feature that is not known here ({', '.join(names) or hex(unknown)})")

    # Files

    def names(self, path: str) -> list[str]:
        return [name for name in self._entries(self._find(path)[0]) if name not in (".", "..")]

    def read(self, path: str, limit: int = MAX_TEXT) -> bytes:
        inode, where = self._find(path)
        if not stat.S_ISREG(inode.mode):
            raise Unreadable(f"{where} is not a file")
        return self._content(inode, limit, where)

    def exists(self, path: str) -> bool:
        try:
            self._find(path)
        except Unreadable:
            return False
        return True

    def canonical(self, path: str) -> str:
        return self._find(path)[1]

    def _find(self, path: str) -> tuple[_Inode, str]:
        """The inode that a path leads to through symbolic links, and its path without them."""
        todo = [part for part in reversed(path.split("/")) if part]
        trail: list[tuple[str, _Inode]] = [("", self._inode(_ROOT))]
        links = parts = 0
        while todo:
            name = todo.pop()
            parts += 1
            if parts > MAX_PARTS:
                raise Unreadable(f"{path} leads through too many directories")
            if name == ".":
                continue
            if name == "..":
                trail = trail[:-1] or trail
                continue
            number = self._entries(trail[-1][1]).get(name)
            if number is None:
                raise missing(path)
            inode = self._inode(number)
            if not stat.S_ISLNK(inode.mode):
                trail.append((name, inode))
                continue
            links += 1
            if links > MAX_LINKS:
                raise Unreadable(f"{path} leads through too many symbolic links")
            target = self._target(inode)
            trail = trail[:1] if target.startswith("/") else trail
            todo += [part for part in reversed(target.split("/")) if part]
        return trail[-1][1], "/" + "/".join(name for name, _ in trail[1:])

    def _target(self, link: _Inode) -> str:
        if link.size < _MAX_INLINE_LINK and not link.flags & _INODE_EXTENTS and not link.sectors:
            return link.block[: link.size].decode(errors="replace")
        return self._content(link, _MAX_LINK, "a symbolic link").decode(errors="replace")

    def _entries(self, directory: _Inode) -> dict[str, int]:
        """Names and inodes of a directory. Those of an index (htree) look like unused entries to such a walk."""
        if not stat.S_ISDIR(directory.mode):
            raise Unreadable("a path leads through what is no directory")
        if (known := self._directories.get(directory.number)) is not None:
            return known
        data = self._content(directory, MAX_DIRECTORY, "a directory")
        entries: dict[str, int] = {}
        for start in range(0, len(data), self._block_size):
            self._read_entries(data[start : start + self._block_size], entries)
        if len(self._directories) >= _CACHED_DIRECTORIES:
            self._directories.clear()
        self._directories[directory.number] = entries
        return entries

    def _read_entries(self, block: bytes, entries: dict[str, int]) -> None:
        at = 0
        while at + 8 <= len(block):
            number, length, name_length = struct.unpack_from("<IHH", block, at)
            if self._typed:
                name_length &= 0xFF
            if length in (0, 0xFFFF) and self._block_size == 65536:
                length = 65536
            if length < 8 or length % 4 or at + length > len(block) or name_length + 8 > length:
                raise Unreadable("a directory is damaged")
            if number and name_length:
                entries[block[at + 8 : at + 8 + name_length].decode(errors="replace")] = number
                if len(entries) > MAX_NAMES:
                    raise Unreadable(f"a directory has more than {MAX_NAMES} names")
            at += length

    # Inodes and their content

    def _inode(self, number: int) -> _Inode:
        if not 0 < number <= self._inodes:
            raise Unreadable("a directory leads to an inode that is not there")
        group, index = divmod(number - 1, self._per_group)
        at = self._descriptors_at + group * self._descriptor
        (table,) = self._area.unpack("<I", at + 8)
        if self._descriptor >= 64:
            table |= self._area.unpack("<I", at + 0x28)[0] << 32
        raw = self._area.at(table * self._block_size + index * self._inode_size, 128)
        mode, size, sectors, flags, high = struct.unpack_from("<H2xI20xII72xI", raw, 0)
        size |= high << 32 if stat.S_ISREG(mode) else 0
        return _Inode(number, mode, size, flags, raw[0x28:0x64], sectors)

    def _content(self, inode: _Inode, limit: int, what: str) -> bytes:
        if inode.size > limit:
            raise too_large(what, inode.size, limit)
        if inode.flags & _INODE_ENCRYPTED:
            raise Unreadable(f"{what} is encrypted")
        if inode.flags & _INODE_INLINE:
            raise Unreadable(f"{what} lies in its inode (inline_data), where it is not read")
        content = bytearray(inode.size)
        size = self._block_size
        for first, start, count in self._runs(inode):
            begin, end = first * size, min((first + count) * size, inode.size)
            for at in range(begin, end, _PIECE):
                length = min(_PIECE, end - at)
                content[at : at + length] = self._area.at(start * size + at - begin, length)
        return bytes(content)

    def _runs(self, inode: _Inode) -> Iterator[tuple[int, int, int]]:
        """Where a file's blocks are: first block of the file, first block of the disk, how many; holes are left out."""
        blocks = -(-inode.size // self._block_size)
        runs = self._extents(inode.block, None) if inode.flags & _INODE_EXTENTS else self._mapped(inode.block, blocks)
        for count, (first, start, length) in enumerate(runs):
            if start + length > self._blocks or count > _MAX_RUNS:
                raise Unreadable("a file leads past the end of its file system")
            if first < blocks:
                yield first, start, min(length, blocks - first)

    def _extents(self, node: bytes, depth: int | None) -> Iterator[tuple[int, int, int]]:
        """The extents below a node of the tree, which must be of `depth` (the root: at most 5): so no tree is endless."""
        magic, entries, _, here = struct.unpack_from("<HHHH", node, 0)
        if magic != _EXTENT_MAGIC or here > _MAX_DEPTH or depth not in (None, here) or 12 + 12 * entries > len(node):
            raise Unreadable("a file's tree of extents is damaged")
        for index in range(entries):
            entry = node[12 + 12 * index : 24 + 12 * index]
            if here:
                low, high = struct.unpack_from("<IH", entry, 4)
                block = high << 32 | low
                yield from self._extents(self._area.at(block * self._block_size, self._block_size), here - 1)
                continue
            first, length, high, low = struct.unpack("<IHHI", entry)
            if length <= 0x8000:  # above it, the extent is allocated and was never written: zeros
                yield first, high << 32 | low, length

    def _mapped(self, block: bytes, blocks: int) -> Iterator[tuple[int, int, int]]:
        """The blocks of a map: twelve direct ones, then one table, a table of tables and a table of those."""
        numbers = struct.unpack("<15I", block)
        yield from ((i, number, 1) for i, number in enumerate(numbers[:12]) if number and i < blocks)
        first = 12
        for level in range(3):
            if first >= blocks:
                return
            if numbers[12 + level]:
                yield from self._table(numbers[12 + level], level, first, blocks)
            first += (self._block_size // 4) ** (level + 1)

    def _table(self, table: int, level: int, first: int, blocks: int) -> Iterator[tuple[int, int, int]]:
        numbers = struct.unpack(f"<{self._block_size // 4}I", self._area.at(table * self._block_size, self._block_size))
        covered = len(numbers) ** level
        for number in numbers:
            if first >= blocks:
                return
            if number and level:
                yield from self._table(number, level - 1, first, blocks)
            elif number:
                yield first, number, 1
            first += covered
