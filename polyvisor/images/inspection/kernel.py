"""A Linux kernel for x86, as it lies in a file: what it is, how it is packed, and where Xen can enter it.

Sources: Linux, Documentation/arch/x86/boot.rst (the real-mode header of a bzImage, offsets from the start of the file);
elf(5); Xen, xen/include/public/elfnote.h. Xen enters a kernel in mode pv at the note ENTRY, in mode pvh at PHYS32_ENTRY.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from polyvisor.images.bzimage import payload_start
from polyvisor.images.inspection.budget import MIB, Budget, Unreadable
from polyvisor.images.inspection.unpacking import Unpacked, packing_of, unpacked
from polyvisor.values import dataclass

MAX_KERNEL = 128 * MIB  # of the file; Debian's has 8 MiB
_MAX_ELF = 192 * MIB  # of what is packed in it; Debian's has 66
_MAX_HEADERS = 64
_MAX_NOTES = 64 << 10
_SECTOR = 512
_ELF_64_LSB = b"\x7fELF\x02\x01"
_X86_64 = 62
_PT_NOTE = 4
_XLF_KERNEL_64 = 1
_LOADED_HIGH = 1
_ENTRY, _GUEST_OS, _PHYS32_ENTRY = 1, 6, 18
_UNKNOWN_PACKING = "what the kernel in it is packed with is not known"
_VERSION = re.compile(rb"[\w.+~-]{1,120}")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that was looked at; `xen_pv` and `xen_pvh` are None where its notes could not be read, for `problem`."""

    version: str | None
    architecture: str
    packing: str | None
    xen_pv: bool | None = None
    xen_pvh: bool | None = None
    problem: str | None = None


class _Bytes(Protocol):
    def at(self, offset: int, length: int) -> bytes: ...


class _Plain:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def at(self, offset: int, length: int) -> bytes:
        if len(piece := self._data[offset : offset + length]) != length:
            raise Unreadable("it is cut off")
        return piece


def read_kernel(data: bytes, budget: Budget) -> Kernel:
    """The kernel in the file `data`; raises Unreadable where it is none for x86."""
    if data.startswith(_ELF_64_LSB):
        return _with_notes(Kernel(version=None, architecture=_machine(data), packing="none"), _Plain(data))
    protocol = _protocol(data)
    (version_at,) = struct.unpack_from("<H", data, 0x20E)
    version = _VERSION.match(data, version_at + _SECTOR) if version_at else None
    kernel = Kernel(
        version=version[0].decode() if version else None, architecture=_bitness(data, protocol), packing=None
    )
    payload = _payload(data)
    packing = _packing(payload)
    if packing is None:
        return replace(kernel, problem=_UNKNOWN_PACKING)
    elf: _Bytes = _Plain(payload) if packing == "none" else Unpacked(payload, packing, budget, _MAX_ELF)
    return _with_notes(replace(kernel, packing=packing), elf)


def inside(data: bytes, budget: Budget) -> Iterator[bytes]:
    """The kernel proper, an ELF file, in pieces, of the kernel in the file `data`; raises Unreadable, Spent."""
    if data.startswith(_ELF_64_LSB):
        yield data
        return
    _protocol(data)
    payload = _payload(data)
    packing = _packing(payload)
    if packing is None:
        raise Unreadable(_UNKNOWN_PACKING)
    if packing == "none":
        yield payload
        return
    size = 0
    for piece in unpacked(payload, packing, budget):
        if (size := size + len(piece)) > _MAX_ELF:
            raise Unreadable("the kernel in it is larger than kernels are")
        yield piece


def _protocol(data: bytes) -> int:
    """The version of the boot protocol that a bzImage speaks; raises Unreadable where it is none, or one of long ago."""
    if len(data) < 0x260 or data[0x202:0x206] != b"HdrS":
        raise Unreadable("it is no Linux kernel for x86 (it has no header of a bzImage)")
    (protocol,) = struct.unpack_from("<H", data, 0x206)
    if protocol < 0x208 or not data[0x211] & _LOADED_HIGH:
        raise Unreadable("it is a kernel from before 2.6.26, which nothing here can look into")
    return int(protocol)


def _packing(payload: bytes) -> str | None:
    return "none" if payload.startswith(b"\x7fELF") else packing_of(payload)


def _bitness(data: bytes, protocol: int) -> str:
    """Protocol 2.12, of Linux 3.8, has a flag for it; before it, only the code could tell."""
    if protocol < 0x20C:
        return "unknown"
    return "x86_64" if struct.unpack_from("<H", data, 0x236)[0] & _XLF_KERNEL_64 else "i386"


def _machine(elf: bytes) -> str:
    return "x86_64" if len(elf) >= 20 and struct.unpack_from("<H", elf, 18)[0] == _X86_64 else "another"


def _payload(data: bytes) -> bytes:
    start = payload_start(data)
    return data[start : start + struct.unpack_from("<I", data, 0x24C)[0]]


def _with_notes(kernel: Kernel, elf: _Bytes) -> Kernel:
    try:
        head = elf.at(0, 64)
        if not head.startswith(_ELF_64_LSB):
            return replace(kernel, architecture="i386" if head.startswith(b"\x7fELF\x01") else kernel.architecture)
        found = _xen_notes(elf, head)
    except Unreadable as error:
        return replace(kernel, problem=str(error))
    pvh = _PHYS32_ENTRY in found and _GUEST_OS in found
    return replace(kernel, architecture=_machine(head), xen_pv=_ENTRY in found, xen_pvh=pvh)


def _xen_notes(elf: _Bytes, head: bytes) -> set[int]:
    """The types of the notes that are Xen's."""
    (table,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    if size != 56 or count > _MAX_HEADERS:
        raise Unreadable("the ELF file in it is malformed")
    found: set[int] = set()
    for index in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", elf.at(table + index * size, size))
        if kind == _PT_NOTE:
            if length > _MAX_NOTES:
                raise Unreadable("the ELF file in it has notes of absurd size")
            found |= _types(elf.at(offset, length))
    return found


def _types(notes: bytes) -> set[int]:
    found, at = set(), 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        if notes[at + 12 : at + 12 + name_size].rstrip(b"\0") == b"Xen":
            found.add(kind)
        at += 12 + -(-name_size // 4) * 4 + -(-size // 4) * 4
    return found
