"""The little of ELF that an image builder needs: what a program or a kernel module depends on.

Format: elf(5), 64-bit little-endian alone. A kernel module's section `.modinfo` holds NUL-terminated `key=value`
strings (`depends=a,b`, `alias=…`), see Linux, include/linux/module.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from polyvisor.values import dataclass

_MAGIC = b"\x7fELF\x02\x01"
_SECTION = struct.Struct("<IIQQQQIIQQ")
_DYNAMIC = struct.Struct("<qQ")
_SHT_DYNAMIC = 6
_DT_NEEDED = 1


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    link: int
    data: bytes


def needed_libraries(elf: bytes) -> list[str]:
    """The shared libraries that a program or library asks for, as in its dynamic section; raises ValueError."""
    sections = list(_sections(elf))
    names = []
    for section in sections:
        if section.kind == _SHT_DYNAMIC:
            strings = sections[section.link].data
            whole = len(section.data) - len(section.data) % _DYNAMIC.size
            entries = _DYNAMIC.iter_unpack(section.data[:whole])
            names += [_string(strings, value) for tag, value in entries if tag == _DT_NEEDED]
    return names


def modinfo(module: bytes) -> list[tuple[str, str]]:
    """The (key, value) pairs of a kernel module, in order; raises ValueError."""
    for section in _sections(module):
        if section.name == ".modinfo":
            texts = [item.decode(errors="replace") for item in section.data.split(b"\0") if b"=" in item]
            return [(key, value) for key, _, value in (text.partition("=") for text in texts)]
    raise ValueError("it is not a kernel module: there is no section .modinfo")


def _sections(elf: bytes) -> Iterator[_Section]:
    if not elf.startswith(_MAGIC) or len(elf) < 64:
        raise ValueError("it is not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    if size != _SECTION.size or table + size * count > len(elf) or names_index >= max(count, 1):
        raise ValueError("its section table is malformed")
    headers = [_SECTION.unpack_from(elf, table + i * size) for i in range(count)]
    _, _, _, _, names_at, names_size, *_ = headers[names_index] if headers else (0,) * 10
    names = elf[names_at : names_at + names_size]
    for name, kind, _, _, at, length, link, *_ in headers:
        if link >= count:
            raise ValueError("its section table is malformed")
        yield _Section(_string(names, name), kind, link, elf[at : at + length])


def _string(table: bytes, at: int) -> str:
    end = table.find(b"\0", at)
    return table[at : end if end >= 0 else len(table)].decode(errors="replace")
