"""The memory of a template in other processes: it is found where it is, and nothing else is taken for it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polyvisor.drivers.qemu.argv import PID_FILE
from polyvisor.drivers.qemu.fork import seal
from polyvisor.home import Home
from polyvisor.host.from_template import _shared
from polyvisor.host.record import Launch, boot_id, launch_to_json
from polyvisor.host.store import VMDirectory, VMStore
from polyvisor.host.templates import INODE, Note

ID = "0123456789abcdef"
NOTE = Note(id=ID, created_at=0.0, source="vm", machine="pc", vcpus=1, checksums={})


@pytest.fixture
def host(tmp_path: Path) -> Any:
    home = Home(tmp_path / "home")
    home.prepare()
    return SimpleNamespace(store=VMStore(home))


@pytest.fixture
def vm(host: Any) -> Iterator[VMDirectory]:
    """A VM that began from the template, whose process this one is."""
    vm: VMDirectory = host.store.directory("one")
    vm.run.mkdir(parents=True)
    launch = Launch(
        started_at=0.0, boot_id="", hypervisor="tcg", reason="", version="7.2", mode="pvh", argv=(), template=ID
    )
    (vm.path / "launch.json").write_text(launch_to_json(launch))
    (vm.path / PID_FILE).write_text(f"{os.getpid()}\n")
    with vm.alive_file.open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        yield vm


def memory(place: VMDirectory, *, sealed: bool = True, name: str = f"polyvisor-{ID}") -> int:
    """A file in memory, which the template takes for its own."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, 4096)
    if sealed:
        seal(fd)
    place.path.mkdir(parents=True, exist_ok=True)
    (place.path / INODE).write_text(f"{boot_id()} {os.fstat(fd).st_ino}")
    return fd


@pytest.fixture
def place(tmp_path: Path) -> VMDirectory:
    return VMDirectory(tmp_path / "template")


def files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def found(host: Any, place: VMDirectory) -> int | None:
    """The inode of what is found."""
    before = files()
    fd = _shared(host, place, NOTE)
    if fd is None:
        assert files() == before
        return None
    inode = os.fstat(fd).st_ino
    os.close(fd)
    return inode


def test_it_is_found_by_the_pid_file(host: Any, vm: VMDirectory, place: VMDirectory) -> None:
    fd = memory(place)
    assert found(host, place) == os.fstat(fd).st_ino
    os.close(fd)
    assert found(host, place) is None


@pytest.mark.parametrize("said", [None, "", "self", "1e3", "\0", "../../1"])
def test_where_that_says_nothing_by_the_lock(host: Any, vm: VMDirectory, place: VMDirectory, said: str | None) -> None:
    fd = memory(place)
    (vm.path / PID_FILE).unlink()
    if said is not None:
        (vm.path / PID_FILE).write_text(said)
    assert found(host, place) == os.fstat(fd).st_ino
    os.close(fd)


@pytest.mark.parametrize("said", ["-1", "-OURS", "0", "1", "9" * 32, "PARENT"])
def test_a_pid_file_that_lies_does_no_harm(host: Any, vm: VMDirectory, place: VMDirectory, said: str) -> None:
    """A guest that has broken out of its QEMU may write it: then the memory is read from the disk."""
    fd = memory(place)
    said = said.replace("OURS", str(os.getpid())).replace("PARENT", str(os.getppid()))
    (vm.path / PID_FILE).write_text(said)
    assert found(host, place) is None
    os.close(fd)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_one_that_is_no_file_is_not_followed(host: Any, vm: VMDirectory, place: VMDirectory, kind: str) -> None:
    fd = memory(place)
    (vm.path / PID_FILE).unlink()
    if kind == "link":
        (vm.path / PID_FILE).symlink_to("/proc/self/stat")
    else:
        os.mkfifo(vm.path / PID_FILE)
    assert found(host, place) == os.fstat(fd).st_ino
    os.close(fd)


@pytest.mark.parametrize("wrong", ["unsealed", "name", "inode", "boot", "nonsense"])
def test_what_is_not_it_is_not_taken(host: Any, vm: VMDirectory, place: VMDirectory, wrong: str) -> None:
    name = "polyvisor-other" if wrong == "name" else f"polyvisor-{ID}"
    fd = memory(place, sealed=wrong != "unsealed", name=name)
    inode = os.fstat(fd).st_ino
    said = {"inode": f"{boot_id()} {inode + 1}", "boot": f"earlier {inode}", "nonsense": "x"}
    if wrong in said:
        (place.path / INODE).write_text(said[wrong])
    assert found(host, place) is None
    os.close(fd)


def test_vms_of_other_templates_are_not_asked(host: Any, vm: VMDirectory, place: VMDirectory) -> None:
    fd = memory(place)
    launch = json.loads((vm.path / "launch.json").read_text())
    (vm.path / "launch.json").write_text(json.dumps({**launch, "template": "other"}))
    assert found(host, place) is None
    os.close(fd)
