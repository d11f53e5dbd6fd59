"""Debian packages made by hand, right and wrong ones, for tests."""

from __future__ import annotations

import io
import lzma
import tarfile


def ar(*members: tuple[str, bytes]) -> bytes:
    """An ar archive, as deb(5) has it."""
    out = b"!<arch>\n"
    for name, data in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def tar(*members: tarfile.TarInfo | tuple[str, bytes] | tuple[str, bytes, int]) -> bytes:
    """A tar archive; a tuple is a regular file (name, content, mode), a TarInfo is taken as it is, without content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            info.mode = member[2] if len(member) == 3 else 0o644
            archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


def deb(data: bytes, member: str = "data.tar.xz") -> bytes:
    """A package with `data` as its data.tar, compressed with xz unless `member` has another name."""
    content = lzma.compress(data) if member.endswith(".xz") else data
    return ar(("debian-binary", b"2.0\n"), ("control.tar", tar()), (member, content))
