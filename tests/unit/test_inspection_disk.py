"""Partition tables that sfdisk wrote, FAT that mkfs.vfat made, what else is recognised, and what lies about itself."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyvisor.images.fat import fat32
from polyvisor.images.inspection.budget import Budget, Missing, Spent, Unreadable
from polyvisor.images.inspection.fat import Fat
from polyvisor.images.inspection.files import listing, text
from polyvisor.images.inspection.filesystems import look
from polyvisor.images.inspection.table import BIOS, ESP, boot_code, read_table
from polyvisor.images.partition import EFI_SYSTEM, Partition, gpt
from tests.unit.bootable import MIB, area, ext, sfdisk
from tests.unit.disks import boot_sector, patched

# Partition tables


def test_a_gpt_as_sfdisk_writes_it(tmp_path: Path) -> None:
    script = (
        "label: gpt\n1: start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649\n"
        "15: start=4096, size=8192, type=U, uuid=AAAAAAAA-BBBB-CCCC-DDDD-EEEEEEEEEEEE\n"
        '3: start=16384, size=20480, type=L, name="root \u00e9", attrs=LegacyBIOSBootable\n'
    )
    table = read_table(area(sfdisk(tmp_path / "disk", script)))
    assert (table.scheme, table.boot_code, table.problem) == ("gpt", "none", None)
    first, third, last = table.entries
    assert [(e.number, e.kind) for e in (first, last)] == [(1, BIOS), (15, ESP)]
    assert (last.start, last.size, last.partuuid) == (4096 * 512, 8192 * 512, "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")
    assert (third.name, third.bootable, first.bootable) == ("root \u00e9", True, False)


def test_an_mbr_with_logical_partitions_as_sfdisk_writes_it(tmp_path: Path) -> None:
    script = (
        "label: dos\nlabel-id: 0xdeadbeef\n1: start=2048, size=2048, type=ef\n2: start=4096, size=40960, type=5\n"
        "5: start=6144, size=2048, type=83\n6: start=10240, size=2048, type=83\n7: start=14336, size=4096, type=83\n"
    )
    table = read_table(area(sfdisk(tmp_path / "disk", script)))
    assert table.scheme == "mbr"
    assert [(e.number, e.start // 512, e.size // 512) for e in table.entries] == [
        (1, 2048, 2048), (5, 6144, 2048), (6, 10240, 2048), (7, 14336, 4096),
    ]  # fmt: skip
    assert table.entries[0].kind == ESP
    assert table.entries[1].partuuid == "deadbeef-05"


def test_logical_partitions_that_lead_round_in_circles_end() -> None:
    record = bytearray(boot_sector(partition=0x05))
    struct.pack_into("<I", record, 446 + 8, 1)
    loop = bytearray(512)
    struct.pack_into("<4xB3xII", loop, 446, 0x83, 1, 1)
    struct.pack_into("<4xB3xII", loop, 462, 0x05, 0, 10)
    loop[510:] = b"\x55\xaa"
    other = bytearray(loop)
    struct.pack_into("<4xB3xII", loop, 462, 0x05, 1, 10)
    table = read_table(area(bytes(record + loop + other)))
    assert [entry.number for entry in table.entries] == [5, 6]


@pytest.mark.parametrize(
    ("offset", "new", "words"),
    [
        (512, b"NOTAGPT!", "header is not there"),
        (512 + 84, struct.pack("<I", 1), "odd sizes"),
        (512 + 84, struct.pack("<I", 0xFFFFFFF8), "odd sizes"),
        (512 + 72, struct.pack("<Q", 1 << 60), "past the end"),
    ],
)
def test_a_gpt_that_lies(offset: int, new: bytes, words: str) -> None:
    head, tail = gpt(UUID(int=1), 8 * MIB, [])
    data = patched(head + bytes(8 * MIB - len(head) - len(tail)) + tail, offset, new)
    table = read_table(area(data))
    assert table.entries == ()
    assert words in str(table.problem)


def test_a_gpt_of_very_many_partitions_is_bounded() -> None:
    part = Partition(number=1, kind=EFI_SYSTEM, uuid=UUID(int=2), name="x" * 36, start=MIB, size=MIB)
    head, _ = gpt(UUID(int=1), 8 * MIB, [part])
    data = patched(head[:1024] + head[1024:1152] * 1000, 512 + 80, struct.pack("<I", 0xFFFFFFFF))
    assert len(read_table(area(data)).entries) == 128


def test_whose_boot_code_it_is() -> None:
    assert boot_code(bytes(512)) == "none"
    assert boot_code(boot_sector(code=b"\xebc\x90 GRUB \0Geom")) == "GRUB"
    assert boot_code(boot_sector(code=b"\xfa\x31\xc0")) == "unknown"
    assert (
        read_table(area(b"\xfa\x31\xc0".ljust(600, b"\0"))).boot_code == "none"
    )  # without the signature nobody starts it
    assert read_table(area(b"x")).scheme == "none"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(440, 1600), st.binary(min_size=1, max_size=8)), max_size=12))
def test_whatever_a_table_says_nothing_is_raised(changes: list[tuple[int, bytes]]) -> None:
    part = Partition(number=1, kind=EFI_SYSTEM, uuid=UUID(int=2), name="x", start=MIB, size=MIB)
    data = gpt(UUID(int=1), 8 * MIB, [part])[0].ljust(64 << 10, b"\0")
    for offset, new in changes:
        data = patched(data, offset, new)
    read_table(area(data))


# FAT


@pytest.mark.parametrize("options", [("-F", "12"), ("-F", "16"), ("-F", "32"), ("-F", "32", "-s", "8", "-S", "512")])
def test_what_mkfs_and_mtools_write_is_read(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "fat"
    path.write_bytes(bytes((8 if "12" in options else 300) * MIB))
    subprocess.run(
        ["/usr/sbin/mkfs.vfat", "-n", "NAME", "-i", "1234ABCD", *options, path], check=True, capture_output=True
    )
    content = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(content)
    for name in ("EFI", "EFI/BOOT", "EFI/a long directory name"):
        subprocess.run(["mmd", "-i", path, f"::{name}"], check=True)
    for name in ("EFI/BOOT/BOOTX64.EFI", "EFI/a long directory name/a rather long file name.efi"):
        subprocess.run(["mcopy", "-i", path, tmp_path / "file", f"::{name}"], check=True)
    for number in range(200):
        subprocess.run(["mmd", "-i", path, f"::EFI/d{number}"], check=True)
    found = look(area(path))
    assert (found.kind, found.label, found.uuid) == ("vfat", "NAME", "1234-ABCD")
    files = Fat(area(path))
    assert files.read("/efi/boot/bootx64.efi", MIB) == content
    assert files.names("/EFI/a long directory name") == ["a rather long file name.efi"]
    assert len(files.names("/EFI")) == 202
    assert files.exists("/EFI/D199")
    assert not files.exists("/EFI/BOOT/nothing")
    with pytest.raises(Missing):
        files.read("/EFI/BOOT/BOOTX64.EFI/x")
    with pytest.raises(Unreadable, match="not a file"):
        files.read("/EFI")
    with pytest.raises(Unreadable, match="more than the 10"):
        files.read("/EFI/BOOT/BOOTX64.EFI", 10)


@pytest.fixture(scope="module")
def esp() -> bytes:
    size = 40 * MIB
    return fat32(size, {"EFI/BOOT/BOOTX64.EFI": b"x" * 2000}).ljust(size, b"\0")


def cluster_of(data: bytes, number: int) -> int:
    """Where the entry of a cluster in the table is."""
    return int(struct.unpack_from("<H", data, 14)[0]) * 512 + number * 4


def test_chains_that_lead_to_themselves_end(esp: bytes) -> None:
    files = Fat(area(patched(esp, cluster_of(esp, 2), struct.pack("<I", 2))))
    with pytest.raises(Unreadable, match="endless"):
        files.names("/")
    root = Fat(area(esp))
    first = next(n for n in range(2, 20) if struct.unpack_from("<I", esp, cluster_of(esp, n))[0] == n + 1)
    cut = Fat(area(patched(esp, cluster_of(esp, first), struct.pack("<I", 0))))
    assert len(root.read("/EFI/BOOT/BOOTX64.EFI")) == 2000
    with pytest.raises(Unreadable, match="cut off"):
        cut.read("/EFI/BOOT/BOOTX64.EFI")


def test_boot_sectors_of_fat_that_lie(esp: bytes) -> None:
    for offset, new in (
        (11, b"\x01\x00"),
        (13, b"\x00"),
        (13, b"\x03"),
        (16, b"\x00"),
        (14, b"\0\0"),
        (510, b"xx"),
        (32, bytes(4)),
    ):
        with pytest.raises(Unreadable, match="no FAT"):
            Fat(area(patched(esp, offset, new)))
    with pytest.raises(Unreadable, match="past the end"):
        Fat(area(esp[: 64 << 10])).names("/")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(11, 90), st.binary(min_size=1, max_size=4)), max_size=6))
def test_whatever_a_fat_says_nothing_else_is_raised(esp: bytes, changes: list[tuple[int, bytes]]) -> None:
    data = esp[:MIB]
    for offset, new in changes:
        data = patched(data, offset, new)
    try:
        files = Fat(area(data, Budget(seconds=5)))
        listing(files, "/EFI/BOOT")
        text(files, "/EFI/BOOT/BOOTX64.EFI")
    except (Unreadable, Spent):
        pass


# What is recognised


@pytest.mark.parametrize(
    ("kind", "offset", "magic"),
    [
        ("xfs", 0, b"XFSB"),
        ("btrfs", 0x10040, b"_BHRfS_M"),
        ("LUKS", 0, b"LUKS\xba\xbe"),
        ("LVM", 512, b"LABELONE".ljust(24, b"\0") + b"LVM2 001"),
        ("ntfs", 3, b"NTFS    "),
        ("squashfs", 0, b"hsqs"),
        ("iso9660", 0x8001, b"CD001"),
    ],
)
def test_what_can_not_be_read_is_named(kind: str, offset: int, magic: bytes) -> None:
    found = look(area(patched(bytes(MIB), offset, magic)))
    assert (found.kind, found.files, found.problem) == (kind, None, f"{kind} can't be read here")


def test_swap_and_nothing_are_no_problem(tmp_path: Path) -> None:
    (tmp_path / "swap").write_bytes(bytes(MIB))
    subprocess.run(["/usr/sbin/mkswap", tmp_path / "swap"], check=True, capture_output=True)
    found = look(area(tmp_path / "swap"))
    assert (found.kind, found.problem) == ("swap", None)
    assert look(area(bytes(MIB))).kind is None
    assert look(area(b"")).problem is None


def test_a_damaged_file_system_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    data = patched(ext(tmp_path / "fs", {}).read_bytes(), 1024 + 0x60, struct.pack("<I", 0x10))
    assert "meta_bg" in str(look(area(data)).problem)
