"""Reading Debian binary packages without dpkg.

Format: deb(5). An ar(5) archive of `debian-binary` ("2.…"), `control.tar` and `data.tar`, the tars compressed. Packages
come from the network: names that would leave the root, and sizes beyond reason, are refused. Nothing is ever written to
disk here.
"""

from __future__ import annotations

import gzip
import lzma
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import IO, cast

from polyvisor.errors import ImageRefused
from polyvisor.values import dataclass

MAX_FILE = 256 << 20  # bytes; the largest file of interest is a kernel
MAX_UNPACKED = 2 << 30  # bytes of one package
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60
_LINKS = 8


@dataclass(frozen=True)
class DebFile:
    """A regular file of a package (`target` is None) or a symbolic link to `target`, as written in it."""

    path: str
    mode: int
    data: bytes = b""
    target: str | None = None


def read_deb(package: bytes, wanted: Callable[[str], bool], name: str = "package") -> dict[str, DebFile]:
    """The files and symbolic links of a .deb whose path ("usr/bin/x", no leading slash) is `wanted`, by path.

    Raises ImageRefused, naming the package `name`, where it is truncated, malformed, hostile or too large.
    """
    try:
        return _files(_open_data(package, name), wanted, name)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
        raise _refused(name, f"its data can't be unpacked: {error}") from error


def resolve(files: dict[str, DebFile], path: str) -> DebFile | None:
    """The regular file that `path` stands for in `files`, following symbolic links among them; None without one."""
    for _ in range(_LINKS):
        entry = files.get(path)
        if entry is None or entry.target is None:
            return entry
        path = posixpath.normpath(posixpath.join("/", posixpath.dirname(path), entry.target)).lstrip("/")
    return None


def ar_members(data: bytes, name: str = "package") -> Iterator[tuple[str, bytes]]:
    """Name and content of each member of an ar archive; raises ImageRefused for a malformed one."""
    if not data.startswith(_AR_MAGIC):
        raise _refused(name, "it is not an ar archive")
    at = len(_AR_MAGIC)
    while at < len(data):
        header = data[at : at + _AR_HEADER]
        digits = header[48:58].rstrip(b" ")
        if len(header) != _AR_HEADER or header[58:] != b"`\n" or not digits.isdigit():
            raise _refused(name, f"the ar header at byte {at} is malformed")
        at += _AR_HEADER
        size = int(digits)
        if size > len(data) - at:
            raise _refused(name, "it is truncated")
        yield header[:16].rstrip(b" ").rstrip(b"/").decode("ascii", "replace"), data[at : at + size]
        at += size + size % 2


def _open_data(package: bytes, name: str) -> IO[bytes]:
    """A file object of the uncompressed data.tar."""
    members = ar_members(package, name)
    first, version = next(members, ("", b""))
    if first != "debian-binary" or not version.startswith(b"2."):
        raise _refused(name, "it is not a Debian package of format 2")
    for member, content in members:
        if member == "data.tar":
            return BytesIO(content)
        if member == "data.tar.xz":
            return cast("IO[bytes]", lzma.open(BytesIO(content)))
        if member == "data.tar.gz":
            return cast("IO[bytes]", gzip.open(BytesIO(content)))
        if member == "data.tar.zst":
            return _open_zstd(content, name)
        if member.startswith("data.tar"):
            raise _refused(name, f"its compression is unknown: {member}")
    raise _refused(name, "it has no data.tar")


def _open_zstd(content: bytes, name: str) -> IO[bytes]:
    """Python has zstd since 3.14; Debian's archive has no such packages, Ubuntu's has."""
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise _refused(name, "it is compressed with zstd, which needs Python 3.14 or newer") from error
    return cast("IO[bytes]", zstd.open(BytesIO(content)))


def _files(data: IO[bytes], wanted: Callable[[str], bool], name: str) -> dict[str, DebFile]:
    found: dict[str, DebFile] = {}
    with data, tarfile.open(fileobj=data, mode="r|") as tar:
        for member in tar:
            if member.offset_data + member.size > MAX_UNPACKED:
                raise _refused(name, f"it unpacks to more than {MAX_UNPACKED >> 20} MiB")
            path = _clean(member.name, name)
            if not wanted(path):
                continue
            if member.issym():
                found[path] = DebFile(path, 0o777, target=member.linkname)
            elif member.islnk():
                found[path] = _linked(found, path, _clean(member.linkname, name), name)
            elif member.isreg():
                found[path] = DebFile(path, member.mode & 0o777, _content(tar, member, name))
    return found


def _clean(path: str, name: str) -> str:
    """A member's path without "./"; one that is absolute or climbs is refused."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise _refused(name, f"a member leaves the root: {path!r}")
    return "/".join(parts)


def _linked(found: dict[str, DebFile], path: str, target: str, name: str) -> DebFile:
    original = found.get(target)
    if original is None:
        raise _refused(name, f"{path} is a hard link to {target}, which did not come before it")
    return DebFile(path, original.mode, original.data, original.target)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> bytes:
    if member.size > MAX_FILE:
        raise _refused(name, f"{member.name} is larger than {MAX_FILE >> 20} MiB")
    file = tar.extractfile(member)
    content = file.read() if file else b""
    if len(content) != member.size:
        raise _refused(name, f"{member.name} is truncated")
    return content


def _refused(name: str, problem: str) -> ImageRefused:
    return ImageRefused(f"{name} is refused: {problem}")
