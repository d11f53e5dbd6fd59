"""What the firmware of a PC finds on a disk: boot code in its first sector, loaders on its EFI system partition.

Sources: UEFI specification 2.10, 3.5.1.1 (the removable media boot path, which a firmware without boot entries takes);
for the place of GRUB's core image, GRUB's include/grub/i386/pc/boot.h.
"""

from __future__ import annotations

import struct

from polyvisor.images.inspection.budget import Unreadable
from polyvisor.images.inspection.disk import Area
from polyvisor.images.inspection.files import Files, listing
from polyvisor.images.inspection.findings import FirmwareFound
from polyvisor.images.inspection.table import BIOS, ESP, Table

REMOVABLE = "/EFI/BOOT/BOOTX64.EFI"
_GRUB_CORE_AT = 0x5C
_MAX_LOADERS = 12


def firmware_found(disk: Area, table: Table, esps: list[Files | str]) -> FirmwareFound:
    """What firmware finds; `esps` are the EFI system partitions' files, or why they can't be read."""
    files = [esp for esp in esps if not isinstance(esp, str)]
    problems = [esp for esp in esps if isinstance(esp, str)]
    return FirmwareFound(
        table=table.scheme,
        boot_code=_boot_code(disk, table),
        bios_boot=any(entry.kind == BIOS or entry.bootable for entry in table.entries),
        esp=any(entry.kind == ESP for entry in table.entries),
        removable=any(esp.exists(REMOVABLE) for esp in files),
        loaders=tuple(loader for esp in files for loader in _loaders(esp))[:_MAX_LOADERS],
        problem=problems[0] if problems and not files else table.problem,
    )


def _boot_code(disk: Area, table: Table) -> str:
    """Whose the boot code is; GRUB's is looked at further: it is of no use without the core image that it leads to."""
    if table.boot_code != "GRUB":
        return table.boot_code
    try:
        (sector,) = disk.unpack("<Q", _GRUB_CORE_AT)
        return "GRUB" if any(disk.at(sector * 512, 512)) else "GRUB without its core image"
    except (Unreadable, struct.error):
        return "GRUB without its core image"


def _loaders(esp: Files) -> list[str]:
    """The programs in the directories below \\EFI, but for that of the removable path."""
    found = []
    for vendor in listing(esp, "/EFI")[:_MAX_LOADERS]:
        if vendor.upper() != "BOOT":
            names = [name for name in listing(esp, f"/EFI/{vendor}") if name.lower().endswith(".efi")]
            found += [f"\\EFI\\{vendor}\\{name}" for name in names]
    return found
