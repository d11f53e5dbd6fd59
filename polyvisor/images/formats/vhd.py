"""VHD, the format of Virtual PC, Azure and older Hyper-V: fixed and dynamic disks.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0 (2006). Numbers are big-endian. A footer of
512 bytes ends every VHD; a dynamic disk repeats it at the start, where QEMU looks first, and goes on with a dynamic
header. A differencing disk (type 4) names a parent file.
"""

from __future__ import annotations

import struct

from polyvisor.images.formats.reader import FLATTEN, SECTOR, Disk, Format, Reader

MAGIC = b"conectix"

_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
_UNUSED = 0xFFFFFFFF
_MAX_ENTRIES = 4 << 20  # blocks of 2 MiB: 8 TiB, four times what the format's tools allow


def inspect(reader: Reader) -> Disk:
    """What the VHD file holds; raises ImageRefused where it is unsound or needs another file."""
    dynamic = reader.upto(0, 8) == MAGIC
    footer = reader.at(0 if dynamic else reader.size - SECTOR, SECTOR, "VHD footer")
    if struct.unpack_from(">I", footer, 64)[0] != _checksum(footer, 64):
        reader.corrupt("the checksum of its VHD footer is wrong")
    data_offset, current_size, kind = struct.unpack_from(">Q24xQ4xI", footer, 16)
    if kind == _DIFFERENCING:
        reader.refuse("it needs another file (a differencing VHD)", hint=FLATTEN)
    if kind != (_DYNAMIC if dynamic else _FIXED):
        reader.corrupt(f"a VHD of type {kind}")
    if dynamic:
        _check_dynamic(reader, data_offset, current_size)
    elif current_size > reader.size - SECTOR:
        reader.refuse("it is shorter than its disk", hint="it is truncated or corrupt: fetch it again")
    return reader.disk(Format.VHD, current_size)


def _checksum(data: bytes, position: int) -> int:
    """The one's complement of the sum of all bytes but the four of the checksum itself."""
    return ~(sum(data) - sum(data[position : position + 4])) & 0xFFFFFFFF


def _check_dynamic(reader: Reader, offset: int, size: int) -> None:
    header = reader.at(offset, 1024, "VHD dynamic header")
    table, entries, block = struct.unpack_from(">Q4xII", header, 16)
    if header[:8] != b"cxsparse" or struct.unpack_from(">I", header, 36)[0] != _checksum(header, 36):
        reader.corrupt("its VHD dynamic header is damaged")
    if any(header[40:56]) or any(header[64:768]):  # the parent's identifier, name and locators
        reader.refuse("it needs another file (a VHD with a parent)", hint=FLATTEN)
    if block < SECTOR or block & (block - 1) or block > 256 << 20 or entries > _MAX_ENTRIES:
        reader.corrupt("tables of absurd sizes")
    if entries * block < size:
        reader.corrupt("its table is too small for the disk")
    used = [entry for entry in struct.unpack(f">{entries}I", reader.at(table, entries * 4, "block table"))
            if entry != _UNUSED]  # fmt: skip
    bitmap = -(-block // SECTOR // 8 // SECTOR) * SECTOR
    # The last block may end with the disk rather than be written whole.
    last = min(block, size % block or block)
    if used and max(used) * SECTOR + bitmap + last > reader.size:
        reader.refuse("it is shorter than its disk", hint="it is truncated or corrupt: fetch it again")
