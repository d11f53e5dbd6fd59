"""A database: PostgreSQL with many small transactions."""

from __future__ import annotations

import re

from polyvisor.compare.workload import Metric, Program, Script

_PREPARE = """systemctl start postgresql
su postgres -c 'createdb bench && pgbench -i -q -s 2 bench' 2>&1"""


def _read(said: str) -> dict[str, float]:
    tps = re.search(r"^tps = ([\d.]+)", said, re.MULTILINE)
    latency = re.search(r"^latency average = ([\d.]+) ms", said, re.MULTILINE)
    if tps is None or latency is None:
        raise ValueError("pgbench told no rate")
    return {"transactions": float(tps[1]), "latency": float(latency[1])}


WORKLOAD = Script(
    name="database",
    about="pgbench: the transactions of TPC-B on PostgreSQL, four clients",
    metrics=(
        Metric(name="transactions", unit="1/s", about="committed, and so on disk"),
        Metric(name="latency", unit="ms", about="of a transaction, on average", lower_is_better=True),
    ),
    programs=(Program(name="pgbench", package="postgresql"),),
    prepare=_PREPARE,
    script="su postgres -c 'pgbench -n -T 4 -c 4 -j 2 bench' 2>/dev/null",
    read=_read,
    native=False,  # the host's database is the host's
)
