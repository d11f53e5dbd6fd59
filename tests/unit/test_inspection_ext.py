"""Reading ext file systems that mke2fs made, and those that somebody else did."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyvisor.images.inspection.budget import Budget, Missing, Spent, Unreadable
from polyvisor.images.inspection.ext import Ext
from polyvisor.images.inspection.files import text
from tests.unit.bootable import MIB, area, ext
from tests.unit.disks import patched

NOISE = os.urandom(3 * MIB)
FILES: dict[str, bytes | str | Path] = {
    "small": "hello",
    "empty": b"",
    "large": NOISE,
    "a/b/c": "deep",
    "a/link": Path("b/c"),
    "absolute": Path("/a/link"),
    "up": Path("a/../../../a/b/./c"),
    "long-link": Path("a/" * 1 + "./" * 60 + "b/c"),
    "to-directory": Path("a"),
    "loop": Path("loop2"),
    "loop2": Path("/loop"),
    "grows": Path("grows/grows"),
    "dangling": Path("nowhere"),
}


def debugfs(path: Path, *commands: str) -> None:
    for command in commands:
        subprocess.run(["/usr/sbin/debugfs", "-w", "-R", command, path], check=True, capture_output=True)


def debugfs_says(path: Path, command: str) -> str:
    argv = ["/usr/sbin/debugfs", "-R", command, str(path)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ext2", ()),
        ("ext2", ("-b", "1024", "-O", "^filetype")),
        ("ext2", ("-r", "0")),
        ("ext3", ("-b", "4096")),
        ("ext4", ("-b", "1024", "-O", "extent,64bit,huge_file,flex_bg,metadata_csum,dir_index")),
        ("ext4", ("-b", "4096", "-O", "extent,^64bit,metadata_csum,metadata_csum_seed,large_dir")),
        ("ext4", ("-b", "2048", "-O", "extent,bigalloc", "-I", "256")),
        ("ext4", ("-b", "65536", "-O", "extent")),
    ],
)
def test_what_mke2fs_writes_is_read(tmp_path: Path, kind: str, options: tuple[str, ...]) -> None:
    files = Ext(area(ext(tmp_path / "fs", FILES, *options, "-L", "name", kind=kind, mib=48)))
    assert set(files.names("/")) == {name.split("/")[0] for name in FILES} | {"lost+found"}
    assert files.names("/a/b") == ["c"]
    assert files.read("/small") == b"hello"
    assert files.read("/empty") == b""
    assert files.read("/large", 4 * MIB) == NOISE
    assert {files.read(path) for path in ("/a/link", "/absolute", "/up", "/long-link", "/to-directory/b/c")} == {
        b"deep"
    }
    assert files.canonical("/to-directory/link") == "/a/b/c"
    assert (files.kind, files.label) == (kind, "name")
    assert not files.exists("/dangling")
    for path in ("/loop", "/grows"):
        with pytest.raises(Unreadable, match="too many"):
            files.read(path)
    with pytest.raises(Missing, match="there is no /a/nothing"):
        files.read("/a/nothing")
    with pytest.raises(Unreadable, match="more than the 5"):
        files.read("/large", 5)
    with pytest.raises(Unreadable, match="is not a file"):
        files.read("/a")
    with pytest.raises(Unreadable, match="no directory"):
        files.read("/small/x")


@pytest.mark.parametrize("kind", ["ext2", "ext4"])
def test_large_directories_and_files_in_pieces(tmp_path: Path, kind: str) -> None:
    """A directory with an index (htree), a sparse file, and one whose tree of extents, or map, has several levels."""
    names = {f"many/{'n' * 40}{number}": str(number) for number in range(3000)}
    path = ext(tmp_path / "fs", names, "-b", "1024", "-N", "4000", kind=kind, mib=64)
    piece = b"".join(struct.pack("<I", number) * 256 for number in range(700))
    scattered = tmp_path / "scattered"
    with scattered.open("wb") as file:
        for number in range(700):  # every other block is a hole
            file.seek(number * 2048)
            file.write(piece[number * 1024 : number * 1024 + 1024])
    debugfs(path, f"write {scattered} scattered")
    if kind == "ext4":
        assert "ETB" in debugfs_says(path, "stat scattered"), "its tree has a second level"
    subprocess.run(["/usr/sbin/e2fsck", "-fyD", path], capture_output=True, check=False)
    files = Ext(area(path))
    assert len(files.names("/many")) == 3000
    assert files.read(f"/many/{'n' * 40}2999") == b"2999"
    assert files.read("/scattered", 4 * MIB) == scattered.read_bytes()


def inode_at(data: bytes, number: int) -> int:
    """Where an inode of the first group is, in a file system of 1 KiB blocks."""
    size = struct.unpack_from("<H", data, 1024 + 0x58)[0]
    (table,) = struct.unpack_from("<I", data, 2048 + 8)
    return int(table * 1024 + (number - 1) * size)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small ext4 file system of 1 KiB blocks; inode 12 is its only file `f`, of 9 KiB."""
    directory = tmp_path_factory.mktemp("ext")
    options = ("-b", "1024", "-O", "extent,^has_journal,^metadata_csum,^resize_inode,dir_index", "-N", "64")
    return ext(directory / "fs", {"f": b"f" * 9216}, *options, mib=1).read_bytes()


