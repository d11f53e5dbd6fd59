"""A cap on CPU time, by a control group of the kernel: for guests whose hypervisor keeps no limit itself, and for the host.

This process goes into the group while it starts something, and comes out again: what it has started stays in, from its first
moment. It takes root. Both versions of control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max) and
https://docs.kernel.org/scheduler/sched-bwc.html (version 1).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from polyvisor.errors import Unsupported
from polyvisor.files import storage_errors
from polyvisor.values import dataclass

PERIOD_US = 10_000  # short against what is measured, or a measurement would depend on where in a period it begins
_PREFIX = "polyvisor-compare-"


@dataclass(frozen=True)
class Controller:
    """Where the kernel's `cpu` controller is mounted, and which version it is of."""

    path: Path
    version: int


def find_controller(mounts: str) -> Controller | None:
    """The `cpu` controller among `mounts`, the text of /proc/mounts; one of version 1 hides it from version 2."""
    lines = [line.split() for line in mounts.splitlines()]
    for words in lines:
        if len(words) > 3 and words[2] == "cgroup" and "cpu" in words[3].split(","):
            return Controller(Path(words[1]), 1)
    return next((Controller(Path(w[1]), 2) for w in lines if len(w) > 3 and w[2] == "cgroup2"), None)


def cap_refusal(mounts: str | None = None) -> str | None:
    """Why this process can't cap CPU time, or None."""
    if os.geteuid() != 0:
        return "a cpu_limit outside of Xen takes root, who may make control groups"
    controller = find_controller(Path("/proc/mounts").read_text() if mounts is None else mounts)
    if controller is None:
        return "a cpu_limit outside of Xen takes the kernel's control groups, which are not mounted here"
    if controller.version == 2 and "cpu" not in _words(controller.path / "cgroup.controllers"):
        return "the kernel's control groups have no controller 'cpu' here"
    return None if os.access(controller.path, os.W_OK) else f"{controller.path} can't be written"


class CpuCap:
    """A control group in which there is `percent` of one CPU's time; raises Unsupported."""

    def __init__(self, name: str, percent: int) -> None:
        if reason := cap_refusal():
            raise Unsupported(reason, hint="leave cpu_limit out, or run it as root")
        found = find_controller(Path("/proc/mounts").read_text())
        assert found is not None  # noqa: S101 - there would be a refusal
        self._controller = found
        self._group = found.path / f"{_PREFIX}{name}"
        with storage_errors("making a control group"):
            sweep(found.path)
            if found.version == 2 and "cpu" not in _words(found.path / "cgroup.subtree_control"):
                (found.path / "cgroup.subtree_control").write_text("+cpu")
            self._group.mkdir(exist_ok=True)
            quota = PERIOD_US * percent // 100
            if found.version == 2:
                (self._group / "cpu.max").write_text(f"{quota} {PERIOD_US}")
            else:
                (self._group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (self._group / "cpu.cfs_quota_us").write_text(str(quota))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What is started in the block is capped, for as long as it lives."""
        home = self._own()
        _enter(self._group)
        try:
            yield
        finally:
            _enter(home)

    def close(self) -> None:
        """Remove the group, if nothing lives in it any more; the next one does it otherwise."""
        with contextlib.suppress(OSError):
            self._group.rmdir()

    def _own(self) -> Path:
        """The group that this process is in (cgroups(7), /proc/self/cgroup)."""
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            wanted = "cpu" in controllers.split(",") if self._controller.version == 1 else not controllers
            if wanted:
                return self._controller.path / path.lstrip("/")
        return self._controller.path


def sweep(directory: Path) -> None:
    """Remove the empty groups that killed comparisons have left; the kernel keeps those that are in use."""
    for group in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            group.rmdir()


def _enter(group: Path) -> None:
    with storage_errors("entering a control group"):
        (group / "cgroup.procs").write_text(str(os.getpid()))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
