"""Memory: how much is written in a row, and how often at random places."""

from __future__ import annotations

import re

from polyvisor.compare.workload import Metric, Program, Script

# More than most caches hold. Time is looked at after each block alone: larger ones would take minutes where it is emulated.
_RUN = "sysbench memory --time=2 --memory-scope=local --memory-block-size={block} --memory-total-size=100T {more} run"
_SCRIPT = " && ".join(
    (
        _RUN.format(block="64M", more="--memory-oper=write"),
        _RUN.format(block="64M", more="--memory-oper=read"),
        _RUN.format(block="32M", more="--memory-access-mode=rnd"),
    )
)
_SPEED = re.compile(r"\(([\d.]+) MiB/sec\)")


def _read(said: str) -> dict[str, float]:
    write, read, random = map(float, _SPEED.findall(said))
    return {"write": write, "read": read, "random": random}


WORKLOAD = Script(
    name="bandwidth",
    about="sysbench: memory written and read in a row, and written at random places",
    metrics=(
        Metric(name="write", unit="MiB/s", about="written in a row"),
        Metric(name="read", unit="MiB/s", about="read in a row"),
        Metric(name="random", unit="MiB/s", about="written in words at random places: latency rather than bandwidth"),
    ),
    programs=(Program(name="sysbench", package="sysbench"),),
    script=_SCRIPT,
    read=_read,
)