EXTENT = struct.pack("<HHHHI", 0xF30A, 1, 4, 0, 0)


def extent(first: int, length: int, start: int) -> bytes:
    return EXTENT + struct.pack("<IHHI", first, length, start >> 32, start & 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("field", "new", "words"),
    [
        (0x28, b"\0\0" + EXTENT[2:], "tree of extents is damaged"),
        (0x28, struct.pack("<HHHHI", 0xF30A, 0xFFFF, 4, 0, 0), "tree of extents is damaged"),
        (0x28, struct.pack("<HHHHI", 0xF30A, 1, 4, 6, 0), "tree of extents is damaged"),
        (0x28, struct.pack("<HHHHI", 0xF30A, 1, 4, 1, 0) + struct.pack("<IIHH", 0, 1, 0, 0), "tree of extents is damaged"),
        (0x28, struct.pack("<HHHHI", 0xF30A, 1, 4, 1, 0) + struct.pack("<IIHH", 0, 0xFFFFFFF0, 9, 0), "past the end"),
        (0x28, extent(0, 9, 0xFFFFFFFFFF), "past the end"),
        (0x28, extent(0, 0x8000, 500), "past the end"),
        (0x04, struct.pack("<I", 0xFFFFFFFF), "4294967295 bytes, more than"),
        (0x6C, struct.pack("<I", 0xFFFFFFFF), "more than the 1048576"),
        (0x20, struct.pack("<I", 0x80800), "encrypted"),
        (0x20, struct.pack("<I", 0x10080000), "inline_data"),
        (0x00, struct.pack("<H", 0o10644), "is not a file"),
    ],
)  # fmt: skip
def test_inodes_that_lie(small: bytes, field: int, new: bytes, words: str) -> None:
    assert Ext(area(small)).read("/f") == b"f" * 9216
    with pytest.raises(Unreadable, match=words):
        Ext(area(patched(small, inode_at(small, 12) + field, new))).read("/f")


def test_a_tree_of_extents_that_leads_to_itself_ends(small: bytes) -> None:
    """Each level must be one lower than that above it."""
    node = struct.pack("<HHHHI", 0xF30A, 1, 84, 1, 0) + struct.pack("<IIHH", 0, 900, 0, 0)
    root = struct.pack("<HHHHI", 0xF30A, 1, 4, 2, 0) + struct.pack("<IIHH", 0, 900, 0, 0)
    data = patched(patched(small, 900 * 1024, node), inode_at(small, 12) + 0x28, root)
    with pytest.raises(Unreadable, match="damaged"):
        Ext(area(data)).read("/f")


