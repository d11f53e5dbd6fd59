"""A copy of a running VM, memory and all."""

from __future__ import annotations

from polyvisor.compare.life import Life, Timing
from polyvisor.compare.workload import Metric, Stage

WORKLOAD = Life(
    name="fork",
    about="a copy of a running VM, memory and all",
    stage=Stage.SAVE,
    timings=(
        Timing(
            metric=Metric(name="time", unit="s", about="from the call until the copy runs", lower_is_better=True),
            event="fork",
        ),
        Timing(
            metric=Metric(name="pause", unit="s", about="how long the VM itself stands still", lower_is_better=True),
            event="fork-pause",
        ),
    ),
)
