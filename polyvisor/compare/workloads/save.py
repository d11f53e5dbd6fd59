"""Writing a running VM's memory to disk."""

from __future__ import annotations

from polyvisor.compare.life import Life, Timing
from polyvisor.compare.workload import Metric, Stage

WORKLOAD = Life(
    name="save",
    about="a running VM written to disk",
    stage=Stage.SAVE,
    timings=(
        Timing(
            metric=Metric(name="time", unit="s", about="from the call until it is on disk", lower_is_better=True),
            event="save",
        ),
    ),
)
