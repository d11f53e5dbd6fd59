"""Arithmetic in a tight loop: SHA-256."""

from __future__ import annotations

from polyvisor.compare.scripts import amount_per_second, growing
from polyvisor.compare.workload import Metric, Program, Script

WORKLOAD = Script(
    name="hash",
    about="SHA-256 of zeros, by busybox",
    metrics=(Metric(name="speed", unit="MiB/s", about="hashed"),),
    programs=(Program(name="busybox", package="busybox-static"),),
    script=growing("busybox dd if=/dev/zero bs=1M count=$n 2>/dev/null | busybox sha256sum >/dev/null", 2),
    read=lambda said: {"speed": amount_per_second(said)},
    quick=True,
)
