"""Timers: how late a sleeper wakes up."""

from __future__ import annotations

import re

from polyvisor.compare.workload import Metric, Program, Script

# Lines "MICROSECONDS COUNT" of the histogram, and those above it as "# Histogram Overflows"; see cyclictest(8).
_MOST_US = 20_000
_SCRIPT = f"cyclictest -q -D 3 -t 1 -i 1000 -p 80 -h {_MOST_US} | awk '/^#/ || $2 > 0'"


def _read(said: str) -> dict[str, float]:
    counts = {int(us): int(count) for us, count in re.findall(r"^(\d+)\s+(\d+)$", said, re.MULTILINE)}
    found = {name: int(value) for name, value in re.findall(r"^# (Avg|Max) Latencies: (\d+)", said, re.MULTILINE)}
    late = re.search(r"^# Histogram Overflows: (\d+)", said, re.MULTILINE)
    total = sum(counts.values()) + int(late[1] if late else 0)
    seen = 0
    p99 = found["Max"]  # where one in a hundred is beyond the histogram
    for us in sorted(counts):
        seen += counts[us]
        if seen >= total * 0.99:
            p99 = us
            break
    return {"average": float(found["Avg"]), "p99": float(p99), "max": float(found["Max"])}


WORKLOAD = Script(
    name="timer",
    about="cyclictest: sleeps of a millisecond, with real-time priority",
    metrics=(
        Metric(name="average", unit="µs", about="how late it wakes up on average", lower_is_better=True),
        Metric(name="p99", unit="µs", about="how late at most, in 99 of 100 cases", lower_is_better=True),
        Metric(name="max", unit="µs", about="the latest", lower_is_better=True),
    ),
    programs=(Program(name="cyclictest", package="rt-tests"),),
    script=_SCRIPT,
    read=_read,
)
