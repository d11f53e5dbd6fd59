"""What systemd-networkd is told of guests' devices; tests/lab/test_xen.py shows that the real one heeds it."""

from pathlib import Path

import pytest

from polyvisor.errors import ProcessFailed
from polyvisor.network.nat import interface_name, private_bridge
from polyvisor.network.networkd import leave_guests_alone


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/run/systemd of a host with networkd; `networkctl` notes there how it was called, and fails where `broken` exists."""
    run = tmp_path / "run"
    (run / "netif").mkdir(parents=True)
    (run / "netif" / "state").touch()
    program = tmp_path / "networkctl"
    program.write_text(f'#!/bin/sh\necho "$*" >> {run}/calls\n[ ! -e {run}/broken ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return run


def calls(run: Path) -> list[str]:
    return (run / "calls").read_text().splitlines() if (run / "calls").exists() else []


async def test_it_is_told_once(run_directory: Path) -> None:
    for _ in range(2):
        await leave_guests_alone(run_directory)
    [file] = (run_directory / "network").iterdir()
    assert file.stat().st_mode & 0o777 == 0o644
    assert calls(run_directory) == ["reload"]


async def test_all_cards_of_guests_are_meant(run_directory: Path) -> None:
    await leave_guests_alone(run_directory)
    [file] = (run_directory / "network").iterdir()
    [names] = [line for line in file.read_text().splitlines() if line.startswith("Name=")]
    patterns = names.removeprefix("Name=").split()
    mac = "52:54:00:12:34:56"
    for device in ("vif3.0", "vif3.0-emu", interface_name(mac), interface_name(mac, private_bridge("lan")) + "-emu"):
        assert any(Path(device).match(pattern) for pattern in patterns), device
    assert not any(Path("eth0").match(pattern) for pattern in patterns)


async def test_a_host_without_it_is_left_as_it_is(run_directory: Path) -> None:
    (run_directory / "netif" / "state").unlink()
    await leave_guests_alone(run_directory)
    assert not (run_directory / "network").exists()
    assert calls(run_directory) == []


async def test_what_it_could_not_be_told_is_told_the_next_time(run_directory: Path) -> None:
    (run_directory / "broken").touch()
    with pytest.raises(ProcessFailed):
        await leave_guests_alone(run_directory)
    (run_directory / "broken").unlink()
    await leave_guests_alone(run_directory)
    assert calls(run_directory) == ["reload", "reload"]
