"""Making a VM: its directory, its disk, its seed."""

from __future__ import annotations

from polyvisor.compare.life import Life, Timing
from polyvisor.compare.workload import Metric, Stage

WORKLOAD = Life(
    name="create",
    about="a new VM, without starting it",
    stage=Stage.BIRTH,
    timings=(
        Timing(
            metric=Metric(
                name="time", unit="s", about="from the call to the VM that can be started", lower_is_better=True
            ),
            event="create",
        ),
    ),
)
