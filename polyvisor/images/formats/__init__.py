"""What a disk image is, told from its content alone, and whether it may be opened at all.

A disk image is a program for the reader: formats can name other files to be read as part of the disk, and qemu-img
follows them. So before qemu-img sees a file, its headers are parsed here, in Python, with bounded reads; whatever
reaches outside the file, is encrypted, cut off, or not understood is refused. Names and extensions count for
nothing. A file that begins like no known format is taken for a raw disk only with a boot signature, or where the
user said so: then it is data, never probed.

`inspect` is pure: it reads, and returns a `Disk` or raises ImageRefused. See docs/design/untrusted-images.md.
"""

from __future__ import annotations

from enum import StrEnum

from polyvisor.errors import InvalidInput
from polyvisor.images.formats import ova, qcow2, tar, vdi, vhd, vhdx, vmdk
from polyvisor.images.formats.reader import MAX_DISK, SECTOR, Disk, Format, Reader

__all__ = ["MAX_DISK", "Compression", "Disk", "Format", "Reader", "compression_of", "detect", "inspect", "parse_format"]


class Compression(StrEnum):
    """How a whole file is compressed; the values are the usual extensions."""

    GZIP = "gz"
    BZIP2 = "bz2"
    XZ = "xz"
    ZSTD = "zst"


_COMPRESSIONS = {
    b"\x1f\x8b\x08": Compression.GZIP,
    b"BZh": Compression.BZIP2,
    b"\xfd7zXZ\0": Compression.XZ,
    b"\x28\xb5\x2f\xfd": Compression.ZSTD,
}

_UNPACK = "unpack it, and import the disk image in it"
# What people hand in by mistake: the start of the file, what that is, and what to do.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "compressed with LZ4", "unpack it: lz4 -d"),
    (b"]\0\0", "compressed with LZMA", "unpack it: unlzma"),
    (b"LUKS\xba\xbe", "an encrypted disk (LUKS)", "decrypt it where its key is"),
    (b"QED\0", "a QED image, a format that QEMU gave up", "convert it where it was made: qemu-img convert -O qcow2"),
    (b"WithoutFreeSpace", "a Parallels disk", "convert it where it was made: qemu-img convert -O qcow2"),
    (b"WithouFreSpacExt", "a Parallels disk", "convert it where it was made: qemu-img convert -O qcow2"),
    (b"\x7fELF", "a program or a kernel, not a disk", "import a disk image"),
    (b"hsqs", "a squashfs file system, not a disk that boots", "import a disk image"),
    (b"\x3a\xff\x26\xed", "an Android sparse image", "unpack it: simg2img"),
    (b"!<arch>\n", "a package or a library, not a disk", "import a disk image"),
    (b"%PDF", "a PDF document, not a disk", "import a disk image"),
)
_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")
_CD_IMAGE = (b"\x01CD001", 16 * 2048)


def parse_format(name: str) -> Format:
    """The format that a user named; raises InvalidInput."""
    try:
        return Format({"vpc": "vhd", "img": "raw"}.get(name, name))
    except ValueError as error:
        raise InvalidInput("format", name, "is not a disk format", hint=f"one of: {', '.join(Format)}") from error


def compression_of(reader: Reader) -> Compression | None:
    """How the file is compressed, if it is."""
    head = reader.upto(0, 8)
    return next((kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)), None)


def detect(reader: Reader) -> Format | None:
    """The format that the file's content shows; RAW for a disk with a boot signature; None where nothing is recognised.

    Raises ImageRefused for what is recognised as no disk image.
    """
    head = reader.upto(0, 4096)
    if not head:
        reader.refuse("the file is empty")
    for magic, offset, found in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return found
    if head[: len(vmdk.TEXT)].lower() == vmdk.TEXT or head.startswith(vmdk.ESX_MAGIC):
        return Format.VMDK
    if reader.size >= SECTOR and reader.upto(reader.size - SECTOR, 8) == vhd.MAGIC:
        return Format.VHD
    for magic, what, remedy in _OTHERS:
        if head.startswith(magic):
            reader.refuse(f"this is {what}", hint=remedy)
    if head[510:512] == b"\x55\xaa" or head[512:520] == b"EFI PART":
        return Format.RAW
    _refuse_text(reader, head)
    if reader.upto(_CD_IMAGE[1], 6) == _CD_IMAGE[0]:
        reader.refuse(
            "this is a CD image, not a disk", hint="install from it into an empty disk, or import a cloud image"
        )
    return None


_MAGICS: tuple[tuple[bytes, int, Format], ...] = (
    (qcow2.MAGIC, 0, Format.QCOW2),
    (vmdk.MAGIC, 0, Format.VMDK),
    (vhdx.MAGIC, 0, Format.VHDX),
    (vhd.MAGIC, 0, Format.VHD),
    (vdi.MAGIC, vdi.MAGIC_OFFSET, Format.VDI),
    (tar.MAGIC, tar.MAGIC_OFFSET, Format.OVA),
)


def _refuse_text(reader: Reader, head: bytes) -> None:
    text = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith(_WEB_PAGE):
        reader.refuse("this is a web page, not a disk", hint="check the address: it may lead to a page about the image")
    if all(byte in b"\t\n\r\f\x1b" or byte >= 0x20 for byte in head[:512]):
        reader.refuse("this is a text file, not a disk")


def inspect(reader: Reader, expected: Format | None = None) -> Disk:
    """The disk in the file; with `expected`, it must be that one (RAW: whatever it looks like, it is data).

    Raises ImageRefused where the file is not a disk image, is unsound, encrypted, or needs any other file.
    """
    if expected is Format.RAW:
        return _raw(reader)
    found = detect(reader)
    if found is None:
        reader.refuse(
            "the format is not known, and there is no boot signature",
            hint="if it is a raw disk, say so: --format raw",
        )
    if expected is not None and found is not expected:
        reader.refuse(f"this is {found}, not {expected}", hint="leave the format out: it is recognised")
    return ova.inspect(reader, _inspect_member) if found is Format.OVA else _inspect_as(reader, found)


def _inspect_member(reader: Reader) -> Disk:
    found = detect(reader)
    if found is None or found is Format.OVA:
        reader.refuse("the appliance's disk is of an unknown format")
    return _inspect_as(reader, found)


def _inspect_as(reader: Reader, kind: Format) -> Disk:
    match kind:
        case Format.QCOW2:
            return qcow2.inspect(reader)
        case Format.VMDK if reader.upto(0, 4) == vmdk.ESX_MAGIC:
            return vmdk.refuse_esx(reader)
        case Format.VMDK if reader.upto(0, 4) != vmdk.MAGIC:
            return vmdk.refuse_descriptor(reader)
        case Format.VMDK:
            return vmdk.inspect(reader)
        case Format.VHD:
            return vhd.inspect(reader)
        case Format.VHDX:
            return vhdx.inspect(reader)
        case Format.VDI:
            return vdi.inspect(reader)
        case _:
            return _raw(reader)


def _raw(reader: Reader) -> Disk:
    if reader.size == 0:
        reader.refuse("the file is empty")
    return reader.disk(Format.RAW, -(-reader.size // SECTOR) * SECTOR)
