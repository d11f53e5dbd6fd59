"""VDI, VirtualBox's format: dynamic and fixed disks.

Source: VirtualBox, Storage/VDICore.h, and QEMU's block/vdi.c. Numbers are little-endian. A header of 512 bytes, a
map of 32-bit block numbers, then the blocks. Differencing and undo disks name a parent by its identifier.
"""

from __future__ import annotations

import struct

from polyvisor.images.formats.reader import FLATTEN, SECTOR, Disk, Format, Reader

MAGIC = b"\x7f\x10\xda\xbe"  # at offset 64, after a text for people
MAGIC_OFFSET = 64

_DYNAMIC, _FIXED = 1, 2
_UNUSED = 0xFFFFFFFE  # this: known to be zero; the next: never written
_BLOCK = 1 << 20
_MAX_BLOCKS = 16 << 20  # of 1 MiB each: 16 TiB, a map of 64 MiB


def inspect(reader: Reader) -> Disk:
    """What the VDI file holds; raises ImageRefused where it is unsound or needs another file."""
    version, _header_size, kind = reader.unpack("<III", 68)
    table, data, sector = reader.unpack("<II12xI", 340)
    size, block, extra, blocks, allocated = reader.unpack("<QIIII", 368)
    if version != 0x00010001:
        reader.refuse(f"VDI version {version >> 16}.{version & 0xFFFF}; only 1.1 is known here", hint=FLATTEN)
    if kind not in (_DYNAMIC, _FIXED) or any(reader.at(424, 32)):  # identifiers of link and parent
        reader.refuse("it needs another file (a differencing VDI)", hint=FLATTEN)
    if sector != SECTOR or block != _BLOCK or extra or blocks > _MAX_BLOCKS or allocated > blocks:
        reader.corrupt("tables of absurd sizes")
    disk = reader.disk(Format.VDI, size)
    if blocks * block < size:
        reader.corrupt("its map is too small for the disk")
    used = [
        entry for (entry,) in struct.iter_unpack("<I", reader.at(table, blocks * 4, "block map")) if entry < _UNUSED
    ]
    if used and max(used) >= allocated:
        reader.corrupt("its map leads past its blocks")
    if data + allocated * block > reader.size:
        reader.refuse("it is shorter than its disk", hint="it is truncated or corrupt: fetch it again")
    return disk
