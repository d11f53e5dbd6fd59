"""Which file system, or what else, is in a partition: by what it begins with; those of ext's family and FAT can be read.

Sources: the formats' own documentation, gathered in util-linux, libblkid/src/superblocks.
"""

from __future__ import annotations

import struct
from uuid import UUID

from polyvisor.images.inspection.budget import Unreadable
from polyvisor.images.inspection.disk import Area
from polyvisor.images.inspection.ext import MAGIC, MAGIC_AT, SUPERBLOCK, Ext
from polyvisor.images.inspection.fat import Fat
from polyvisor.images.inspection.files import Files
from polyvisor.values import dataclass

SWAP = "swap"
# What can hold a system and is not read here: name, offset, magic.
_OTHERS: tuple[tuple[str, int, bytes], ...] = (
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x10040, b"_BHRfS_M"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("squashfs", 0, b"hsqs"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("iso9660", 0x8001, b"CD001"),
    ("ufs", 0x1055C, b"\x19\x01\x54\x19"),
    ("bcachefs", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("jfs", 0x8000, b"JFS1"),
    ("reiserfs", 0x10034, b"ReIsEr2Fs"),
    ("reiserfs", 0x10034, b"ReIsEr3Fs"),
    ("RAID", 0x1000, b"\xfc\x4e\x2b\xa9"),
    ("RAID", 0, b"\xfc\x4e\x2b\xa9"),
)
_LVM, _LVM_TYPE = b"LABELONE", b"LVM2 001"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is in a partition: `files` where it can be read; otherwise `problem` says why not, if there is anything."""

    kind: str | None = None
    label: str | None = None
    uuid: str | None = None
    files: Files | None = None
    problem: str | None = None


def look(area: Area) -> Found:
    """What is in `area`; raises Spent alone."""
    try:
        return _look(area)
    except Unreadable as error:
        return Found(problem=str(error))


def _look(area: Area) -> Found:
    if _word(area, SUPERBLOCK + MAGIC_AT) == MAGIC:
        return _readable(area, "ext", Ext)
    for name, offset, magic in _OTHERS:
        if _begins(area, offset, magic):
            return Found(
                kind=name, problem=f"{name} can't be read here", uuid=_xfs_uuid(area) if name == "xfs" else None
            )
    for sector in range(4):
        if _begins(area, sector * 512, _LVM) and _begins(area, sector * 512 + 24, _LVM_TYPE):
            return Found(kind="LVM", problem="LVM can't be read here")
    if any(_begins(area, page - 10, magic) for page in (4096, 65536) for magic in (b"SWAPSPACE2", b"SWAP-SPACE")):
        return Found(kind=SWAP)
    if any(_begins(area, at, magic) for at, magic in ((82, b"FAT32"), (54, b"FAT1"), (54, b"FAT "))):
        return _readable(area, "vfat", Fat)
    return Found()


def _readable(area: Area, kind: str, reader: type[Ext] | type[Fat]) -> Found:
    try:
        files = reader(area)
    except Unreadable as error:
        return Found(kind=kind, problem=f"its {kind} file system can't be read: {error}")
    return Found(kind=files.kind, label=files.label, uuid=files.uuid, files=files)


def _begins(area: Area, offset: int, magic: bytes) -> bool:
    return offset + len(magic) <= area.size and area.at(offset, len(magic)) == magic


def _word(area: Area, offset: int) -> int | None:
    return int(struct.unpack("<H", area.at(offset, 2))[0]) if offset + 2 <= area.size else None


def _xfs_uuid(area: Area) -> str | None:
    return str(UUID(bytes=area.at(32, 16))) if area.size >= 48 else None
