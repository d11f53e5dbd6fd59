"""Context switches: two processes that wait for each other."""

from __future__ import annotations

from polyvisor.compare.scripts import stress, stressed
from polyvisor.compare.workload import Metric, Program, Script

WORKLOAD = Script(
    name="switches",
    about="stress-ng --switch: messages from one process to another through a pipe",
    metrics=(Metric(name="switches", unit="1/s", about="messages, each a switch to the other process"),),
    programs=(Program(name="stress-ng", package="stress-ng"),),
    script=stress("switch"),
    read=lambda said: {"switches": stressed("switch", said)},
)
