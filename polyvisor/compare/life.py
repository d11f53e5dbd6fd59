"""Workloads that are about the life of a VM: how long the verbs of `HostApi` take."""

from __future__ import annotations

from polyvisor.compare.machine import Machine
from polyvisor.compare.workload import Metric, Program, Stage
from polyvisor.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A metric that is the time of an event in a guest's life (see `Machine.time_of`)."""

    metric: Metric
    event: str


@dataclass(frozen=True, kw_only=True)
class Life:
    """A workload that times events; guests alone have them."""

    name: str
    about: str
    stage: Stage
    timings: tuple[Timing, ...]
    programs: tuple[Program, ...] = ()
    quick: bool = True
    native: bool = False
    peer: bool = False

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(timing.metric for timing in self.timings)

    async def measure(self, machine: Machine) -> dict[str, float]:
        return {timing.metric.name: await machine.time_of(timing.event) for timing in self.timings}
