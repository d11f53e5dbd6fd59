"""Data from one process to another: copies by the kernel, and switches between processes."""

from __future__ import annotations

from polyvisor.compare.scripts import amount_per_second, growing
from polyvisor.compare.workload import Metric, Program, Script

_WORK = "busybox dd if=/dev/zero bs=64k count=$((n * 16)) 2>/dev/null | busybox dd of=/dev/null bs=64k 2>/dev/null"

WORKLOAD = Script(
    name="pipe",
    about="zeros through a pipe, from one process to another",
    metrics=(Metric(name="speed", unit="MiB/s", about="carried"),),
    programs=(Program(name="busybox", package="busybox-static"),),
    script=growing(_WORK, 16),
    read=lambda said: {"speed": amount_per_second(said)},
    quick=True,
)
