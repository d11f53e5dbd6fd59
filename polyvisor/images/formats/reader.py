"""Bounded reads from a file that may lie about itself: what is not there is refused, never guessed or looped over."""

from __future__ import annotations

import os
import struct
from enum import StrEnum
from typing import Any, BinaryIO, Never

from polyvisor.errors import ImageRefused
from polyvisor.values import dataclass

SECTOR = 512
GIB = 1 << 30
TIB = 1 << 40
MAX_DISK = 64 * TIB  # what VHDX, the most generous of the formats, allows; nobody's cloud image is near it


class Format(StrEnum):
    """The disk image formats that can be imported; the values are what users write."""

    QCOW2 = "qcow2"
    RAW = "raw"
    VMDK = "vmdk"
    VHD = "vhd"
    VHDX = "vhdx"
    VDI = "vdi"
    OVA = "ova"


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A disk image that was looked at and found to stand on its own.

    `virtual_size` is in bytes, as the guest sees it (for VHD, QEMU may round to whole cylinders). In an appliance, the
    disk is `member`, `size` bytes at `offset` of the file; elsewhere it is the whole file.
    """

    format: Format
    virtual_size: int
    offset: int = 0
    size: int = 0
    member: str | None = None


class Reader:
    """`size` bytes at `offset` of a file, called `name` in errors. Raises OSError where reading itself fails."""

    def __init__(self, file: BinaryIO, name: str, *, offset: int = 0, size: int | None = None) -> None:
        self._file = file
        self.name = name
        self.offset = offset
        self.size = file.seek(0, os.SEEK_END) - offset if size is None else size

    def upto(self, offset: int, length: int) -> bytes:
        """At most `length` bytes at `offset`; fewer, or none, where the file ends."""
        length = min(length, self.size - offset)
        if length <= 0 or offset < 0:
            return b""
        self._file.seek(self.offset + offset)
        return self._file.read(length)

    def at(self, offset: int, length: int, what: str = "file") -> bytes:
        """Exactly `length` bytes at `offset`; raises ImageRefused ("`what` is cut off") where they are not."""
        if offset < 0 or offset + length > self.size or len(data := self.upto(offset, length)) != length:
            self.refuse(f"the {what} is cut off", hint="it is truncated or corrupt: fetch it again")
        return data

    def unpack(self, layout: str, offset: int, what: str = "header") -> tuple[Any, ...]:
        """The numbers of `struct` format `layout` at `offset`."""
        return struct.unpack(layout, self.at(offset, struct.calcsize(layout), what))

    def window(self, offset: int, size: int, name: str) -> Reader:
        """The part of the file that a member of an archive occupies."""
        return Reader(self._file, name, offset=self.offset + offset, size=size)

    def refuse(self, problem: str, *, hint: str | None = None) -> Never:
        raise ImageRefused(f"{self.name}: {problem}", hint=hint)

    def corrupt(self, problem: str) -> Never:
        self.refuse(
            problem, hint="it is corrupt, or was made to look like an image: get it anew from where it came from"
        )

    def disk(self, kind: Format, virtual_size: int) -> Disk:
        """The finding that this is a sound image; refuses absurd sizes."""
        if virtual_size <= 0:
            self.corrupt("a disk of no size")
        if virtual_size > MAX_DISK:
            self.refuse(f"a disk of {virtual_size / TIB:.1f} TiB; at most {MAX_DISK // TIB} TiB can be imported")
        return Disk(format=kind, virtual_size=virtual_size, offset=self.offset, size=self.size)


FLATTEN = "flatten it where its parts are: qemu-img convert -O qcow2 OLD NEW; then import NEW"
