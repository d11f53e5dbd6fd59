"""Pieces of the workloads' shell scripts: counting for a while, and timing a growing amount of work.

Guests tell their time by /proc/uptime, to a hundredth of a second: it is there everywhere, and reading it starts no program.
What is counted runs for two seconds, what is timed for at least one.
"""

from __future__ import annotations

import re

COUNT_S = 2


def counting(step: str, shell: str = "busybox sh") -> str:
    """A script that does `step` over and over, and prints how often, and the uptime before and after."""
    return f"""{shell} -c '
read -r a _ </proc/uptime
i=0
trap "read -r b _ </proc/uptime; echo \\$i \\$a \\$b; exit 0" TERM
( sleep {COUNT_S}; kill -TERM $$ ) &
while :; do {step}; i=$((i + 1)); done'"""


def per_second(said: str) -> float:
    """What `counting` has counted, in one second."""
    count, began, ended = said.split()
    return int(count) / (float(ended) - float(began))


def growing(work: str, first: int) -> str:
    """A script that does `work` for $n (MiB, loops), from `first` on, twice as many until it takes a second.

    What takes less tells more of the clock than of the work.

    It prints n, and how many hundredths of a second it took.
    """
    return f"""n={first}
while :; do
  read -r a _ </proc/uptime
  {work} || exit 1
  read -r b _ </proc/uptime
  t=$(( ${{b%.*}}${{b#*.}} - ${{a%.*}}${{a#*.}} ))
  if [ $t -ge 100 ]; then echo $n $t; exit 0; fi
  n=$((n * 2))
done"""


def amount_per_second(said: str) -> float:
    """How much `growing` has done in a second."""
    amount, hundredths = said.split()
    return int(amount) * 100 / int(hundredths)


def stress(stressor: str) -> str:
    """A script that runs one stressor of stress-ng(1) for a while."""
    return f"cd /tmp && stress-ng --{stressor} 1 --timeout {COUNT_S} --metrics-brief 2>&1"


def stressed(stressor: str, said: str) -> float:
    """How many of its operations it did in one second of real time."""
    # stressor, operations, seconds: real, user, system; operations for each real second.
    found = re.search(rf"\b{stressor}\s+\d+\s+[\d.]+\s+[\d.]+\s+[\d.]+\s+([\d.]+)", said)
    if found is None:
        raise ValueError("stress-ng told no metrics")
    return float(found[1])
