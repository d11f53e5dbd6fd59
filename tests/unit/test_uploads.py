"""Uploads: they arrive whole or not at all, and lead nowhere else."""

import io
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import NotFound, PolyvisorError
from polyvisor.home import Home
from polyvisor.remote.uploads import KEPT_S, Uploads, safe_name
from tests.unit.specs import QUICK

CONTENT = os.urandom(3_000_000)


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(Home(tmp_path))


def test_what_is_taken_is_found_until_it_is_forgotten(uploads: Uploads) -> None:
    upload = uploads.take(io.BytesIO(CONTENT), "disk.qcow2", len(CONTENT))
    other = uploads.take(io.BytesIO(b""), "disk.qcow2", 0)
    file = uploads.find(upload)
    assert file.name == "disk.qcow2"
    assert file.read_bytes() == CONTENT
    assert uploads.find(other).read_bytes() == b""
    assert file.parent.stat().st_mode & 0o777 == 0o700
    uploads.forget(file)
    with pytest.raises(NotFound):
        uploads.find(upload)
    assert list(uploads.directory.iterdir()) == [uploads.directory / other]


def test_no_more_is_taken_than_was_said(uploads: Uploads) -> None:
    source = io.BytesIO(CONTENT)
    assert uploads.find(uploads.take(source, "x", 5)).read_bytes() == CONTENT[:5]
    assert source.tell() == 5


@pytest.mark.parametrize("there", [0, 1, len(CONTENT) - 1])
def test_one_that_breaks_off_leaves_nothing(uploads: Uploads, there: int) -> None:
    with pytest.raises(PolyvisorError, match=f"broke off, {len(CONTENT) - there} bytes before its end"):
        uploads.take(io.BytesIO(CONTENT[:there]), "x", len(CONTENT))
    assert list(uploads.directory.iterdir()) == []


def test_nor_does_one_that_is_interrupted(uploads: Uploads) -> None:
    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uploads.take(Interrupted(), "x", 1)
    assert list(uploads.directory.iterdir()) == []


@pytest.mark.parametrize(
    "upload", ["", "..", "../../etc", "/etc/passwd", "0" * 31, "0" * 33, "0" * 32, "0" * 32 + "\n", "G" * 32]
)
def test_what_is_no_upload(uploads: Uploads, upload: str) -> None:
    uploads.take(io.BytesIO(b"x"), "x", 1)
    with pytest.raises(NotFound):
        uploads.find(upload)


def test_an_empty_directory_is_no_upload(uploads: Uploads) -> None:
    (uploads.directory / ("0" * 32)).mkdir(parents=True)
    with pytest.raises(NotFound):
        uploads.find("0" * 32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("disk.qcow2", "disk.qcow2"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("a b\n.vmdk", "a_b_.vmdk"),
        (".hidden", "hidden"),
        ("...", "image"),
        ("", "image"),
        ("x" * 300 + ".ova", "x" * 96 + ".ova"),
        ("Größe.raw", "Gr__e.raw"),
    ],
)
def test_names_keep_their_end(name: str, expected: str) -> None:
    assert safe_name(name) == expected


@QUICK
@given(st.text())
def test_no_name_leads_elsewhere(name: str) -> None:
    safe = safe_name(name)
    assert Path("/x", safe).parent == Path("/x")
    assert safe == Path("/x", safe).name
    assert len(safe) <= 100


def test_old_uploads_are_removed_and_no_others(uploads: Uploads) -> None:
    uploads.sweep()
    old, new = (uploads.find(uploads.take(io.BytesIO(b"x"), "x", 1)).parent for _ in range(2))
    os.utime(old, (time.time() - KEPT_S - 60,) * 2)
    os.utime(new, (time.time() - KEPT_S + 60,) * 2)
    uploads.sweep()
    assert list(uploads.directory.iterdir()) == [new]
