"""The newc writer, read back by a reader of its own."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.images import cpio
from tests.unit.newc import unpack


def test_members_of_every_kind_come_back() -> None:
    members = unpack(
        cpio.archive(
            [
                cpio.directory("dev"),
                cpio.character_device("dev/console", 5, 1),
                cpio.file("init", b"#!/bin/sh\n", 0o755),
                cpio.symlink("bin", "usr/bin"),
            ]
        )
    )
    assert members == {
        "dev": (stat.S_IFDIR | 0o755, b"", (0, 0)),
        "dev/console": (stat.S_IFCHR | 0o600, b"", (5, 1)),
        "init": (stat.S_IFREG | 0o755, b"#!/bin/sh\n", (0, 0)),
        "bin": (stat.S_IFLNK | 0o777, b"usr/bin", (0, 0)),
    }


@given(st.dictionaries(st.text("abcdefgh-_.ä", min_size=3, max_size=40), st.binary(max_size=50)))
def test_any_names_and_lengths_stay_aligned(files: dict[str, bytes]) -> None:
    files = {name: content for name, content in files.items() if ".." not in name}
    members = unpack(cpio.archive(cpio.file(name, content) for name, content in files.items()))
    assert {name: content for name, (_, content, _) in members.items()} == files


def test_the_same_entries_give_the_same_bytes() -> None:
    entries = [cpio.directory("a"), cpio.file("a/b", b"c")]
    assert cpio.archive(entries) == cpio.archive(list(entries))


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a\0b"])
def test_paths_that_leave_the_root_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a path"):
        cpio.archive([cpio.file(path, b"")])


def test_padding() -> None:
    assert cpio.padded(b"abcde") == b"abcde\0\0\0"
    assert cpio.padded(b"abcd") == b"abcd"
