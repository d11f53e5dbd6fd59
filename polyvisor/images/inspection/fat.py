"""Reads FAT12, FAT16 and FAT32 file systems, as EFI system partitions are, with long names.

Source: Microsoft, "FAT: General Overview of On-Disk Format", version 1.03. Names are found whatever their case.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from polyvisor.images.inspection.budget import Unreadable
from polyvisor.images.inspection.disk import Area
from polyvisor.images.inspection.files import MAX_DIRECTORY, MAX_NAMES, MAX_PARTS, MAX_TEXT, missing, too_large
from polyvisor.values import dataclass

_DIRECTORY, _VOLUME, _LONG = 0x10, 0x08, 0x0F
_END, _DELETED = 0x00, 0xE5
_LAST_LONG = 0x40
_MAX_LONG = 20
_FAT12, _FAT16 = 4085, 65525


@dataclass(frozen=True)
class _Entry:
    name: str
    directory: bool
    cluster: int
    size: int


class Fat:
    """The file system in an area; implements `Files`. Raises Unreadable where it is damaged."""

    def __init__(self, area: Area) -> None:
        self._area = area
        raw = area.at(0, 512)
        sector, per_cluster, reserved, copies, root_entries, small, _, short_fat = struct.unpack_from(
            "<HBHBHHBH", raw, 11
        )
        (large,) = struct.unpack_from("<I", raw, 32)
        if (
            raw[510:] != b"\x55\xaa"
            or sector not in (512, 1024, 2048, 4096)
            or per_cluster.bit_count() != 1
            or not copies
        ):
            raise Unreadable("it is no FAT file system")
        fat_sectors = short_fat or struct.unpack_from("<I", raw, 36)[0]
        self._fat_at = reserved * sector
        self._root_at = self._fat_at + copies * fat_sectors * sector
        self._root_size = root_entries * 32
        self._data_at = self._root_at + -(-self._root_size // sector) * sector
        self._cluster_size = per_cluster * sector
        self._clusters = ((small or large) * sector - self._data_at) // self._cluster_size
        if self._clusters <= 0 or not fat_sectors or not reserved:
            raise Unreadable("it is no FAT file system")
        self._bits = 12 if self._clusters < _FAT12 else 16 if self._clusters < _FAT16 else 32
        self._root_cluster = struct.unpack_from("<I", raw, 44)[0] if self._bits == 32 else 0
        identity = 67 if self._bits == 32 else 39
        serial = struct.unpack_from("<I", raw, identity)[0]
        self.kind = "vfat"
        self.uuid: str | None = f"{serial >> 16:04X}-{serial & 0xFFFF:04X}"
        self.label = raw[identity + 4 : identity + 15].decode("ascii", "replace").strip() or None
        self.note: str | None = None

    def names(self, path: str) -> list[str]:
        return [entry.name for entry in self._list(self._find(path)) if entry.name not in (".", "..")]

    def read(self, path: str, limit: int = MAX_TEXT) -> bytes:
        entry = self._find(path)
        if entry.directory:
            raise Unreadable(f"{path} is not a file")
        if entry.size > limit:
            raise too_large(path, entry.size, limit)
        return self._chain(entry.cluster, entry.size)[: entry.size] if entry.size else b""

    def exists(self, path: str) -> bool:
        try:
            self._find(path)
        except Unreadable:
            return False
        return True

    def canonical(self, path: str) -> str:
        self._find(path)
        return path

    def _find(self, path: str) -> _Entry:
        found = _Entry("", True, self._root_cluster, 0)
        parts = [part for part in path.split("/") if part]
        if len(parts) > MAX_PARTS:
            raise Unreadable("a path leads through too many directories")
        for part in parts:
            entries = self._list(found) if found.directory else []
            entry = next((each for each in entries if each.name.lower() == part.lower()), None)
            if entry is None:
                raise missing(path)
            found = entry
        return found

    def _list(self, directory: _Entry) -> list[_Entry]:
        if not directory.directory:
            raise Unreadable("a path leads through what is no directory")
        if directory.cluster == 0:  # the root of FAT12 and FAT16 has a place of its own; ".." leads there by 0
            data = (
                self._chain(self._root_cluster, None)
                if self._bits == 32
                else self._area.at(self._root_at, self._root_size)
            )
        else:
            data = self._chain(directory.cluster, None)
        return list(_entries(data))

    def _chain(self, cluster: int, size: int | None) -> bytes:
        """The content of a chain of clusters: `size` bytes at least, or (None) all, which is bounded."""
        pieces: list[bytes] = []
        wanted = MAX_DIRECTORY if size is None else size
        length = 0
        while 2 <= cluster < self._clusters + 2 and length < wanted:
            pieces.append(self._area.at(self._data_at + (cluster - 2) * self._cluster_size, self._cluster_size))
            length += self._cluster_size
            cluster = self._next(cluster)
        if size is not None and length < size:
            raise Unreadable("a file is cut off")
        if size is None and length >= wanted:
            raise Unreadable("a directory is endless")
        return b"".join(pieces)

    def _next(self, cluster: int) -> int:
        if self._bits == 12:
            (pair,) = self._area.unpack("<H", self._fat_at + cluster * 3 // 2)
            return int(pair >> 4 if cluster & 1 else pair & 0xFFF)
        width = self._bits // 8
        (found,) = self._area.unpack("<H" if width == 2 else "<I", self._fat_at + cluster * width)
        return int(found & 0x0FFFFFFF)


def _entries(data: bytes) -> Iterator[_Entry]:
    """The entries of a directory; a long name stands before its entry, in pieces, the last first."""
    long: list[bytes] = []
    for count, at in enumerate(range(0, len(data) - 31, 32)):
        raw = data[at : at + 32]
        if raw[0] == _END:
            return
        if count > MAX_NAMES:
            raise Unreadable(f"a directory has more than {MAX_NAMES} names")
        if raw[0] == _DELETED:
            long = []
        elif raw[11] & 0x3F == _LONG:
            if raw[0] & _LAST_LONG:
                long = []
            long.insert(0, raw[1:11] + raw[14:26] + raw[28:32])
            long = long[:_MAX_LONG]
        elif raw[11] & _VOLUME:
            long = []
        else:
            name = _long_name(long) or _short_name(raw)
            high, low, size = struct.unpack_from("<H4xHI", raw, 20)
            yield _Entry(name, bool(raw[11] & _DIRECTORY), high << 16 | low, size)
            long = []


def _long_name(pieces: list[bytes]) -> str:
    return b"".join(pieces).decode("utf-16-le", "replace").split("\0")[0]


def _short_name(raw: bytes) -> str:
    base, extension = (part.decode("ascii", "replace").rstrip() for part in (raw[:8], raw[8:11]))
    return f"{base}.{extension}" if extension else base
