"""A FAT32 file system with a few files in it, as an EFI system partition needs; made without mkfs or a mount.

The format is that of Microsoft's "FAT: General Overview of On-Disk Format" (version 1.03). Clusters are one sector, so
that even a small partition has the 65,525 clusters by which firmware recognizes FAT32. Names are 8.3 only: FAT ignores
case, so `EFI/debian/grub.cfg` is found as it is written there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

SECTOR = 512
_RESERVED = 32
_COPIES = 2
_ROOT_CLUSTER = 2
_MIN_CLUSTERS = 65525
_END_OF_CHAIN = 0x0FFFFFFF
_DIRECTORY = 0x10
_LOWER_CASE = 0x18
"""Windows NT's mark, which Linux honours: show base and extension in lower case."""
_DATE = 1 << 5 | 1
"""1 January 1980: a constant, so that equal content gives equal bytes."""


@dataclass
class _Directory:
    """A directory to be written: entries of names to bytes or further directories, and its first cluster."""

    entries: dict[str, bytes | _Directory] = field(default_factory=dict)
    cluster: int = 0


def fat32(size: int, files: Mapping[str, bytes], *, label: str = "ESP", serial: int = 0) -> bytes:
    """A file system of `size` bytes with `files` (path with `/` to content), cut after its last used byte.

    The rest is zeros. Raises ValueError where a name is not 8.3, the files don't fit or `size` is too small for FAT32.
    """
    sectors = size // SECTOR
    fat_sectors = _fat_sectors(sectors)
    clusters = sectors - _RESERVED - _COPIES * fat_sectors
    if clusters < _MIN_CLUSTERS:
        raise ValueError(f"{size} bytes are too few for FAT32")
    root = _tree(files)
    data, chains = _Writer(label).write(root)
    if len(chains) > clusters:
        raise ValueError(f"the files need {len(chains)} of {clusters} clusters")
    table = struct.pack(f"<{len(chains) + 2}I", 0x0FFFFFF8, _END_OF_CHAIN, *chains).ljust(fat_sectors * SECTOR, b"\0")
    boot = _boot_sector(sectors, fat_sectors, label, serial)
    info = _info_sector(clusters - len(chains), len(chains) + 2)
    head = (boot + info).ljust(6 * SECTOR, b"\0") + boot + info
    return head.ljust(_RESERVED * SECTOR, b"\0") + table * _COPIES + data


def short_name(name: str) -> bytes:
    """The 11 bytes of an 8.3 directory entry; raises ValueError for a name that does not fit."""
    base, _, extension = name.upper().partition(".")
    good = base.isascii() and base.isalnum() and (extension.isalnum() or not extension) and extension.isascii()
    if not good or len(base) > 8 or len(extension) > 3:
        raise ValueError(f"not an 8.3 name: {name}")
    return base.ljust(8).encode() + extension.ljust(3).encode()


def _fat_sectors(sectors: int) -> int:
    """How many sectors one table needs: 4 bytes for each cluster, and for two that don't exist."""
    return -(-(sectors - _RESERVED + 2) * 4 // (SECTOR + 4 * _COPIES))


def _tree(files: Mapping[str, bytes]) -> _Directory:
    root = _Directory()
    for path, content in files.items():
        *parents, name = path.split("/")
        directory = root
        for parent in parents:
            child = directory.entries.setdefault(parent, _Directory())
            if not isinstance(child, _Directory):
                raise ValueError(f"{path}: {parent} is a file")
            directory = child
        directory.entries[name] = content
    return root


class _Writer:
    """Lays directories and files out one after the other, so that each chain is a run of clusters."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._chains: list[int] = []
        self._data = bytearray()

    def write(self, root: _Directory) -> tuple[bytes, list[int]]:
        """The data area and, for each cluster from number 2 on, its entry in the table."""
        self._reserve(root, root=True)
        self._fill(root, parent=0, root=True)
        return bytes(self._data), self._chains

    def _allocate(self, length: int) -> int:
        first, count = _ROOT_CLUSTER + len(self._chains), -(-length // SECTOR)
        self._chains += [*range(first + 1, first + count), _END_OF_CHAIN]
        self._data += bytes(count * SECTOR)
        return first

    def _reserve(self, directory: _Directory, *, root: bool = False) -> None:
        directory.cluster = self._allocate(32 * (len(directory.entries) + (1 if root else 2)))
        for child in directory.entries.values():
            if isinstance(child, _Directory):
                self._reserve(child)

    def _fill(self, directory: _Directory, parent: int, *, root: bool = False) -> None:
        lines = list(self._entries(directory, parent, root))
        self._store(directory.cluster, b"".join(lines))
        for child in directory.entries.values():
            if isinstance(child, _Directory):
                self._fill(child, 0 if root else directory.cluster)

    def _entries(self, directory: _Directory, parent: int, root: bool) -> Iterator[bytes]:
        if root:
            yield _entry(self._label.upper().ljust(11).encode(), 0x08, 0, 0)
        else:
            yield _entry(b".".ljust(11), _DIRECTORY, directory.cluster, 0)
            yield _entry(b"..".ljust(11), _DIRECTORY, parent, 0)
        for name, child in directory.entries.items():
            case = _LOWER_CASE if name.islower() else 0
            if isinstance(child, _Directory):
                yield _entry(short_name(name), _DIRECTORY, child.cluster, 0, case)
            else:
                cluster = self._allocate(len(child)) if child else 0
                self._store(cluster, child)
                yield _entry(short_name(name), 0x20, cluster, len(child), case)

    def _store(self, cluster: int, content: bytes) -> None:
        start = (cluster - _ROOT_CLUSTER) * SECTOR
        if content:
            self._data[start : start + len(content)] = content


def _entry(name: bytes, attributes: int, cluster: int, size: int, case: int = 0) -> bytes:
    high, low = cluster >> 16, cluster & 0xFFFF
    return struct.pack("<11sBBBHHHHHHHI", name, attributes, case, 0, 0, _DATE, _DATE, high, 0, _DATE, low, size)


def _boot_sector(sectors: int, fat_sectors: int, label: str, serial: int) -> bytes:
    common = struct.pack(
        "<3s8sHBHBHHBHHHII",
        b"\xeb\x58\x90",
        b"POLYVISR",
        SECTOR,
        1,
        _RESERVED,
        _COPIES,
        0,
        0,
        0xF8,
        0,
        32,
        64,
        0,
        sectors,
    )
    extended = struct.pack(
        "<IHHIHH12sBBBI11s8s",
        fat_sectors,
        0,
        0,
        _ROOT_CLUSTER,
        1,
        6,
        b"",
        0x80,
        0,
        0x29,
        serial,
        label.upper().ljust(11).encode(),
        b"FAT32   ",
    )
    return (common + extended).ljust(510, b"\0") + b"\x55\xaa"


def _info_sector(free: int, next_free: int) -> bytes:
    return struct.pack("<I480sIII12sI", 0x41615252, b"", 0x61417272, free, next_free, b"", 0xAA550000)
