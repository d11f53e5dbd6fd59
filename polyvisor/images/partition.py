"""A GUID partition table, written from nothing into a raw disk file.

The layout follows UEFI specification 2.10, chapter 5: a protective MBR in sector 0, the primary header in sector 1 and
its 128 entries in sectors 2 to 33, and a copy of both at the end of the disk. Sectors are 512 bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from uuid import UUID

from polyvisor.values import dataclass

SECTOR = 512
MIB = 1 << 20

BIOS_BOOT = UUID("21686148-6449-6e6f-744e-656564454649")
EFI_SYSTEM = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX_ROOT_X86_64 = UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")

_ENTRIES = 128
_ENTRY_SIZE = 128
_ENTRY_SECTORS = _ENTRIES * _ENTRY_SIZE // SECTOR
_FIRST_USABLE = 2 + _ENTRY_SECTORS


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition: `number` as the kernel counts, `start` and `size` in bytes (whole sectors)."""

    number: int
    kind: UUID
    uuid: UUID
    name: str
    start: int
    size: int


def gpt(disk_uuid: UUID, disk_size: int, partitions: Sequence[Partition]) -> tuple[bytes, bytes]:
    """The partition table of a disk of `disk_size` bytes: what stands at its beginning, and in its last 33 sectors.

    Raises ValueError where partitions overlap each other or the table, or are not whole sectors.
    """
    sectors = disk_size // SECTOR
    _check(partitions, sectors)
    entries = _entries(partitions)
    primary = _header(disk_uuid, sectors, entries, here=1, other=sectors - 1, table=2)
    backup = _header(disk_uuid, sectors, entries, here=sectors - 1, other=1, table=sectors - 1 - _ENTRY_SECTORS)
    return protective_mbr(sectors) + primary + entries, entries + backup


def protective_mbr(sectors: int) -> bytes:
    """Sector 0 of a GPT disk: one partition of type 0xEE over the whole disk, and the boot signature."""
    size = min(sectors - 1, 0xFFFFFFFF)
    entry = struct.pack("<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, size)
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


def _check(partitions: Sequence[Partition], sectors: int) -> None:
    end = _FIRST_USABLE * SECTOR
    for partition in sorted(partitions, key=lambda each: each.start):
        if partition.start < end or partition.start % SECTOR or partition.size % SECTOR or partition.size <= 0:
            raise ValueError(f"partition {partition.number} does not fit at byte {partition.start}")
        end = partition.start + partition.size
    if end > (sectors - 1 - _ENTRY_SECTORS) * SECTOR:
        raise ValueError(f"the partitions need {end} bytes and the table behind them")


def _entries(partitions: Sequence[Partition]) -> bytes:
    table = bytearray(_ENTRIES * _ENTRY_SIZE)
    for each in partitions:
        first, last = each.start // SECTOR, (each.start + each.size) // SECTOR - 1
        name = each.name.encode("utf-16-le")
        struct.pack_into(
            "<16s16sQQQ72s",
            table,
            (each.number - 1) * _ENTRY_SIZE,
            each.kind.bytes_le,
            each.uuid.bytes_le,
            first,
            last,
            0,
            name,
        )
    return bytes(table)


def _header(disk_uuid: UUID, sectors: int, entries: bytes, *, here: int, other: int, table: int) -> bytes:
    """One header sector; its CRC is computed with the CRC field as zero."""

    def fields(crc: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII",
            b"EFI PART",
            0x00010000,
            92,
            crc,
            0,
            here,
            other,
            _FIRST_USABLE,
            sectors - 2 - _ENTRY_SECTORS,
            disk_uuid.bytes_le,
            table,
            _ENTRIES,
            _ENTRY_SIZE,
            zlib.crc32(entries),
        )

    return fields(zlib.crc32(fields(0))).ljust(SECTOR, b"\0")
