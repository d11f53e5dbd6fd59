"""In what order everything is measured: rounds, each of which visits every target once, in a new order. Pure functions.

Interleaved (A B C, B A C, …), so that whatever drifts on the machine meanwhile hits all targets alike. The same seed gives the
same order.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from polyvisor.compare.target import Kind, Target
from polyvisor.compare.workload import Stage, Workload
from polyvisor.errors import InvalidInput
from polyvisor.values import dataclass

MAX_RUNS = 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured. `warmups` rounds come first and count for nothing; then `runs` rounds.

    `limit_s` is the time after which no round begins any more.
    """

    seed: int
    runs: int
    warmups: int
    image: str
    targets: tuple[Target, ...]
    workloads: tuple[str, ...]
    limit_s: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.runs <= MAX_RUNS:
            raise InvalidInput("runs", self.runs, "is out of range", hint=f"use 1 to {MAX_RUNS}")
        labels = [target.label for target in self.targets]
        for label in labels:
            if labels.count(label) > 1:
                hint = f"name them: a={label},b={label} compares it with itself"
                raise InvalidInput("targets", label, "stands there twice", hint=hint)
        if not self.targets:
            raise InvalidInput("targets", "", "no target is named", hint="use --targets tcg,kvm")


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What is measured on one target in one round, in this order. Rounds below 0 are warm-ups."""

    round: int
    target: Target
    workloads: tuple[str, ...]


def visits(plan: Plan, workloads: Mapping[str, Workload]) -> list[Visit]:
    """Every visit of `plan`, in order."""
    found = []
    for number in range(-plan.warmups, plan.runs):
        # One generator for each round: a longer plan begins like a shorter one.
        chance = random.Random(f"{plan.seed}/{number}")  # noqa: S311 - an order, not a secret
        order = list(plan.targets)
        chance.shuffle(order)
        names = _order([workloads[name] for name in plan.workloads], chance)
        found += [Visit(round=number, target=t, workloads=_possible(t, names, workloads)) for t in order]
    return [visit for visit in found if visit.workloads]


def _order(workloads: Sequence[Workload], chance: random.Random) -> list[str]:
    """Those inside the guest in a new order each round; what belongs to its life before and after them."""
    inside = [each.name for each in workloads if each.stage is Stage.INSIDE]
    chance.shuffle(inside)
    life = sorted((each for each in workloads if each.stage is not Stage.INSIDE), key=lambda each: each.stage)
    before = [each.name for each in life if each.stage is Stage.BIRTH]
    return [*before, *inside, *(each.name for each in life if each.stage is not Stage.BIRTH)]


def _possible(target: Target, names: Sequence[str], workloads: Mapping[str, Workload]) -> tuple[str, ...]:
    return tuple(name for name in names if target.kind is not Kind.NATIVE or workloads[name].native)


def check_plan(plan: Plan, workloads: Mapping[str, Workload]) -> None:
    """Raise InvalidInput where a target has nothing to do."""
    for target in plan.targets:
        if not _possible(target, plan.workloads, workloads):
            problem = f"none of the workloads {', '.join(plan.workloads)} can be measured without a guest"
            raise InvalidInput("targets", target.label, problem, hint="leave native out, or add another workload")
