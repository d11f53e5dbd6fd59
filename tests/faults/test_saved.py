"""Saved VMs whose files are damaged, stale or from elsewhere, and saves that fail: refused, and no VM is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.command import Polyvisor, assert_nothing_left, finish, qemus
from tests.thorough import THOROUGH

pytestmark = pytest.mark.qemu


@pytest.fixture
def saved(polyvisor: Polyvisor) -> Path:
    """The directory in which a VM is saved."""
    polyvisor.good("run", "still", "--name", "vm", "--disk", "1G")
    polyvisor.good("save", "vm")
    return polyvisor.home / "vms/vm/saved"


def truncate(saved: Path) -> None:
    os.truncate(saved / "memory", (saved / "memory").stat().st_size - 1)


def empty(saved: Path) -> None:
    os.truncate(saved / "memory", 0)


def flip(saved: Path) -> None:
    with (saved / "memory").open("r+b") as file:
        file.seek(-100_000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def grow(saved: Path) -> None:
    with (saved / "memory").open("ab") as file:
        file.write(b"more")


def nonsense(saved: Path) -> None:
    (saved / "saved.json").write_text("{]")


def no_state(saved: Path) -> None:
    (saved / "saved.json").unlink()


def edited(key: str, value: Any) -> Callable[[Path], None]:
    def edit(saved: Path) -> None:
        state = json.loads((saved / "saved.json").read_bytes())
        place = state["launch"] if key == "version" else state
        assert key in place
        place[key] = value
        (saved / "saved.json").write_text(json.dumps(state))

    return edit


def write_disk(saved: Path) -> None:
    disk = saved.parent / "disks/disk0.qcow2"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 0x77 0 64k", str(disk)], check=True)


def lose_disk(saved: Path) -> None:
    (saved.parent / "disks/disk0.qcow2").rename(saved.parent / "disks/other")


DAMAGES = {
    "truncated": (truncate, "bytes instead of"),
    "empty": (empty, "0 bytes instead of"),
    "longer": (grow, "bytes instead of"),
    "bit-flipped": (flip, "checksum is wrong"),
    "no JSON": (nonsense, "can't be understood"),
    "no state": (no_state, "saved.json"),
    "wrong type": (edited("size_bytes", "many"), "can't be understood"),
    "of a later format": (edited("format", 99), "can't be understood"),
    "of a newer QEMU": (edited("version", "99.1.2"), "99.1.2"),
    "of another machine": (edited("machine", "pc-i440fx-99.0"), "machine"),
    "of a better processor": (edited("cpu", ["flag-of-tomorrow"]), "flag-of-tomorrow"),
    "disk changed": (write_disk, "disk0.qcow2"),
    "disk gone": (lose_disk, "disk0.qcow2"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_and_kept(polyvisor: Polyvisor, saved: Path, damage: str) -> None:
    """One line says what is wrong and how to go on without; nothing is thrown away before the user says so."""
    spoil, words = DAMAGES[damage]
    spoil(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    line = polyvisor("start", "vm").error_line()
    assert words in line
    assert "polyvisor start --fresh vm" in line
    assert qemus(polyvisor.home) == []
    assert polyvisor.states() == {"vm": "saved"}
    assert before.items() <= {path.name: path.read_bytes() for path in saved.iterdir()}.items()
    if damage == "disk gone":
        (saved.parent / "disks/other").rename(saved.parent / "disks/disk0.qcow2")
    polyvisor.good("start", "--fresh", "vm")
    assert polyvisor.states() == {"vm": "running"}
    assert not saved.exists()
    polyvisor.good("rm", "--force", "vm")
    assert_nothing_left(polyvisor.home)


def test_mended_and_restored(polyvisor: Polyvisor, saved: Path) -> None:
    """A start that was refused does no harm: once the file is right again, the VM goes on."""
    kept = saved.parent.parent.parent / "kept"
    shutil.copyfile(saved / "memory", kept)
    flip(saved)
    polyvisor("start", "vm").error_line()
    shutil.copyfile(kept, saved / "memory")
    polyvisor.good("start", "vm")
    assert polyvisor.states() == {"vm": "running"}
    assert b"-incoming" in Path(f"/proc/{polyvisor.pid('vm')}/cmdline").read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "no JSON"])
def test_damaged_is_removed_and_shown(polyvisor: Polyvisor, saved: Path, damage: str) -> None:
    DAMAGES[damage][0](saved)
    assert polyvisor.states() == {"vm": "saved"}
    if damage == "no JSON":
        assert "can't be understood" in polyvisor("show", "vm").error_line()
    polyvisor.good("kill", "vm")
    polyvisor.good("rm", "vm")
    assert_nothing_left(polyvisor.home)


def test_what_qemu_does_not_understand(polyvisor: Polyvisor, saved: Path) -> None:
    """Where the file is what was written, and QEMU ends over it all the same: its last words, and nothing is lost."""
    state = json.loads((saved / "saved.json").read_bytes())
    argv = state["launch"]["argv"]
    state["launch"]["argv"] = [word if word != "size=128M" else "size=256M" for word in argv]
    (saved / "saved.json").write_text(json.dumps(state))
    line = polyvisor("start", "vm").error_line()
    assert "can't be restored" in line and "--fresh" in line
    assert qemus(polyvisor.home) == []
    assert polyvisor.states() == {"vm": "saved"}
    state["launch"]["argv"] = argv
    (saved / "saved.json").write_text(json.dumps(state))
    polyvisor.good("start", "vm")
    assert polyvisor.states() == {"vm": "running"}


@pytest.mark.parametrize("paused", [False, True])
def test_disk_full_in_the_middle_of_a_save(small: Polyvisor, paused: bool) -> None:
    """90 MiB don't fit on a disk of 24: the VM is as before, and the disk has its room again."""
    small.good("run", "tiny", "--name", "vm", "--wait", "--timeout", "120")
    if paused:
        small.good("pause", "vm")
    free, [pid] = shutil.disk_usage(small.home).free, qemus(small.home)
    done = small("save", "vm")
    assert "disk is full" in done.error_line()
    assert done.status == 8
    assert small.states() == {"vm": "paused" if paused else "running"}
    assert qemus(small.home) == [pid]
    assert not (small.home / "vms/vm/saved").exists()
    assert shutil.disk_usage(small.home).free > free - (1 << 20)
    if paused:
        small.good("resume", "vm")
    small.good("exec", "vm", "true")
    small.good("rm", "--force", "vm")
    assert_nothing_left(small.home)


