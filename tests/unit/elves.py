"""ELF files made by hand: programs that need libraries, and kernel modules."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def program(*needed: str) -> bytes:
    """A program whose dynamic section needs these libraries."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    offsets = [strings.index(name.encode() + b"\0") for name in needed]
    dynamic = b"".join(struct.pack("<qQ", 1, offset) for offset in offsets) + struct.pack("<qQ", 0, 0)
    return _elf([(".dynstr", 3, 0, strings), (".dynamic", 6, 1, dynamic)])


def module(name: str, depends: Sequence[str] = (), aliases: Sequence[str] = ()) -> bytes:
    """A kernel module with what modinfo(8) shows."""
    info = [f"name={name}", f"depends={','.join(depends)}", *(f"alias={alias}" for alias in aliases)]
    return _elf([(".modinfo", 1, 0, b"\0".join(item.encode() for item in info) + b"\0")])


def _elf(sections: list[tuple[str, int, int, bytes]]) -> bytes:
    """Sections are (name, type, link, content); `link` counts from the first one given, which has index 1."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name, *_ in sections) + b".shstrtab\0"
    bodies = [("", 0, 0, b""), *sections, (".shstrtab", 3, 0, names)]
    body, headers, at = b"", b"", 64
    for name, kind, link, content in bodies:
        name_at = names.index(name.encode() + b"\0") if name else 0
        headers += struct.pack("<IIQQQQIIQQ", name_at, kind, 0, 0, at, len(content), link, 0, 1, 0)
        body += content
        at += len(content)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    start = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 0, at, 0, 64, 0, 0, 64, len(bodies), len(bodies) - 1)
    return ident + start + body + headers
