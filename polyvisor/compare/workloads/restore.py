"""Letting a saved VM go on."""

from __future__ import annotations

from polyvisor.compare.life import Life, Timing
from polyvisor.compare.workload import Metric, Stage

WORKLOAD = Life(
    name="restore",
    about="a saved VM that goes on",
    stage=Stage.RESTORE,
    timings=(
        Timing(
            metric=Metric(name="time", unit="s", about="from the call until its vCPUs run again", lower_is_better=True),
            event="restore",
        ),
        Timing(
            metric=Metric(
                name="answer", unit="s", about="from the call until its SSH server answers", lower_is_better=True
            ),
            event="answer",
        ),
    ),
)