def test_killed_qemu_in_the_middle_of_a_save(polyvisor: Polyvisor) -> None:
    polyvisor.good("run", "tiny", "--name", "vm", "--memory", "512M", "--wait", "--timeout", "120")
    [pid] = qemus(polyvisor.home)
    process = polyvisor.start("save", "vm")
    new = polyvisor.home / "vms/vm/saved/memory.new"
    while not (new.exists() and new.stat().st_size > 1 << 20):
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    done = finish(("save", "vm"), process)
    assert "was not saved" in done.error_line()
    assert polyvisor.states() == {"vm": "crashed"}
    assert not new.exists()
    polyvisor.good("start", "vm")
    assert polyvisor.states() == {"vm": "running"}


def test_killed_at_any_moment_of_a_save(polyvisor: Polyvisor) -> None:
    """Also while QEMU writes, or reads: the VM is there or saved, and comes back the same."""
    polyvisor.good("run", "tiny", "--name", "vm", "--memory", "512M", "--wait", "--timeout", "120")
    boot_id = polyvisor.good("exec", "vm", "cat", "/proc/sys/kernel/random/boot_id").out
    for moment in (0.25 + 0.03 * i for i in range(0, 10, 1 if THOROUGH else 3)):
        for words in (("save", "vm"), ("start", "vm")):
            process = polyvisor.start(*words)
            time.sleep(moment)
            process.kill()
            finish(words, process)
            assert polyvisor.states()["vm"] in ("running", "paused", "saved")
            polyvisor.good(*words)
    assert polyvisor.states() == {"vm": "running"}
    assert polyvisor.good("exec", "vm", "cat", "/proc/sys/kernel/random/boot_id").out == boot_id
