"""GRUB on a disk file: boot sector and core image for BIOS, and configurations that lead to the root file system.

The offsets are those of GRUB's own sources (the same from 2.00 to 2.12): `include/grub/i386/pc/boot.h` for the boot
sector, `include/grub/offsets.h` and `boot/i386/pc/diskboot.S` for the core image. `util/setup.c` (grub-bios-setup)
patches the same fields, but wants a block device to do it.
"""

from __future__ import annotations

import struct
from uuid import UUID

SECTOR = 512

_MBR_CODE_END = 440
"""Boot code ends here; the disk signature and the partition table of the MBR follow."""
_BPB_START = 0x3
_BPB_END = 0x5A
_KERNEL_SECTOR = 0x5C
_DRIVE_CHECK = 0x66
_NOP_NOP = b"\x90\x90"
_BLOCK_LIST = SECTOR - 12
"""The first entry of the list in diskboot.img: start (8 bytes), length (2) and segment (2) of the rest of the core."""
_CORE_SEGMENT = 0x820


def boot_sector(boot_img: bytes, mbr: bytes, core_start: int) -> bytes:
    """Sector 0 of a disk: the code of GRUB's boot.img over `mbr`, which keeps its partition table.

    `core_start` is the byte where the core image stands. Raises ValueError for a boot.img that isn't one.
    """
    if len(boot_img) != SECTOR or boot_img[510:] != b"\x55\xaa":
        raise ValueError("boot.img is not a boot sector")
    sector = bytearray(boot_img[:_MBR_CODE_END] + mbr[_MBR_CODE_END:SECTOR])
    struct.pack_into("<Q", sector, _KERNEL_SECTOR, core_start // SECTOR)
    # BIOSes that pass a wrong drive number are corrected by code behind this jump; on a hard disk it is taken out.
    sector[_DRIVE_CHECK : _DRIVE_CHECK + 2] = _NOP_NOP
    return bytes(sector)


def embedded_core(core: bytes, start: int, room: int) -> bytes:
    """GRUB's core image as it has to stand at byte `start` of a disk, where there are `room` bytes for it.

    Raises ValueError where it doesn't fit, or its first sector isn't diskboot.img.
    """
    core = core.ljust(-(-len(core) // SECTOR) * SECTOR, b"\0")
    if len(core) > room:
        raise ValueError(f"GRUB's core image has {len(core)} bytes, and there is room for {room}")
    _, length, segment = struct.unpack_from("<QHH", core, _BLOCK_LIST)
    if segment != _CORE_SEGMENT or length > len(core) // SECTOR:
        raise ValueError("the core image does not begin with diskboot.img")
    entry = struct.pack("<QHH", start // SECTOR + 1, len(core) // SECTOR - 1, segment)
    return core[:_BLOCK_LIST] + entry + core[SECTOR:]


def early_config(root: UUID) -> str:
    """How GRUB finds its directory on the root file system; in the core image (BIOS) and on the ESP (UEFI)."""
    return f"search.fs_uuid {root} root\nset prefix=($root)'/boot/grub'\n"


def efi_config(root: UUID) -> str:
    return early_config(root) + "configfile $prefix/grub.cfg\n"


SERIAL = """\
if [ "$grub_platform" = pc ]; then
  if serial --unit=0 --speed=115200; then
    terminal_input console serial
    terminal_output console serial
  fi
fi
"""
"""GRUB's menu on the serial port, under BIOS only: UEFI firmware mirrors its console there by itself."""


UNPACKERS = """\
if [ "$grub_platform" = xen ]; then
  insmod gzio
  insmod xzio
  insmod lzopio
fi
"""
"""In Xen's mode pv GRUB itself unpacks the kernel (10_linux writes the same); elsewhere kernels do that themselves."""


def first_config(root: UUID, cmdline: str) -> str:
    """The grub.cfg of a new image. The guest's own update-grub replaces it after a kernel upgrade."""
    return f"""\
set timeout=1
insmod part_gpt
insmod ext2
{UNPACKERS}search --no-floppy --fs-uuid --set=root {root}
{SERIAL}menuentry 'Debian GNU/Linux' {{
  linux /vmlinuz {cmdline}
  initrd /initrd.img
}}
"""


def xen_defaults(xen: str, consoles: str) -> str:
    """What the guest's own update-grub is to know, so that a later kernel boots under Xen as the first one did."""
    return (
        "# After a change: update-grub\n"
        "XEN_OVERRIDE_GRUB_DEFAULT=1\n"
        f'GRUB_CMDLINE_XEN="{xen}"\n'
        f'GRUB_CMDLINE_LINUX_XEN_REPLACE="{consoles}"\n'
    )


def first_xen_config(root: UUID, xen: str, cmdline: str) -> str:
    """The grub.cfg of a new image whose system is Xen's dom0: Xen with its own command line, then kernel and initrd.

    Multiboot 2, as GRUB's 20_linux_xen writes it, for the same image and the guest's later kernels.
    """
    return f"""\
set timeout=1
insmod part_gpt
insmod ext2
search --no-floppy --fs-uuid --set=root {root}
{SERIAL}menuentry 'Debian GNU/Linux, with Xen hypervisor' {{
  multiboot2 /boot/xen.gz placeholder {xen}
  module2 /vmlinuz placeholder {cmdline}
  module2 --nounzip /initrd.img
}}
"""
