"""A loop of a shell: code with many branches, most of it in the guest's user mode."""

from __future__ import annotations

from polyvisor.compare.scripts import counting, per_second
from polyvisor.compare.workload import Metric, Program, Script

WORKLOAD = Script(
    name="loop",
    about="an empty loop in busybox's shell",
    metrics=(Metric(name="loops", unit="1/s", about="turns of the loop"),),
    programs=(Program(name="busybox", package="busybox-static"),),
    script=counting(":"),
    read=lambda said: {"loops": per_second(said)},
    quick=True,
)
