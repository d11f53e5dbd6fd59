"""Disk images for tests: made by qemu-img, or built and damaged byte by byte."""

from __future__ import annotations

import io
import struct
import subprocess
from pathlib import Path

from polyvisor.images.formats import Disk, Format, Reader, inspect

MIB = 1 << 20


def boot_sector(*, code: bytes = b"\xeb\x63\x90boot", partition: int = 0x83) -> bytes:
    """A master boot record with boot code and one partition of that type."""
    entry = struct.pack("<B3sB3sII", 0x80, b"\0\0\0", partition, b"\0\0\0", 2048, 4096)
    return code.ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa"


def raw_disk(path: Path, *, mib: int = 8) -> Path:
    """A raw disk: a boot sector, 1 MiB of data that does not compress, a text, and holes."""
    noise = b"".join(hash_block(index) for index in range(MIB // 32))
    with path.open("wb") as file:
        file.write(boot_sector())
        file.seek(MIB)
        file.write(noise)
        file.seek((mib - 1) * MIB)
        file.write(b"near the end")
        file.truncate(mib * MIB)
    return path


def hash_block(index: int) -> bytes:
    import hashlib

    return hashlib.sha256(str(index).encode()).digest()


def qemu_img(*argv: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, argv)], check=True, capture_output=True, cwd="/")


def converted(raw: Path, path: Path, driver: str, *options: str) -> Path:
    """`raw` as another format; `options` such as `subformat=fixed`."""
    extra = ["-o", ",".join(options)] if options else []
    qemu_img("convert", "-f", "raw", "-O", driver, *extra, raw, path)
    return path


def inspected(data: bytes | Path, expected: Format | None = None) -> Disk:
    """What `inspect` says of a file or of bytes."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            return inspect(Reader(file, data.name), expected)
    return inspect(Reader(io.BytesIO(data), "test"), expected)


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def tar_header(name: bytes, size: int, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """The header of one member of a ustar archive."""
    head = struct.pack(
        "100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x",
        name, b"0000644", b"0000000", b"0000000", f"{size:011o}".encode(), b"00000000000", b" " * 8,
        kind, link, b"ustar\0", b"00", b"", b"", b"", b"", b"",
    )  # fmt: skip
    return patched(head, 148, f"{sum(head):06o}\0 ".encode())


def tar(*members: tuple[str, bytes]) -> bytes:
    """A ustar archive of plain files."""
    parts = [tar_header(n.encode(), len(d)) + d + bytes(-len(d) % 512) for n, d in members]
    return b"".join(parts) + bytes(1024)


def ovf(*disks: str, extra: str = "") -> bytes:
    """The description of an appliance with these disk files."""
    files = "".join(f'<File ovf:id="f{i}" ovf:href="{name}" {extra}/>' for i, name in enumerate(disks))
    listed = "".join(f'<Disk ovf:diskId="d{i}" ovf:fileRef="f{i}" ovf:capacity="8"/>' for i in range(len(disks)))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" '
        f'xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References>{files}</References>'
        f"<DiskSection>{listed}</DiskSection></Envelope>"
    ).encode()
