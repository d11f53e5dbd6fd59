"""Page faults: memory that is touched for the first time."""

from __future__ import annotations

from polyvisor.compare.scripts import stress, stressed
from polyvisor.compare.workload import Metric, Program, Script

WORKLOAD = Script(
    name="faults",
    about="stress-ng --fault: pages of a file mapped, touched, unmapped",
    metrics=(Metric(name="rounds", unit="1/s", about="rounds, of some page faults each"),),
    programs=(Program(name="stress-ng", package="stress-ng"),),
    script=stress("fault"),
    read=lambda said: {"rounds": stressed("fault", said)},
)
