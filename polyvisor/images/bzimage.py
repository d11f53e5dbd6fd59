"""The head of a Linux kernel for x86 (bzImage): how the kernel proper inside is packed, and whether GRUB can unpack that.

Source: Linux, Documentation/arch/x86/boot.rst ("The real-mode kernel header").
"""

from __future__ import annotations

import struct
from pathlib import Path

GRUB_UNPACKS = frozenset({"gzip", "xz", "lzo", "none"})
"""What GRUB unpacks itself, as it must in Xen's mode pv (grub-core/loader/i386/xen_fileXX.c and its io modules)."""
_HEADER = 0x250
_SECTOR = 512
_ELF = b"\x7fELF"


def payload_start(head: bytes) -> int:
    """Where in a bzImage, of which `head` is the beginning, what is packed begins."""
    (offset,) = struct.unpack_from("<I", head, 0x248)
    return int(((head[0x1F1] or 4) + 1) * _SECTOR + offset)


def packing(kernel: Path) -> str | None:
    """How the kernel in the bzImage at `kernel` is packed, by `unpacking.MAGICS`, or none; None for one that can't be told."""
    from polyvisor.images.inspection.unpacking import packing_of

    with kernel.open("rb") as file:
        head = file.read(_HEADER)
        if len(head) < _HEADER or head[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", head, 0x206)[0] < 0x208:
            return None
        file.seek(payload_start(head))
        begin = file.read(8)
    return "none" if begin.startswith(_ELF) else packing_of(begin)
