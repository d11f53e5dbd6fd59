"""The members of a tar archive, for appliances (OVA) and exported images, read without unpacking anything.

Source: POSIX.1-1988 ustar, which the OVF specification (DMTF DSP0243, section 6.4) asks for, and GNU's base-256
sizes. A header of 512 bytes, then the data, padded to 512. The standard library's tarfile reads extended headers of
any length into memory and resolves links and paths; here a member is a plain file with a plain name, or the archive
is refused.
"""

from __future__ import annotations

import re

from polyvisor.images.formats.reader import SECTOR, Reader
from polyvisor.values import dataclass

MAGIC = b"ustar"  # at offset 257
MAGIC_OFFSET = 257

_MAX_MEMBERS = 100
_MAX_EXTENDED = 64 << 10
_PLAIN = re.compile(r"[A-Za-z0-9_+@=()\[\] ~-][A-Za-z0-9_.,+@=()\[\] ~-]{0,254}\Z")
_HARMLESS_RECORD = re.compile(rb"\d+ (?:mtime|atime|ctime|uid|gid|uname|gname|comment|charset|SCHILY\.\w+)=", re.ASCII)


@dataclass(frozen=True)
class Member:
    """A file in an archive: `size` bytes at `offset` of the archive."""

    name: str
    offset: int
    size: int


_REPACK = "an appliance is a flat archive of one .ovf and its disks: tar --format=ustar -cf NEW.ova NAME.ovf DISK.vmdk"


def members(reader: Reader, *, remedy: str = _REPACK) -> list[Member]:
    """The files in the archive, in order; raises ImageRefused for all that is not a plain file with a plain name.

    `remedy` is what its hint says then.
    """
    found: dict[str, Member] = {}
    position = 0
    while (block := reader.at(position, SECTOR, "archive")) != bytes(SECTOR):
        member = _member(reader, block, position + SECTOR)
        kind = block[156:157]
        if kind in (b"x", b"g"):
            _check_extended(reader, member, remedy)
        elif kind not in (b"0", b"\0"):
            reader.refuse(f"it contains '{member.name}', which is not a plain file", hint=remedy)
        elif not _PLAIN.match(member.name) or member.name in found:
            reader.refuse(f"it contains a file with an unsafe name, {ascii(member.name)[:80]}", hint=remedy)
        else:
            found[member.name] = member
        if len(found) > _MAX_MEMBERS or position > reader.size:
            reader.refuse(f"it has more than {_MAX_MEMBERS} files", hint=remedy)
        position = member.offset + -(-member.size // SECTOR) * SECTOR
        if position == reader.size:  # some tools leave out the two empty blocks at the end
            break
    return list(found.values())


def _member(reader: Reader, block: bytes, offset: int) -> Member:
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if _number(reader, block[148:156]) != checksum:
        reader.corrupt("the archive is damaged")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    size = _number(reader, block[124:136])
    if offset + size > reader.size:
        reader.refuse("the archive is cut off", hint="it is truncated or corrupt: fetch it again")
    return Member(name.decode("ascii", errors="backslashreplace"), offset, size)


def _number(reader: Reader, field: bytes) -> int:
    """A number of a header: octal text, or with the top bit set, base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if not re.fullmatch(rb"[0-7]{1,12}", text):
        reader.corrupt("the archive is damaged")
    return int(text, 8)


def _check_extended(reader: Reader, member: Member, remedy: str) -> None:
    """Extended headers may tell times and owners, but not other paths, links or sizes."""
    if member.size > _MAX_EXTENDED:
        reader.corrupt("an archive header of absurd size")
    data = reader.at(member.offset, member.size, "archive")
    while data:
        length = re.match(rb"(\d{1,6}) ", data)
        if not length or not int(length[1]) or int(length[1]) > len(data) or not _HARMLESS_RECORD.match(data):
            reader.refuse("its archive headers rename or resize files", hint=remedy)
        data = data[int(length[1]) :]
