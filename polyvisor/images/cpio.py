"""Writing cpio archives in the "newc" format, the one that Linux unpacks as its initramfs.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst. A header of a 6-digit magic number and 13
fields of 8 hexadecimal digits, the NUL-terminated name, the content; name and content are padded to 4 bytes.
The kernel unpacks archives that follow one another, compressed or not, later ones over earlier ones; an
uncompressed one must begin at a multiple of 4.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

from polyvisor.values import dataclass

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_LIMIT = 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """A member of an archive, owned by root: `mode` with its file type bits (`stat.S_IFREG` …).

    `data` is a file's content or a symbolic link's target; `rdev` a device node's (major, minor).
    """

    path: str
    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)


def file(path: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | mode, data)


def directory(path: str, mode: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFDIR | mode)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(path, stat.S_IFCHR | mode, rdev=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """A whole archive of `entries`, in their order and without times: the same entries give the same bytes.

    A directory must come before what is in it. Raises ValueError for an entry that the format can't hold.
    """
    parts = [_member(entry, inode) for inode, entry in enumerate(entries, start=1)]
    return b"".join([*parts, _member(Entry(_TRAILER, 0), 0)])


def padded(data: bytes, multiple: int = 4) -> bytes:
    """`data` with NULs up to the next multiple, ready to have another archive appended."""
    return data + bytes(-len(data) % multiple)


def _member(entry: Entry, inode: int) -> bytes:
    name = entry.path.encode()
    if not name or name.startswith(b"/") or b"\0" in name or ".." in entry.path.split("/"):
        raise ValueError(f"cpio: not a path of a member: {entry.path!r}")
    if len(entry.data) > _LIMIT:
        raise ValueError(f"cpio: {entry.path} is larger than 4 GiB")
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    #        ino    mode        uid gid nlink mtime size          maj min rdev maj & min namesize    check
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.rdev, len(name) + 1, 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return padded(header + name + b"\0") + padded(entry.data)
