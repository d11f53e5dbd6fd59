"""The head of a Linux kernel for x86 (bzImage): how the kernel proper inside is packed.

Source: Linux, Documentation/arch/x86/boot.rst ("The real-mode kernel header").
"""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER = 0x250
_SECTOR = 512
# What each packer writes first.
MAGICS = {
    "gzip": b"\x1f\x8b",
    "xz": b"\xfd7zXZ\0",
    "lzma": b"\x5d\0\0",
    "bzip2": b"BZh",
    "lzo": b"\x89LZO\0",
    "lz4": b"\x02\x21\x4c\x18",
    "zstd": b"\x28\xb5\x2f\xfd",
    "none": b"\x7fELF",
}


def packing(kernel: Path) -> str | None:
    """How the kernel in the bzImage at `kernel` is packed, a key of MAGICS; None where that can't be told."""
    with kernel.open("rb") as file:
        head = file.read(_HEADER)
        if len(head) < _HEADER or head[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", head, 0x206)[0] < 0x208:
            return None
        (offset,) = struct.unpack_from("<I", head, 0x248)
        file.seek(((head[0x1F1] or 4) + 1) * _SECTOR + offset)
        begin = file.read(8)
    return next((name for name, magic in MAGICS.items() if begin.startswith(magic)), None)
