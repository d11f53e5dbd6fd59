"""Partition tables: GUID partition tables, and master boot records with their chains of logical partitions.

Sources: UEFI specification 2.10, chapter 5; for the MBR, Linux, block/partitions/msdos.c, which numbers partitions so, and
whose PARTUUID is the disk's signature and the number.
"""

from __future__ import annotations

import struct
from uuid import UUID

from polyvisor.images.inspection.budget import Unreadable
from polyvisor.images.inspection.disk import Area
from polyvisor.images.partition import BIOS_BOOT, EFI_SYSTEM, SECTOR
from polyvisor.values import dataclass

MAX_PARTITIONS = 128
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
_EFI_SYSTEM_MBR = 0xEF
_MAX_LOGICAL = 60
_LEGACY_BOOTABLE = 1 << 2
_BOOT_CODE = {b"GRUB": "GRUB", b"SYSLINUX": "SYSLINUX", b"LILO": "LILO", b"isolinux": "ISOLINUX"}
ESP, BIOS = "EFI system", "BIOS boot"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A partition: `start` and `size` in bytes; `kind` is ESP, BIOS or the type as the table has it.

    `bootable` is GPT's mark for code in the first sector that looks for a boot sector in it.
    """

    number: int
    start: int
    size: int
    kind: str
    partuuid: str
    name: str | None = None
    bootable: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """`scheme` is gpt, mbr or none; `boot_code`: whose the code in the first sector is, "none" where there is none."""

    scheme: str
    boot_code: str
    entries: tuple[Entry, ...] = ()
    problem: str | None = None


def read_table(disk: Area) -> Table:
    """The partition table of a disk; one that is damaged is a table without entries and a `problem`."""
    record = disk.at(0, min(SECTOR, disk.size)).ljust(SECTOR, b"\0")
    code = boot_code(record)
    if record[510:] != b"\x55\xaa":
        return Table(scheme="none", boot_code="none")
    try:
        if any(record[446 + 16 * i + 4] == _PROTECTIVE for i in range(4)):
            return Table(scheme="gpt", boot_code=code, entries=_gpt(disk))
        entries = _mbr(disk, record)
        return Table(scheme="mbr" if entries else "none", boot_code=code, entries=entries)
    except Unreadable as error:
        return Table(scheme="damaged", boot_code=code, problem=f"its partition table can't be read: {error}")


def boot_code(sector: bytes) -> str:
    """Whose code a boot sector has, as far as it says so itself."""
    if not any(sector[:440]):
        return "none"
    return next((name for magic, name in _BOOT_CODE.items() if magic in sector[:440]), "unknown")


def _gpt(disk: Area) -> tuple[Entry, ...]:
    header = disk.at(SECTOR, 92)
    if header[:8] != b"EFI PART":
        raise Unreadable("the GPT's header is not there")
    start, count, size = struct.unpack_from("<QII", header, 72)
    if not 128 <= size <= 4096 or size % 8:
        raise Unreadable("the GPT has entries of odd sizes")
    entries = []
    for index in range(min(count, MAX_PARTITIONS)):
        raw = disk.at(start * SECTOR + index * size, 128)
        if any(raw[:16]):
            entries.append(_gpt_entry(index + 1, raw))
    return tuple(entries)


def _gpt_entry(number: int, raw: bytes) -> Entry:
    first, last, flags = struct.unpack_from("<QQQ", raw, 32)
    kind = UUID(bytes_le=raw[:16])
    named = {EFI_SYSTEM: ESP, BIOS_BOOT: BIOS}.get(kind, str(kind))
    return Entry(
        number=number,
        start=first * SECTOR,
        size=(last - first + 1) * SECTOR,
        kind=named,
        bootable=bool(flags & _LEGACY_BOOTABLE),
        partuuid=str(UUID(bytes_le=raw[16:32])),
        name=raw[56:128].decode("utf-16-le", "replace").split("\0")[0] or None,
    )


def _mbr(disk: Area, record: bytes) -> tuple[Entry, ...]:
    signature = struct.unpack_from("<I", record, 440)[0]
    entries = []
    for index in range(4):
        kind, start, size = _slot(record, index)
        if kind in _EXTENDED:
            entries += _logical(disk, start, signature)
        elif kind and size:
            entries.append(_mbr_entry(index + 1, kind, start, size, signature))
    return tuple(sorted(entries, key=lambda entry: entry.number))


def _slot(record: bytes, index: int) -> tuple[int, int, int]:
    """Type, and start and size in sectors, of an entry."""
    kind, start, size = struct.unpack_from("<4xB3xII", record, 446 + 16 * index)
    return kind, start, size


def _mbr_entry(number: int, kind: int, start: int, size: int, signature: int) -> Entry:
    return Entry(
        number=number,
        start=start * SECTOR,
        size=size * SECTOR,
        kind=ESP if kind == _EFI_SYSTEM_MBR else f"0x{kind:02x}",
        partuuid=f"{signature:08x}-{number:02x}",
    )


def _logical(disk: Area, base: int, signature: int) -> list[Entry]:
    """The chain of logical partitions: each record leads to its partition and to the next record."""
    entries: list[Entry] = []
    seen: set[int] = set()
    record_at = base
    while len(seen) < _MAX_LOGICAL and record_at not in seen:
        seen.add(record_at)
        record = disk.at(record_at * SECTOR, SECTOR)
        kind, start, size = _slot(record, 0)
        if record[510:] != b"\x55\xaa":
            break
        if kind and size:
            entries.append(_mbr_entry(5 + len(entries), kind, record_at + start, size, signature))
        kind, start, size = _slot(record, 1)
        if kind not in _EXTENDED or not start:
            break
        record_at = base + start
    return entries
