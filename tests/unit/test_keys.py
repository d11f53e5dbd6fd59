"""Host keys in reserve: one is there for the next VM, and nothing fails where there can't be one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from polyvisor.host.keys import RESERVE, Reserve, give_host_key, read_host_key


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir(mode=0o700)
    return tmp_path / "keys"


async def reserve(keys: Path) -> None:
    async with Reserve(keys) as made:
        made.begin()


async def test_the_next_vm_takes_the_one_in_reserve(keys: Path, tmp_path: Path) -> None:
    await reserve(keys)
    assert [path.name for path in keys.iterdir()] == [RESERVE]
    public = (keys / RESERVE / "host_key.pub").read_text().strip()
    await give_host_key(tmp_path, keys)
    assert list(keys.iterdir()) == []
    assert read_host_key(tmp_path).public == public
    assert public.startswith("ssh-ed25519 ")


@pytest.mark.parametrize("lost", ["host_key", "host_key.pub"])
async def test_one_that_a_power_cut_has_emptied_is_not_taken(keys: Path, tmp_path: Path, lost: str) -> None:
    await reserve(keys)
    (keys / RESERVE / lost).write_bytes(b"")
    await give_host_key(tmp_path, keys)
    made = read_host_key(tmp_path)
    assert made.dropbear
    assert made.public.startswith("ssh-ed25519 ")
    assert list(keys.iterdir()) == []


async def test_there_is_never_more_than_one(keys: Path) -> None:
    await reserve(keys)
    before = (keys / RESERVE / "host_key").read_text()
    await reserve(keys)
    assert (keys / RESERVE / "host_key").read_text() == before


async def test_what_a_killed_command_left_is_in_nobodys_way(keys: Path) -> None:
    (keys / f".{RESERVE}").mkdir()
    (keys / f".{RESERVE}" / "host_key").write_text("half")
    await reserve(keys)
    assert (keys / RESERVE / "host_key").read_text() != "half"


async def test_it_does_not_wait_for_another_command(keys: Path) -> None:
    fd = os.open(keys, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        await reserve(keys)
    finally:
        os.close(fd)
    assert list(keys.iterdir()) == []


async def test_it_is_no_failure_if_it_fails(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyvisor.host.keys.find_program", lambda *_, **__: "/bin/false")
    await reserve(keys)
    assert not (keys / RESERVE).exists()
    await reserve(keys / "missing")


async def test_what_is_not_begun_is_not_made(keys: Path) -> None:
    async with Reserve(keys):
        pass
    assert list(keys.iterdir()) == []
