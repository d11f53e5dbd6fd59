"""qcow2, QEMU's own format, versions 2 and 3.

Source: QEMU, docs/interop/qcow2.txt. All numbers are big-endian. The header lies at offset 0; what follows it, up
to the end of the first cluster, is a list of extensions (type, length, data padded to 8 bytes).

A qcow2 file can name other files in two ways: a backing file, and (incompatible feature bit 2) an external data file.
"""

from __future__ import annotations

from polyvisor.images.formats.reader import FLATTEN, Disk, Format, Reader

MAGIC = b"QFI\xfb"

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
_RAW_DATA = 1 << 1  # autoclear: the external data file is a raw image
_END, _DATA_FILE_NAME, _ENCRYPTION = 0x00000000, 0x44415441, 0x0537BE77
_MAX_L1 = 32 << 20  # bytes; QEMU's own limit, as the next
_MAX_REFTABLE = 8 << 20
_MAX_SNAPSHOTS = 65536


def inspect(reader: Reader, *, backed: bool = False) -> Disk:
    """What the qcow2 file holds; raises ImageRefused where it is unsound, encrypted or needs another file.

    A disk of ours is `backed`: whoever opens it says himself what is below it, whatever it says of that.
    """
    version, backing, backing_length, cluster_bits, size, crypt, l1_size = reader.unpack(">IQIIQII", 4)
    if version not in (2, 3):
        reader.refuse(f"qcow version {version}", hint="convert it with qemu-img convert -O qcow2 OLD NEW")
    if (backing or backing_length) and not backed:
        reader.refuse("it needs another file (a qcow2 backing file)", hint=FLATTEN)
    if crypt:
        reader.refuse("it is encrypted", hint="decrypt it where it was made (qemu-img convert with its secret)")
    if not 9 <= cluster_bits <= 21:
        reader.corrupt(f"clusters of 2^{cluster_bits} bytes")
    header_length = 72
    if version == 3:
        header_length = _check_version_3(reader, 1 << cluster_bits)
    _check_extensions(reader, header_length, 1 << cluster_bits)
    disk = reader.disk(Format.QCOW2, size)
    _check_tables(reader, cluster_bits, size, l1_size)
    return disk


def is_plain(reader: Reader) -> bool:
    """Whether the clusters of a file that `inspect` accepts are of the old kind: zlib's if compressed, no subclusters."""
    version = reader.unpack(">I", 4)[0]
    return version == 2 or not reader.unpack(">Q", 72)[0] & (_COMPRESSION | _EXTENDED_L2)


def _check_version_3(reader: Reader, cluster: int) -> int:
    """Check what version 3 added to the header; returns the header's length."""
    incompatible, _compatible, autoclear, refcount_order, length = reader.unpack(">QQQII", 72)
    if incompatible & _DATA_FILE or autoclear & _RAW_DATA:
        reader.refuse("it needs another file (a qcow2 external data file)", hint=FLATTEN)
    if incompatible & ~_KNOWN:
        reader.refuse(f"it has qcow2 features that are not known here (0x{incompatible & ~_KNOWN:x})", hint=FLATTEN)
    if incompatible & _CORRUPT:
        reader.refuse("it is marked as corrupt", hint="repair a copy of it: qemu-img check -r all FILE")
    if refcount_order > 6:
        reader.corrupt(f"reference counts of 2^{refcount_order} bits")
    if length < 104 or length % 8 or length > cluster:
        reader.corrupt(f"a header of {length} bytes")
    if incompatible & _COMPRESSION and (length < 105 or reader.at(104, 1)[0] > 1):
        reader.corrupt("an unknown kind of compression")
    return int(length)


def _check_extensions(reader: Reader, offset: int, end: int) -> None:
    """Walk the header extensions, which lie between the header and the end of the first cluster."""
    while offset + 8 <= min(end, reader.size):
        kind, length = reader.unpack(">II", offset)
        if kind == _END:
            return
        if kind == _DATA_FILE_NAME:
            reader.refuse("it names another file (a qcow2 external data file)", hint=FLATTEN)
        if kind == _ENCRYPTION:
            reader.refuse("it is encrypted", hint="decrypt it where it was made (qemu-img convert with its secret)")
        if length > end - offset - 8:
            reader.corrupt("a header extension longer than the header")
        offset += 8 + (length + 7) // 8 * 8


def _check_tables(reader: Reader, cluster_bits: int, size: int, l1_size: int) -> None:
    """The tables that QEMU loads whole must lie in the file and have sizes that fit the disk."""
    l1_offset, reftable, reftable_clusters, snapshots, snapshots_offset = reader.unpack(">QQIIQ", 40)
    cluster = 1 << cluster_bits
    extended = reader.unpack(">Q", 72)[0] & _EXTENDED_L2 if reader.unpack(">I", 4)[0] == 3 else 0
    covered = cluster * (cluster // (16 if extended else 8))  # by one L1 entry, which leads to one cluster of L2
    if l1_size < -(-size // covered):
        reader.corrupt("its first table is too small for the disk")
    if l1_size * 8 > _MAX_L1 or reftable_clusters * cluster > _MAX_REFTABLE or snapshots > _MAX_SNAPSHOTS:
        reader.corrupt("tables of absurd sizes")
    for what, offset, length in (
        ("first table", l1_offset, l1_size * 8),
        ("reference count table", reftable, reftable_clusters * cluster),
        ("list of snapshots", snapshots_offset, snapshots * 40),
    ):
        if length and (offset % cluster or offset < cluster):
            reader.corrupt(f"its {what} is at an odd place")
        if offset + length > reader.size and length:
            reader.refuse(f"its {what} lies past its end", hint="it is truncated or corrupt: fetch it again")
    if not reftable_clusters:
        reader.corrupt("it has no reference counts")
