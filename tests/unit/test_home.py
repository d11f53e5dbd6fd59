"""Where Polyvisor keeps things."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polyvisor.errors import PolyvisorError
from polyvisor.home import Home, default_home


def test_directories_are_for_the_user_alone_and_passable_for_what_root_runs(tmp_path: Path) -> None:
    home = Home(tmp_path / "deep" / "home")
    home.prepare()
    modes = {p.name: p.stat().st_mode & 0o777 for p in home.path.iterdir()}
    open_to = 0o711 if os.geteuid() == 0 else 0o700
    assert modes == {"vms": open_to, "images": open_to, "keys": 0o700, "locks": 0o700, "cache": 0o700}
    assert home.path.stat().st_mode & 0o777 == open_to
    home.prepare()


@pytest.mark.parametrize("mask", [0, 0o077])
def test_permissions_do_not_depend_on_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        Home(tmp_path / "home").prepare()
    finally:
        os.umask(before)
    assert (tmp_path / "home" / "keys").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "home" / "vms").stat().st_mode & 0o777 == (0o711 if os.geteuid() == 0 else 0o700)


def test_many_threads_prepare_a_home_at_once(tmp_path: Path) -> None:
    """All succeed, nothing is left beside it, and the umask, which they share, is as it was."""
    before = os.umask(0o027)
    try:
        for number in range(20):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _, n=number: Home(tmp_path / f"home{n}").prepare(), range(8)))
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {p.name for p in tmp_path.iterdir()} == {f"home{n}" for n in range(20)}
    assert {p.name for p in (tmp_path / "home0").iterdir()} == {"vms", "images", "keys", "locks", "cache"}


def test_permissions_that_someone_chose_are_kept(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o750)
    (tmp_path / "home").chmod(0o750)
    Home(tmp_path / "home").prepare()
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("place", ["file", "file/below", "dangling"])
def test_a_place_where_no_home_can_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("/dev/null")
    with pytest.raises(PolyvisorError, match="preparing"):
        Home(tmp_path / place).prepare()


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYVISOR_HOME", "here")
    assert default_home().path == tmp_path / "here"
    monkeypatch.delenv("POLYVISOR_HOME")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert default_home().path == Path("/var/lib/polyvisor")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_home().path == Path("/home/x/.local/share/polyvisor")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_home().path == Path("/data/polyvisor")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert default_home().path == Path("/home/x/.local/share/polyvisor"), "as the base directory specification has it"
