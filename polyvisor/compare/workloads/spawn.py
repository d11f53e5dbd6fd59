"""Starting programs: fork, exec, page faults, exit."""

from __future__ import annotations

from polyvisor.compare.scripts import counting, per_second
from polyvisor.compare.workload import Metric, Program, Script

WORKLOAD = Script(
    name="spawn",
    about="a program that does nothing, started over and over (fork, exec, page faults)",
    metrics=(Metric(name="programs", unit="1/s", about="programs started and ended"),),
    programs=(Program(name="busybox", package="busybox-static"),),
    script=counting("/bin/busybox true"),
    read=lambda said: {"programs": per_second(said)},
    quick=True,
)
