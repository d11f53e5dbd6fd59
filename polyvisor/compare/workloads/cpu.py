"""Arithmetic by a well-known program: prime numbers of sysbench."""

from __future__ import annotations

import re

from polyvisor.compare.workload import Metric, Program, Script

_EVENTS = re.compile(r"events per second:\s*([\d.]+)")


def _read(said: str) -> dict[str, float]:
    one, every = map(float, _EVENTS.findall(said))
    return {"one": one, "every": every}


WORKLOAD = Script(
    name="cpu",
    about="sysbench: prime numbers up to 10,000, over and over",
    metrics=(
        Metric(name="one", unit="1/s", about="searches of one thread"),
        Metric(name="every", unit="1/s", about="searches of a thread for each CPU that it has"),
    ),
    programs=(Program(name="sysbench", package="sysbench"),),
    script="sysbench cpu --time=2 run && sysbench cpu --time=2 --threads=$(nproc) run",
    read=_read,
)
