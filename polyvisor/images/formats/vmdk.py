"""VMDK, VMware's format: hosted sparse extents that carry their own descriptor.

Source: VMware, "Virtual Disk Format 5.0" (technical note), and QEMU's block/vmdk.c for what QEMU itself would
follow. A VMDK is described by a text, the descriptor, which lists *extents*: files with the data. Only where
descriptor and the one extent are a single file (createType monolithicSparse or streamOptimized) does it stand on
its own; every other kind names files, possibly any file of the host. Numbers are little-endian; offsets and sizes
count sectors of 512 bytes.

QEMU takes a header with capacity 0 as a reason to follow the embedded descriptor, looks for a parent in the 20
sectors after the header wherever the descriptor is said to be, and lets the footer of a stream replace the header:
all three are checked.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from polyvisor.images.formats.reader import FLATTEN, SECTOR, Disk, Format, Reader

MAGIC = b"KDMV"
ESX_MAGIC = b"COWD"
TEXT = b"# disk descriptorfile"  # compared in lower case

_LINE_ENDS = b"\n \r\n"  # in every header: shows when a transfer as text has changed it
_GD_AT_END = 0xFFFFFFFFFFFFFFFF
_FOOTER, _END_OF_STREAM = 3, 0
_MAX_DESCRIPTOR = 1 << 20
_EXTENT = re.compile(r"\s*(?:RW|RDONLY|NOACCESS)\s+(\d+)\s+([A-Z]+)\b\s*(?:\"([^\"]*)\")?", re.IGNORECASE)


class _Header(NamedTuple):
    """The fixed part of a sparse extent's header, after the magic."""

    version: int
    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_size: int
    entries: int
    spare_directory: int
    directory: int
    overhead: int
    unclean: int
    line_ends: bytes
    compression: int


def inspect(reader: Reader) -> Disk:
    """What the VMDK file holds; raises ImageRefused where it is unsound or needs another file."""
    header = _header(reader, 0)
    _check_header(reader, header)
    _check_descriptor(reader, header)
    if header.directory == _GD_AT_END:
        header = _footer(reader)
        _check_header(reader, header)
        if header.directory == _GD_AT_END:
            reader.corrupt("its footer has no grain directory")
    _check_directory(reader, header)
    return reader.disk(Format.VMDK, header.capacity * SECTOR)


def refuse_descriptor(reader: Reader) -> Disk:
    """A descriptor alone: its data is in other files, whatever they are called."""
    reader.refuse("it is only the description of a VMDK disk, whose data is in other files", hint=FLATTEN)


def refuse_esx(reader: Reader) -> Disk:
    reader.refuse("it is an ESX sparse extent (COWD), a part of a disk", hint=FLATTEN)


def _header(reader: Reader, offset: int) -> _Header:
    return _Header(*reader.unpack("<IIQQQQIQQQB4sH", offset + 4))


def _check_header(reader: Reader, header: _Header) -> None:
    if header.line_ends != _LINE_ENDS:
        reader.corrupt("its VMDK header is damaged (was it transferred as text?)")
    if header.capacity == 0 or header.descriptor == 0:
        reader.refuse("it is a part of a VMDK disk, whose data is in other files", hint=FLATTEN)
    if not 1 <= header.version <= 3 or header.compression not in (0, 1):
        reader.refuse(f"VMDK version {header.version}, compression {header.compression}", hint=FLATTEN)
    if not 1 <= header.grain <= 2048 or header.grain & (header.grain - 1) or not 1 <= header.entries <= 512:
        reader.corrupt("tables of absurd sizes")


def _check_descriptor(reader: Reader, header: _Header) -> None:
    """The embedded descriptor may tell of one sparse extent, this file, and of no parent."""
    size = header.descriptor_size * SECTOR
    if not 0 < size <= _MAX_DESCRIPTOR:
        reader.corrupt("a VMDK descriptor of absurd size")
    raw = reader.at(header.descriptor * SECTOR, size, "VMDK descriptor")
    if b"parentfilenamehint" in (raw + reader.upto(SECTOR, 20 * SECTOR)).lower():
        reader.refuse("it needs another file (a VMDK parent disk)", hint=FLATTEN)
    text = raw.split(b"\0", 1)[0].decode("latin-1")
    settings = dict(re.findall(r"^[ \t]*(\w+)[ \t]*=[ \t]*\"?([^\"\r\n]*)", text, re.MULTILINE))
    if settings.get("parentCID", "ffffffff").strip().lower() != "ffffffff":
        reader.refuse("it needs another file (a VMDK parent disk)", hint=FLATTEN)
    if (kind := settings.get("createType", "")) not in ("monolithicSparse", "streamOptimized"):
        reader.refuse(f"it is a VMDK of type '{kind[:40]}', whose data may be in other files", hint=FLATTEN)
    extents = [match for line in text.splitlines() if (match := _EXTENT.match(line))]
    if len(extents) != 1 or extents[0][2].upper() != "SPARSE":
        reader.refuse("its VMDK descriptor names other files", hint=FLATTEN)
    if re.search(r"[/\\:]", extents[0][3] or ""):
        reader.refuse("its VMDK descriptor names a file in another place", hint=FLATTEN)


def _footer(reader: Reader) -> _Header:
    """The header at the end of a stream: footer marker, header and end-of-stream marker are its last three sectors."""
    start = reader.size - 3 * SECTOR
    if reader.size % SECTOR or start < SECTOR or reader.at(start + SECTOR, 4) != MAGIC:
        reader.refuse("the end of the stream is missing", hint="it is truncated or corrupt: fetch it again")
    for offset, kind in ((start, _FOOTER), (start + 2 * SECTOR, _END_OF_STREAM)):
        if reader.unpack("<II", offset + 8) != (0, kind):
            reader.corrupt("the end of the stream is damaged")
    return _header(reader, start + SECTOR)


def _check_directory(reader: Reader, header: _Header) -> None:
    """The grain directory (and the table of each entry) must lie in the file."""
    count = -(-header.capacity // (header.grain * header.entries))
    if count * 4 > 32 << 20:
        reader.corrupt("tables of absurd sizes")
    if header.overhead * SECTOR > reader.size:
        reader.refuse("it ends before its data begins", hint="it is truncated or corrupt: fetch it again")
    reader.at(header.directory * SECTOR, count * 4, "VMDK grain directory")
