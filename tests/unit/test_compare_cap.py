"""Limits of CPU time by control groups: where the kernel has them, and that they hold."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polyvisor.compare.cap import Controller, CpuCap, cap_refusal, find_controller, sweep

V1 = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n"
# For two seconds of the clock, whatever CPU time that is.
BUSY = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass"


def test_where_the_controller_is() -> None:
    assert find_controller(V1) == Controller(Path("/sys/fs/cgroup/cpu,cpuacct"), 1)
    assert find_controller(V2) == Controller(Path("/sys/fs/cgroup"), 2)
    assert find_controller(V2 + V1) == Controller(Path("/sys/fs/cgroup/cpu,cpuacct"), 1), "one can't be in both"
    assert find_controller("proc /proc proc rw 0 0\n") is None


def test_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "not mounted" in str(cap_refusal("proc /proc proc rw 0 0\n"))
    assert "no controller 'cpu'" in str(cap_refusal("cgroup2 /nowhere cgroup2 rw 0 0\n"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "takes root" in str(cap_refusal(V1))


def test_empty_groups_that_were_left_are_removed(tmp_path: Path) -> None:
    for name in ("polyvisor-compare-left", "polyvisor-compare-used", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "polyvisor-compare-used" / "child").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "polyvisor-compare-used"]


@pytest.mark.skipif(cap_refusal() is not None, reason=f"no CPU limit here: {cap_refusal()}")
def test_what_is_started_inside_has_no_more_and_who_starts_it_is_out_again() -> None:
    before = Path("/proc/self/cgroup").read_text()
    cap = CpuCap(f"test-{os.getpid()}", 30)
    try:
        began = time.monotonic()
        with cap.inside():
            process = subprocess.Popen([sys.executable, "-c", BUSY])
        assert Path("/proc/self/cgroup").read_text() == before
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        took_s = time.monotonic() - began
        assert 0 < usage.ru_utime + usage.ru_stime < 0.35 * took_s + 0.1
    finally:
        cap.close()
    controller = find_controller(Path("/proc/mounts").read_text())
    assert controller is not None
    assert not (controller.path / f"polyvisor-compare-test-{os.getpid()}").exists()
