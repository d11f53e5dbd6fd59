"""VHDX, Hyper-V's format.

Source: Microsoft, [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format". Numbers are little-endian. A region table at
192 KiB leads to the metadata region, whose table leads to the disk's size and to the file parameters, where a flag
tells of a parent.
"""

from __future__ import annotations

from uuid import UUID

from polyvisor.images.formats.reader import FLATTEN, Disk, Format, Reader

MAGIC = b"vhdxfile"

_REGION_TABLE = 192 << 10
_BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
_METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_SECTOR_SIZE = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
_PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_MAX_ENTRIES = 2047
_HAS_PARENT = 1 << 1


def inspect(reader: Reader) -> Disk:
    """What the VHDX file holds; raises ImageRefused where it is unsound or needs another file."""
    regions = _regions(reader)
    if _METADATA not in regions or _BAT not in regions:
        reader.corrupt("its VHDX region table leads nowhere")
    for offset, length in regions.values():
        if offset + length > reader.size:
            reader.refuse("it ends before its tables", hint="it is truncated or corrupt: fetch it again")
    items = _items(reader, *regions[_METADATA])
    if _FILE_PARAMETERS not in items or _DISK_SIZE not in items:
        reader.corrupt("its VHDX metadata lacks the disk's size")
    block, flags = reader.unpack("<II", items[_FILE_PARAMETERS])
    if flags & _HAS_PARENT or _PARENT_LOCATOR in items:
        reader.refuse("it needs another file (a differencing VHDX)", hint=FLATTEN)
    if not 1 << 20 <= block <= 256 << 20 or block & (block - 1):
        reader.corrupt(f"blocks of {block} bytes")
    if _SECTOR_SIZE in items and (sector := reader.unpack("<I", items[_SECTOR_SIZE])[0]) != 512:
        reader.refuse(f"a disk with sectors of {sector} bytes; only 512 can be imported")
    return reader.disk(Format.VHDX, reader.unpack("<Q", items[_DISK_SIZE])[0])


def _regions(reader: Reader) -> dict[UUID, tuple[int, int]]:
    """Offset and length of each region by its identifier."""
    signature, _checksum, count = reader.unpack("<4sII", _REGION_TABLE, "region table")
    if signature != b"regi" or count > _MAX_ENTRIES:
        reader.corrupt("its VHDX region table is damaged")
    regions = {}
    for index in range(count):
        raw, offset, length, required = reader.unpack("<16sQII", _REGION_TABLE + 16 + 32 * index, "region table")
        region = UUID(bytes_le=raw)
        if required & 1 and region not in (_BAT, _METADATA):
            reader.refuse("it has VHDX regions that are not known here", hint=FLATTEN)
        regions[region] = (offset, length)
    return regions


def _items(reader: Reader, start: int, length: int) -> dict[UUID, int]:
    """Where in the file each metadata item lies, by its identifier."""
    signature, count = reader.unpack("<8s2xH", start, "metadata")
    if signature != b"metadata" or count > _MAX_ENTRIES:
        reader.corrupt("its VHDX metadata is damaged")
    items = {}
    for index in range(count):
        raw, offset, size = reader.unpack("<16sII", start + 32 + 32 * index, "metadata")
        if offset + size > length:
            reader.corrupt("its VHDX metadata is damaged")
        items[UUID(bytes_le=raw)] = start + offset
    return items
