"""How the kernel in a bzImage is packed; the real ones are those of the built images (tests/real)."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from polyvisor.images.bzimage import packing
from polyvisor.images.inspection.unpacking import MAGICS


def bzimage(payload: bytes, *, sectors: int = 4, offset: int = 64, version: int = 0x20F) -> bytes:
    """The fields of Linux's Documentation/arch/x86/boot.rst that lead to the payload."""
    head = bytearray((sectors + 1) * 512)
    head[0x1F1] = sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, offset, len(payload))
    return bytes(head) + bytes(offset) + payload


@pytest.mark.parametrize(("name", "magic"), [*MAGICS.items(), ("none", b"\x7fELF")])
def test_every_packer_is_known_by_what_it_writes_first(name: str, magic: bytes, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage(magic + b"rest"))
    assert packing(kernel) == name


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"MZ" * 100,
        bytes(4096),
        bzimage(b"unknown."),
        bzimage(MAGICS["xz"], version=0x207),
        bzimage(MAGICS["xz"])[:-6],
        bzimage(MAGICS["xz"], offset=1 << 12)[:2048],
    ],
)
def test_what_can_not_be_told_is_not_guessed(content: bytes, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(content)
    assert packing(kernel) is None


def test_an_old_kernel_has_four_sectors_where_it_says_none(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    content = bytearray(bzimage(MAGICS["gzip"], sectors=4))
    content[0x1F1] = 0
    kernel.write_bytes(content)
    assert packing(kernel) == "gzip"
