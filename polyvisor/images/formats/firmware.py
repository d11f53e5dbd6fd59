"""What firmware a disk can boot with, from its partition tables: a guess by reading, nothing is run.

Sources: UEFI specification, chapter 5 (GPT, EFI system partition), and the classical master boot record.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from uuid import UUID

BIOS = "bios"
UEFI = "uefi"

Read = Callable[[int, int], bytes]  # offset, length → that many bytes as the guest sees them, or fewer at the end

_SECTOR = 512
_PROTECTIVE, _EFI_SYSTEM_MBR = 0xEE, 0xEF
_EFI_SYSTEM = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b").bytes_le
_BIOS_BOOT = UUID("21686148-6449-6e6f-744e-656564454649").bytes_le
_LEGACY_BOOTABLE = 1 << 2
_MAX_ENTRIES = 1024


def firmware_of(read: Read) -> tuple[str, ...]:
    """The firmware that the disk behind `read` is prepared for: "bios", "uefi" or both, in this order.

    Where nothing can be told, ("bios",): its own message on the console is the clearest.
    """
    record = read(0, _SECTOR)
    partitions = [record[446 + 16 * i : 462 + 16 * i] for i in range(4)] if record[510:512] == b"\x55\xaa" else []
    kinds = {partition[4] for partition in partitions}
    boot_code = any(record[:440])
    if _PROTECTIVE in kinds and (gpt := _gpt_types(read)):
        bios = boot_code and any(kind == _BIOS_BOOT or flags & _LEGACY_BOOTABLE for kind, flags in gpt)
        uefi = any(kind == _EFI_SYSTEM for kind, _ in gpt)
    else:
        bios = boot_code
        uefi = _EFI_SYSTEM_MBR in kinds
    return tuple(name for name, there in ((BIOS, bios), (UEFI, uefi)) if there) or (BIOS,)


def _gpt_types(read: Read) -> list[tuple[bytes, int]]:
    """Type and attributes of the partitions in a GPT; empty where there is none."""
    header = read(_SECTOR, 92)
    if len(header) < 92 or header[:8] != b"EFI PART":
        return []
    start, count, size = struct.unpack_from("<QII", header, 72)
    if not 128 <= size <= 4096 or count > _MAX_ENTRIES or start > 1 << 40:
        return []
    table = read(start * _SECTOR, count * size)
    entries = [table[i : i + size] for i in range(0, len(table) - 127, size)]
    return [(e[:16], struct.unpack_from("<Q", e, 48)[0]) for e in entries if len(e) >= 128 and any(e[:16])]
