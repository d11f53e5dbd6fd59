"""Starting a VM, until its guest offers a login."""

from __future__ import annotations

from polyvisor.compare.life import Life, Timing
from polyvisor.compare.workload import Metric, Stage

WORKLOAD = Life(
    name="boot",
    about="from the start to the login on the console",
    stage=Stage.BIRTH,
    timings=(
        Timing(
            metric=Metric(
                name="start", unit="s", about="from the call until the hypervisor runs the guest", lower_is_better=True
            ),
            event="start",
        ),
        Timing(
            metric=Metric(
                name="login", unit="s", about="from the call until the console offers a login", lower_is_better=True
            ),
            event="boot",
        ),
    ),
)
