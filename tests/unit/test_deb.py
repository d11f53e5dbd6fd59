"""Packages are read as dpkg would read them; what is malformed or hostile is refused by name."""

from __future__ import annotations

import gzip
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import ImageRefused
from polyvisor.images import deb as module
from polyvisor.images.deb import DebFile, ar_members, read_deb, resolve
from tests.unit.debs import ar, deb, link, tar

DATA = tar(
    ("./usr/bin/tool", b"#!/bin/sh\n", 0o755),
    ("./usr/share/doc/tool", b"text"),
    link("./usr/lib/libx.so.1", "libx.so.1.2"),
    ("./usr/lib/libx.so.1.2", b"\x7fELF"),
    link("./usr/bin/same", "./usr/bin/tool", tarfile.LNKTYPE),
)


def everything(path: str) -> bool:
    return True


@pytest.mark.parametrize(
    "package",
    [deb(DATA), deb(gzip.compress(DATA), "data.tar.gz"), deb(DATA, "data.tar")],
    ids=["xz", "gz", "uncompressed"],
)
def test_files_and_links(package: bytes) -> None:
    assert read_deb(package, lambda path: "/doc/" not in path) == {
        "usr/bin/tool": DebFile("usr/bin/tool", 0o755, b"#!/bin/sh\n"),
        "usr/lib/libx.so.1": DebFile("usr/lib/libx.so.1", 0o777, target="libx.so.1.2"),
        "usr/lib/libx.so.1.2": DebFile("usr/lib/libx.so.1.2", 0o644, b"\x7fELF"),
        "usr/bin/same": DebFile("usr/bin/same", 0o755, b"#!/bin/sh\n"),
    }


def test_links_are_followed_within_the_package() -> None:
    files = {file.path: file for file in read_deb(deb(DATA), everything).values()}
    found = resolve(files, "usr/lib/libx.so.1")
    assert found is not None
    assert found.data == b"\x7fELF"
    absolute = {"a": DebFile("a", 0o777, target="/usr/lib/libx.so.1"), **files}
    assert resolve(absolute, "a") == found


@pytest.mark.parametrize("target", ["missing", "../../../etc/passwd", "loop"])
def test_links_that_lead_nowhere_resolve_to_nothing(target: str) -> None:
    assert resolve({"x/loop": DebFile("x/loop", 0o777, target=target)}, "x/loop") is None


@pytest.mark.parametrize(
    ("package", "problem"),
    [
        (b"", "not an ar archive"),
        (b"PK\x03\x04", "not an ar archive"),
        (ar(("debian-binary", b"3.0\n")), "not a Debian package of format 2"),
        (ar(("data.tar", DATA)), "not a Debian package"),
        (ar(("debian-binary", b"2.0\n")), "no data.tar"),
        (deb(DATA, "data.tar.rar"), r"compression is unknown: data\.tar\.rar"),
        (deb(DATA)[:-40], "truncated"),
        (ar(("debian-binary", b"2.0\n"))[:30], "header at byte 8 is malformed"),
        (ar(("debian-binary", b"2.0\n")).replace(b"4         `", b"-4        `"), "header at byte 8 is malformed"),
        (ar(("debian-binary", b"2.0\n")).replace(b"4         `", b"9999999999`"), "truncated"),
        (ar(("debian-binary", b"2.0\n"), ("data.tar.xz", b"\xfd7zXZ\0 no")), "can't be unpacked"),
        (ar(("debian-binary", b"2.0\n"), ("data.tar.gz", b"no gzip")), "can't be unpacked"),
        (deb(DATA[:515]), "unpacked|truncated"),
        (deb(tar(("../etc/passwd", b""))), "leaves the root"),
        (deb(tar(("/etc/passwd", b""))), "leaves the root"),
        (deb(tar(("usr/../../x", b""))), "leaves the root"),
        (deb(tar(link("x", "../../etc/shadow", tarfile.LNKTYPE))), "leaves the root"),
        (deb(tar(link("x", "not-before", tarfile.LNKTYPE))), "hard link to not-before"),
    ],
)
def test_what_is_malformed_or_hostile_is_refused(package: bytes, problem: str) -> None:
    with pytest.raises(ImageRefused, match=f"evil is refused: .*({problem})"):
        read_deb(package, everything, "evil")


def test_absurd_sizes_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = tarfile.TarInfo("huge")
    huge.size = 1 << 60
    header = huge.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(ImageRefused, match="unpacks to more than"):
        read_deb(deb(header), everything)
    monkeypatch.setattr(module, "MAX_FILE", 3)
    with pytest.raises(ImageRefused, match="larger than"):
        read_deb(deb(tar(("f", b"four"))), everything)
    assert read_deb(deb(tar(("f", b"four"))), lambda path: path == "g") == {}


@given(st.binary(max_size=300))
def test_noise_is_refused_and_nothing_else_happens(noise: bytes) -> None:
    for package in (noise, b"!<arch>\n" + noise, deb(noise), deb(noise, "data.tar")):
        try:
            files = read_deb(package, everything)
        except ImageRefused:
            continue
        assert files == {}  # an empty tar


@given(st.lists(st.tuples(st.text("abc.", min_size=1, max_size=15), st.binary(max_size=20)), max_size=4))
def test_ar_members_come_back(members: list[tuple[str, bytes]]) -> None:
    assert list(ar_members(ar(*members))) == members


def test_devices_and_directories_are_left_out() -> None:
    device = tarfile.TarInfo("dev/mem")
    device.type = tarfile.CHRTYPE
    directory = tarfile.TarInfo("dev")
    directory.type = tarfile.DIRTYPE
    assert read_deb(deb(tar(directory, device)), everything) == {}
