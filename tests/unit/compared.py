"""Comparisons for tests: plans, workloads and machines without a guest, and raw data made up by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import field

from polyvisor.compare.plan import Plan
from polyvisor.compare.results import Measurement, Results
from polyvisor.compare.target import Target, parse_target
from polyvisor.compare.workload import Metric, Program, Script, Stage, Workload
from polyvisor.errors import PolyvisorError
from polyvisor.values import dataclass

SPEED = Metric(name="speed", unit="1/s", about="turns")
TIME = Metric(name="time", unit="s", about="until it is done", lower_is_better=True)


def script(name: str, metric: Metric = SPEED, **options: object) -> Script:
    """A workload whose guest says the one number that it measures."""
    return Script(
        name=name,
        about="a test",
        metrics=(metric,),
        script=name,
        read=lambda said: {metric.name: float(said)},
        **options,  # type: ignore[arg-type]
    )


WORKLOADS: dict[str, Workload] = {
    "a": script("a"),
    "b": script("b", TIME, programs=(Program(name="fio", package="fio"),)),
    "birth": script("birth", stage=Stage.BIRTH, native=False),
}


def plan(*targets: str, runs: int = 3, warmups: int = 1, seed: int = 7, limit_s: float | None = None) -> Plan:
    return Plan(
        seed=seed,
        runs=runs,
        warmups=warmups,
        image="tiny",
        targets=tuple(map(parse_target, targets or ("tcg", "kvm"))),
        workloads=tuple(WORKLOADS),
        limit_s=limit_s,
    )


def results(of: Plan | None = None) -> Results:
    of = of or plan()
    return Results(
        id="abc123",
        created_at=1.5,
        version="1",
        plan=of,
        metrics={name: WORKLOADS[name].metrics for name in of.workloads},
    )


def made_up(of: Plan, medians: dict[str, float], *, spread: float = 0.03, seed: int = 1) -> Results:
    """Raw data with values around the median of each target, lognormal as times are."""
    chance = random.Random(seed)
    found = results(of)
    for number in range(of.runs):
        for target in of.targets:
            for name in of.workloads:
                value = medians[target.label] * chance.lognormvariate(0, spread)
                metric = WORKLOADS[name].metrics[0].name
                found = found.having(
                    Measurement(
                        round=number, target=target.label, workload=name, at=2.0, took_s=1.0, values={metric: value}
                    )
                )
    return found


@dataclass(frozen=True)
class Fake:
    """A machine that answers what `answer` says, and notes what was asked of it."""

    target: Target
    answer: Callable[[str], str] = lambda script: "1"
    programs: tuple[str, ...] = ("fio",)
    log: list[str] = field(default_factory=list)
    failing: dict[str, PolyvisorError] = field(default_factory=dict)
    is_alive: bool = False

    async def run(self, script: str, *, timeout_s: float) -> str:
        self.log.append(script)
        if script in self.failing:
            raise self.failing[script]
        return self.answer(script)

    async def prepared(self, name: str, script: str) -> None:
        self.log.append(f"prepare {name}")

    async def prepared_peer(self, name: str, script: str) -> None:
        self.log.append(f"prepare peer of {name}")

    async def lacking(self, programs: list[str]) -> list[str]:
        return [name for name in programs if name not in self.programs]

    async def time_of(self, event: str) -> float:
        return 1.0

    async def memory_mib(self) -> float:
        return 100.0

    async def alive(self) -> bool:
        return self.is_alive

    async def discard(self) -> None:
        self.log.append("discard")
        if "discard" in self.failing:
            raise self.failing["discard"]

    async def close(self) -> None:
        self.log.append("close")
