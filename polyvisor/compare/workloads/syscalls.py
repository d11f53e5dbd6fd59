"""System calls: the way from user mode to the kernel and back."""

from __future__ import annotations

import re

from polyvisor.compare.scripts import COUNT_S
from polyvisor.compare.workload import Metric, Program, Script

# dd reads and writes one byte a time, and says on SIGUSR1 how often (dd(1)).
_SCRIPT = f"""out=$(mktemp)
read -r a _ </proc/uptime
busybox dd if=/dev/zero of=/dev/null bs=1 2>$out &
p=$!
sleep {COUNT_S}
kill -USR1 $p
read -r b _ </proc/uptime
sleep 0.2
kill -TERM $p
echo $a $b
cat $out
rm $out"""


def _read(said: str) -> dict[str, float]:
    began, ended = said.splitlines()[0].split()
    found = re.search(r"^(\d+)\+\d+ records out", said, re.MULTILINE)
    if found is None:
        raise ValueError("dd told no number")
    return {"calls": 2 * int(found[1]) / (float(ended) - float(began))}


WORKLOAD = Script(
    name="syscalls",
    about="dd, one byte a time: read and write, which do next to nothing in the kernel",
    metrics=(Metric(name="calls", unit="1/s", about="system calls"),),
    programs=(Program(name="busybox", package="busybox-static"),),
    script=_SCRIPT,
    read=_read,
    quick=True,
)
