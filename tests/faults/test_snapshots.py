"""Snapshots that are damaged, of a full disk, or asked for wrongly: one line says what is wrong, and no VM is lost."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.command import Polyvisor, assert_nothing_left, finish, qemus

pytestmark = pytest.mark.qemu


@pytest.fixture
def kept(polyvisor: Polyvisor) -> Path:
    """The directory of a snapshot with memory; the VM runs."""
    polyvisor.good("run", "still", "--name", "vm", "--disk", "1G")
    made = polyvisor.good("snapshot", "create", "vm", "--name", "a", "--description", "für alle", "--json").json()
    assert (made["name"], made["description"], made["current"]) == ("a", "für alle", True)
    return polyvisor.home / "vms/vm/snapshots/a"


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100_000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


DAMAGES: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "memory flipped": (lambda kept: flip(kept / "memory"), "checksum is wrong", True),
    "memory truncated": (lambda kept: os.truncate(kept / "memory", 1 << 20), "bytes instead of", True),
    "memory described by nonsense": (lambda kept: (kept / "saved.json").write_text("{]"), "can't be understood", False),
    "memory described by nothing": (lambda kept: (kept / "saved.json").unlink(), "saved.json", False),
    "no sense": (lambda kept: (kept / "snapshot.json").write_text("[]"), "can't be understood", False),
    "of a later format": (lambda kept: (kept / "snapshot.json").write_text('{"format": 99}'), "format", False),
}


def test_damaged_ones(polyvisor: Polyvisor, kept: Path) -> None:
    """Refused before anything is changed, or by the start that reads the memory; the disks of then are there still."""
    polyvisor.good("kill", "vm")
    for damage, (spoil, words, at_start) in DAMAGES.items():
        copy = kept.with_name("copy")
        shutil.copytree(kept, copy)
        spoil(kept)
        if at_start:
            polyvisor.good("snapshot", "revert", "vm", "a")
            assert words in polyvisor("start", "vm").error_line(), damage
            assert polyvisor.states() == {"vm": "saved"}
            polyvisor.good("start", "--fresh", "vm")
            polyvisor.good("kill", "vm")
        else:
            assert words in polyvisor("snapshot", "revert", "vm", "a").error_line(), damage
            assert polyvisor.states() == {"vm": "stopped"}
        shutil.rmtree(kept)
        copy.rename(kept)
    polyvisor.good("snapshot", "revert", "vm", "a", "--start")
    assert polyvisor.states() == {"vm": "running"}
    polyvisor.good("snapshot", "rm", "vm", "a")
    polyvisor.good("rm", "--force", "vm")
    assert_nothing_left(polyvisor.home)
    assert list((polyvisor.home / "layers").iterdir()) == []


def test_what_is_shown(polyvisor: Polyvisor, kept: Path) -> None:
    polyvisor.good("snapshot", "create", "vm", "--no-memory")
    lines = polyvisor.good("snapshot", "ls", "vm").out.splitlines()
    assert lines[0].split() == ["NAME", "AGE", "MEMORY", "DISKS", "DESCRIPTION"]
    assert lines[1].startswith("a ") and lines[1].endswith("für alle")
    assert lines[2].startswith("  s1 *")
    shown = polyvisor.good("snapshot", "show", "vm", "s1").out
    assert "as after a power cut" in shown
    assert "did you mean 'a'" in polyvisor("snapshot", "show", "vm", "aa").error_line()
    assert polyvisor("snapshot", "revert", "vm", "b").status == 3
    assert "--force" in polyvisor("snapshot", "revert", "vm", "a").error_line()
    assert "there is no VM" in polyvisor("snapshot", "create", "vn").error_line()
    polyvisor.good("save", "vm")
    assert "polyvisor start vm" in polyvisor("snapshot", "create", "vm").error_line()
    polyvisor.good("start", "vm")
    polyvisor.good("snapshot", "rm", "vm", "a", "s1")
    assert "snapshot create vm" in polyvisor.good("snapshot", "ls", "vm").err


def test_disk_full(small: Polyvisor) -> None:
    """90 MiB of memory don't fit on a disk of 24: the VM runs on, and the disk has its room again."""
    small.good("run", "tiny", "--name", "vm", "--disk", "1G", "--wait", "--timeout", "120")
    free, [pid] = shutil.disk_usage(small.home).free, qemus(small.home)
    done = small("snapshot", "create", "vm")
    assert "disk is full" in done.error_line()
    assert done.status == 8
    assert small.states() == {"vm": "running"}
    assert qemus(small.home) == [pid]
    assert small.good("snapshot", "ls", "vm", "--json").json() == []
    assert shutil.disk_usage(small.home).free > free - (2 << 20)
    small.good("snapshot", "create", "vm", "--no-memory")
    small.good("rm", "--force", "vm")
    assert_nothing_left(small.home)


def test_killed_qemu_in_the_middle(polyvisor: Polyvisor) -> None:
    polyvisor.good("run", "tiny", "--name", "vm", "--memory", "512M", "--disk", "1G", "--wait", "--timeout", "120")
    [pid] = qemus(polyvisor.home)
    process = polyvisor.start("snapshot", "create", "vm", "--name", "a")
    new = polyvisor.home / "vms/vm/snapshots/.new-a/memory"
    while not (new.exists() and new.stat().st_size > 1 << 20):
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    finish(("snapshot", "create", "vm"), process).error_line()
    assert polyvisor.states() == {"vm": "crashed"}
    polyvisor.good("snapshot", "create", "vm", "--name", "a")
    polyvisor.good("start", "vm")
    assert polyvisor.states() == {"vm": "running"}


@pytest.mark.parametrize("verb", ["save", "resume"])
def test_a_guest_that_a_killed_command_left_standing_still(polyvisor: Polyvisor, verb: str) -> None:
    """It was not its user who paused it: it goes on, then or after it was saved."""
    polyvisor.good("run", "tiny", "--name", "vm", "--memory", "512M", "--wait", "--timeout", "120")
    process = polyvisor.start("snapshot", "create", "vm", "--name", "a")
    new = polyvisor.home / "vms/vm/snapshots/.new-a/memory"
    while not (new.exists() and new.stat().st_size > 1 << 20):
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    process.kill()
    assert finish(("snapshot", "create", "vm"), process).killed
    [shown] = polyvisor.good("ls", "--json").json()
    assert shown["state"] == "paused" and "polyvisor resume vm" in shown["reason"]
    polyvisor.good(verb, "vm")
    if verb == "save":
        polyvisor.good("start", "vm")
    assert polyvisor.states() == {"vm": "running"}
    polyvisor.good("pause", "vm")
    made = polyvisor.good("snapshot", "create", "vm", "--name", "a", "--json").json()
    assert (made["running"], polyvisor.states()) == (False, {"vm": "paused"})
