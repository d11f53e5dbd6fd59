"""Kernels and initramfs archives: what they are packed with, Xen's entries, modules; bombs and lies."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyvisor.images import cpio
from polyvisor.images.inspection import lz4
from polyvisor.images.inspection.budget import MIB, Budget, Spent, Unreadable
from polyvisor.images.inspection.initrd import listed, module_name, read_initrd
from polyvisor.images.inspection.kernel import read_kernel
from tests.unit.bootable import (
    ENTRY,
    GUEST_OS,
    PHYS32_ENTRY,
    VERSION,
    XEN_VERSION,
    bzimage,
    initramfs,
    kernel,
    lz4_frame,
    packed,
    vmlinux,
)
from tests.unit.disks import patched

READABLE = ("gzip", "xz", "lzma", "bzip2", "lz4", "none")


@pytest.mark.parametrize("packing", READABLE)
def test_the_notes_of_a_kernel_are_read_through_its_packing(packing: str) -> None:
    found = read_kernel(kernel(packing), Budget())
    assert (found.version, found.architecture, found.packing, found.problem) == (VERSION, "x86_64", packing, None)
    assert (found.xen_pv, found.xen_pvh) == (True, True)


@pytest.mark.parametrize(
    ("notes", "pv", "pvh"),
    [
        ((XEN_VERSION, GUEST_OS), False, False),
        ((ENTRY, XEN_VERSION), True, False),
        ((GUEST_OS, PHYS32_ENTRY), False, True),
        ((PHYS32_ENTRY,), False, False),  # CONFIG_PVH without CONFIG_XEN: for other hypervisors
    ],
)
def test_which_modes_of_xen_a_kernel_knows(notes: tuple[int, ...], pv: bool, pvh: bool) -> None:
    found = read_kernel(kernel("gzip", *notes), Budget())
    assert (found.xen_pv, found.xen_pvh) == (pv, pvh)


def test_notes_of_others_do_not_count() -> None:
    data = vmlinux(ENTRY).replace(b"Xen\0", b"Xem\0")
    assert read_kernel(data, Budget()).xen_pv is False


@pytest.mark.parametrize("packing", ["zstd", "lzo"])
def test_what_python_can_not_unpack_leaves_the_notes_unknown(packing: str) -> None:
    found = read_kernel(kernel(packing), Budget())
    assert (found.version, found.packing) == (VERSION, packing)
    assert found.xen_pv is None
    assert found.problem


def test_kernels_of_other_kinds() -> None:
    assert read_kernel(bzimage(b"", bits_64=False), Budget()).architecture == "i386"
    assert read_kernel(vmlinux(machine=183), Budget()).architecture == "another"
    assert read_kernel(bzimage(b"?" * 100), Budget()).problem
    for data, words in (
        (b"", "no Linux kernel"),
        (b"MZ" + bytes(2000), "no Linux kernel"),
        (bzimage(b"", protocol=0x204), "2.6.26"),
    ):
        with pytest.raises(Unreadable, match=words):
            read_kernel(data, Budget())


@pytest.mark.parametrize(
    "inside",
    [
        patched(vmlinux(ENTRY), 32, struct.pack("<Q", 1 << 60)),
        patched(vmlinux(ENTRY), 54, struct.pack("<HH", 1, 1)),
        patched(vmlinux(ENTRY), 56, struct.pack("<H", 0xFFFF)),
        patched(vmlinux(ENTRY), 64 + 32, struct.pack("<Q", 1 << 40)),
        vmlinux(ENTRY, notes_at=1 << 50),
        vmlinux(ENTRY, notes_at=100 << 20),
        vmlinux(ENTRY)[:70],
    ],
)
def test_elf_files_that_lie(inside: bytes) -> None:
    for packing in ("none", "gzip", "lz4"):
        found = read_kernel(bzimage(packed(inside, packing)), Budget())
        assert found.xen_pv is None
        assert found.problem


def test_a_bomb_in_a_kernel_ends() -> None:
    """The notes are said to lie behind more zeros than there may be."""
    bomb = zlib.compressobj(9, wbits=31)
    packed_zeros = bomb.compress(vmlinux(ENTRY, notes_at=180 << 20)) + bomb.compress(bytes(64 * MIB)) + bomb.flush()
    with pytest.raises(Spent, match="unpacks to far more"):
        read_kernel(bzimage(packed_zeros), Budget(unpacked=32 * MIB))
    assert "cut off" in str(read_kernel(bzimage(packed_zeros), Budget()).problem)


def test_a_kernel_that_is_cut_off_or_damaged() -> None:
    data = kernel("xz")
    for length in (600, 1536, 2700, len(data) // 2):
        with contextlib.suppress(Unreadable):
            assert read_kernel(data[:length], Budget()).problem
    assert "damaged" in str(read_kernel(patched(data, 2560 + 64 + 40, bytes(8)), Budget()).problem)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2800), st.binary(min_size=1, max_size=8)), max_size=10))
def test_whatever_a_kernel_says_nothing_else_is_raised(changes: list[tuple[int, bytes]]) -> None:
    data = kernel("none")
    for offset, new in changes:
        data = patched(data, offset, new)
    with contextlib.suppress(Unreadable, Spent):
        read_kernel(data, Budget(seconds=5, unpacked=64 * MIB))


# LZ4


def unpack_lz4(frame: bytes) -> bytes:
    return b"".join(lz4.unpack_block(frame, at, size) for at, size in lz4.blocks(frame))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 700)), max_size=8))
def test_lz4_gives_back_what_was_packed(parts: list[tuple[bytes, int]]) -> None:
    data = b"".join(literals + b"z" * run for literals, run in parts) + b"end"
    assert unpack_lz4(lz4_frame(data)) == data


def test_lz4_as_its_own_program_packs_it() -> None:
    """Made with `lz4 -l -9`: matches at many distances, and one that overlaps itself."""
    text = b"".join(b"line %d of the text, and the same words again and again\n" % n for n in range(12)) + b"ab" * 40
    block = bytes.fromhex(LZ4_BLOCK)
    assert lz4.unpack_block(block, 0, len(block)) == text
    assert lz4.unpack_block(block, 0, len(block), 100) == text[:100]


LZ4_BLOCK = (
    "f1086c696e652030206f662074686520746578742c20616e640e00f10173616d6520776f72647320616761696e1900010a00"
    "110a37001f313700231f323700231f333700231f343700231f353700231f363700231f373700231f383700231f39ef01240f"
    "2702250f28021f2f6162020036506261626162"
)


def test_lz4_of_several_blocks() -> None:
    data = os.urandom(1000) + bytes(17 * MIB) + b"the end"
    assert unpack_lz4(lz4_frame(data)) == data


@pytest.mark.parametrize(
    "block",
    [
        b"\xf0" + b"\xff" * 100,  # a length without end
        b"\x10a\x05\x00",  # a match before the beginning
        b"\x10a\x00\x00",  # a match of itself
        b"\x50ab",  # literals that are not there
        b"\x1fa\x01\x00" + b"\xff" * 40000 + b"\0",  # more than a block holds
    ],
)
def test_lz4_that_lies(block: bytes) -> None:
    with pytest.raises(ValueError, match=r"block|cut off"):
        lz4.unpack_block(block, 0, len(block))


# Initramfs


@pytest.mark.parametrize("packing", READABLE)
def test_modules_are_found_behind_microcode(packing: str) -> None:
    early = cpio.archive([cpio.file("kernel/x86/microcode/GenuineIntel.bin", os.urandom(5000))])
    data = early + bytes(512 - len(early) % 512) + packed(initramfs(("virtio_blk", "xen-blkfront")), packing)
    found = read_initrd(data, Budget())
    assert found.packing == packing
    assert found.modules == {"virtio_blk", "xen_blkfront"}


def test_an_initramfs_that_lists_what_is_built_in() -> None:
    entries = [
        cpio.file("lib/modules/6/modules.builtin", b"kernel/drivers/block/virtio_blk.ko\nkernel/fs/ext4/ext4.ko\n")
    ]
    found = read_initrd(gzip.compress(cpio.archive(entries)) + b"whatever a seed is", Budget())
    assert found.built_in == {"virtio_blk", "ext4"}


def test_names_of_modules() -> None:
    assert module_name("a/b/xen-blkfront.ko.zst") == "xen_blkfront"
    assert [module_name(name) for name in ("a.ko", "b.ko.xz", "c.kok", "ko", "d.ko.md5")] == [
        "a",
        "b",
        None,
        None,
        None,
    ]
    assert listed("kernel/a.ko kernel/b-c.ko\n") == {"a", "b_c"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"garbage" * 100, "not known", id="garbage"),
        pytest.param(initramfs()[:300], "cut off", id="cut off in a name"),
        pytest.param(patched(initramfs(), 94, b"FFFFFFFF"), "absurd length", id="length of a name"),
        pytest.param(patched(initramfs(), 54, b"FFFFFFFF"), "cut off", id="length of a file"),
        pytest.param(patched(initramfs(), 54, b"        "), "damaged", id="length without digits"),
        pytest.param(gzip.compress(initramfs())[:60], "cut off", id="gzip cut off"),
        pytest.param(patched(lzma.compress(initramfs()), 30, b"\0" * 30), "damaged", id="lzma damaged"),
        pytest.param(cpio.archive([]) * 65, "64 archives", id="archives"),
        pytest.param(b"\x28\xb5\x2f\xfd" + bytes(100), "zstd", id="zstd"),
        pytest.param(b"\x89LZO\0" + bytes(100), "lzo", id="lzo"),
    ],
)
def test_an_initramfs_that_lies(data: bytes, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        read_initrd(data, Budget())


def test_a_bomb_in_an_initramfs_ends() -> None:
    member = cpio.archive([cpio.file("big", bytes(64 * MIB))])
    with pytest.raises(Spent, match="unpacks to far more"):
        read_initrd(gzip.compress(member), Budget(unpacked=16 * MIB))
    many = cpio.archive([])[:110].replace(b"0000000B", b"00000002") + b"a\0"
    with pytest.raises(Unreadable, match="more than 200000 members"):
        read_initrd(gzip.compress(many * 200_001), Budget())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), max_size=10))
def test_whatever_an_initramfs_says_nothing_else_is_raised(changes: list[tuple[int, bytes]]) -> None:
    data = initramfs()
    for offset, new in changes:
        data = patched(data, offset, new)
    with contextlib.suppress(Unreadable, Spent):
        read_initrd(data, Budget(seconds=5, unpacked=64 * MIB))
