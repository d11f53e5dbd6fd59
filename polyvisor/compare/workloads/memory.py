"""The memory that a guest takes from its host."""

from __future__ import annotations

from polyvisor.compare.machine import Machine
from polyvisor.compare.workload import Metric, Program, Stage
from polyvisor.values import dataclass


@dataclass(frozen=True, kw_only=True)
class _Memory:
    name: str = "memory"
    about: str = "the host's memory that one guest takes, after it has booted"
    metrics: tuple[Metric, ...] = (
        Metric(
            name="taken",
            unit="MiB",
            about="on QEMU its process's share, on Xen what Xen has less",
            lower_is_better=True,
        ),
        Metric(name="density", unit="1/GiB", about="guests that fit into a GiB by that"),
    )
    programs: tuple[Program, ...] = ()
    stage: Stage = Stage.BIRTH
    quick: bool = True
    native: bool = False
    peer: bool = False

    async def measure(self, machine: Machine) -> dict[str, float]:
        taken = await machine.memory_mib()
        return {"taken": taken, "density": 1024 / taken} if taken > 0 else {"taken": taken}


WORKLOAD = _Memory()
