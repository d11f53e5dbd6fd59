"""Many processes that send each other messages: the scheduler, and waking up other CPUs."""

from __future__ import annotations

from polyvisor.compare.scripts import amount_per_second, growing
from polyvisor.compare.workload import Metric, Program, Script

WORKLOAD = Script(
    name="scheduler",
    about="hackbench: 40 senders and 40 receivers in two groups",
    metrics=(Metric(name="loops", unit="1/s", about="messages of every sender to every receiver of its group"),),
    programs=(Program(name="hackbench", package="rt-tests"),),
    script=growing("hackbench -g 2 -l $n >/dev/null", 10),
    read=lambda said: {"loops": amount_per_second(said)},
)
