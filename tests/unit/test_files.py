"""Writing so that nobody sees a half, and what the operating system's errors mean."""

import errno
import os
from pathlib import Path

import pytest

from polyvisor.errors import NotPermitted, PolyvisorError, StorageFull
from polyvisor.files import is_flocked, storage_errors, sync_directory, write_atomic


def test_content_and_mode(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "é\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    write_atomic(tmp_path / "a", b"\x00", mode=0o444)
    assert (tmp_path / "a").read_bytes() == b"\x00"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o444
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_the_old_content_stays_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_real_full_device_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / f".a.{os.getpid()}").symlink_to("/dev/full")
    write_atomic(tmp_path / "b", "x")
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a", "x" * 100_000)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_what_an_interrupted_write_of_the_same_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / f".a.{os.getpid()}").write_text("a longer leftover")
    write_atomic(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.ENOSPC, StorageFull, "the disk is full"),
        (errno.EDQUOT, StorageFull, "the disk is full"),
        (errno.EACCES, NotPermitted, "Permission denied"),
        (errno.EPERM, NotPermitted, "Operation not permitted"),
        (errno.EROFS, NotPermitted, "Read-only file system"),
        (errno.EIO, PolyvisorError, "Input/output error"),
        (errno.EISDIR, PolyvisorError, "Is a directory"),
    ],
)
def test_what_errors_mean(number: int, kind: type[PolyvisorError], says: str) -> None:
    with pytest.raises(PolyvisorError) as caught, storage_errors("writing X"):
        raise OSError(number, os.strerror(number), "/some/file")
    assert type(caught.value) is kind
    assert caught.value.message == f"writing X: {says} (/some/file)"
    assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="x"), storage_errors("y"):
        raise ValueError("x")
    with pytest.raises(PolyvisorError, match="y: just words"), storage_errors("y"):
        raise OSError("just words")


def test_a_missing_file_is_not_locked(tmp_path: Path) -> None:
    assert not is_flocked(tmp_path / "absent")
    (tmp_path / "a").touch()
    assert not is_flocked(tmp_path / "a")


def test_syncing_what_is_no_directory_is_an_error(tmp_path: Path) -> None:
    sync_directory(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_directory(tmp_path / "absent")