def test_a_map_that_leads_to_itself_ends(small: bytes) -> None:
    """A table of tables whose every entry is itself: the file's size bounds the walk."""
    table = struct.pack("<256I", *[900] * 256)
    at = inode_at(small, 12)
    data = patched(small, 900 * 1024, table)
    data = patched(data, at + 0x20, struct.pack("<I", 0))
    data = patched(data, at + 0x28, struct.pack("<15I", *[900] * 15))
    data = patched(data, at + 0x04, struct.pack("<I", MIB))
    assert len(Ext(area(data)).read("/f")) == MIB


def test_names_that_lie(small: bytes) -> None:
    root = struct.unpack_from("<I", small, inode_at(small, 2) + 0x28 + 20)[0] * 1024
    for new in (
        struct.pack("<IH", 2, 0),
        struct.pack("<IH", 2, 7),
        struct.pack("<IH", 2, 0xFFFC),
        struct.pack("<IHB", 2, 12, 255),
    ):
        with pytest.raises(Unreadable, match="directory is damaged"):
            Ext(area(patched(small, root, new))).names("/")
    for number in (0xFFFFFFFF, 65):
        where = small.index(b"\x01\x01f\0", root) - 6
        with pytest.raises(Unreadable, match="not there"):
            Ext(area(patched(small, where, struct.pack("<I", number)))).read("/f")


@pytest.mark.parametrize(
    ("offset", "new", "words"),
    [
        (0x38, b"\0\0", "no ext file system"),
        (0x60, struct.pack("<I", 0x1000000), "0x1000000"),
        (0x60, struct.pack("<I", 0x10), "meta_bg"),
        (0x60, struct.pack("<I", 0x1), "compression"),
        (0x18, struct.pack("<I", 7), "superblock is damaged"),
        (0x28, struct.pack("<I", 0), "superblock is damaged"),
        (0x58, struct.pack("<H", 0), "superblock is damaged"),
        (0x58, struct.pack("<H", 0x8000), "superblock is damaged"),
        (0x60, struct.pack("<I", 0x2C2), "superblock is damaged"),
    ],
)
def test_superblocks_that_lie(small: bytes, offset: int, new: bytes, words: str) -> None:
    data = patched(small, 1024 + offset, new)
    if offset == 0x60 and new == struct.pack("<I", 0x2C2):
        data = patched(data, 1024 + 0xFE, struct.pack("<H", 8))
    with pytest.raises(Unreadable, match=words):
        Ext(area(data))


def test_a_file_system_that_is_cut_off(small: bytes) -> None:
    for length in (0, 1000, 1500, 2047, 3000, 20000):
        with pytest.raises(Unreadable):
            Ext(area(small[:length])).read("/f")


def test_work_is_bounded(small: bytes) -> None:
    files = Ext(area(small, Budget(read=20_000)))
    with pytest.raises(Spent, match="far more"):
        for _ in range(10):
            files.read("/f")
    with pytest.raises(Spent, match="longer than"):
        Ext(area(small, Budget(seconds=-1)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1024, 70_000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=12))
def test_whatever_stands_there_nothing_else_is_raised(small: bytes, changes: list[tuple[int, bytes]]) -> None:
    data = small
    for offset, new in changes:
        data = patched(data, offset, new)
    try:
        files = Ext(area(data, Budget(seconds=5)))
        for name in files.names("/"):
            text(files, f"/{name}")
    except (Unreadable, Spent):
        pass


def bushy(data: bytes) -> bytes:
    """The file system with a tree of extents of five levels whose nodes all lead to one node of the next: 84⁵ leaves."""
    for depth in range(5):
        entries = struct.pack("<IIHH", 0, 900 + depth - 1, 0, 0) * 84 if depth else b""
        node = struct.pack("<HHHHI", 0xF30A, 84 if depth else 0, 84, depth, 0) + entries
        data = patched(data, (900 + depth) * 1024, node)
    root = struct.pack("<HHHHI", 0xF30A, 4, 4, 5, 0) + struct.pack("<IIHH", 0, 904, 0, 0) * 4
    return patched(data, inode_at(data, 12) + 0x28, root)


def test_a_tree_of_extents_that_branches_without_end_costs_no_more_than_is_allowed(small: bytes) -> None:
    with pytest.raises(Spent, match="far more"):
        Ext(area(bushy(small), Budget(read=50 * MIB))).read("/f")
