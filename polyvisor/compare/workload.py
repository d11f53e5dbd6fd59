"""What is measured: workloads, each a plug-in in a file of its own in `workloads/`.

A workload measures one or more metrics on a machine, once each time that it is asked. It says what programs it needs there, and
whether it can be measured on a host itself.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Protocol

from polyvisor.compare.target import nearest
from polyvisor.errors import InvalidInput, PolyvisorError
from polyvisor.values import dataclass

if TYPE_CHECKING:
    from polyvisor.compare.machine import Machine


class Stage(IntEnum):
    """When in a guest's life a workload comes: as it is made, while it runs, when it is saved, and goes on again."""

    BIRTH = 0
    INSIDE = 1
    SAVE = 2
    RESTORE = 3


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number that a workload measures; `about` says in a few words what it is."""

    name: str
    unit: str
    about: str
    lower_is_better: bool = False


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program that a workload calls, and Debian's package of it."""

    name: str
    package: str


class Workload(Protocol):
    """`quick` says whether it is among those of a quick comparison; `native` whether a host itself can be measured by it.

    `peer` says whether it takes a second guest, which the first one reaches by its second network card.
    """

    @property
    def name(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def metrics(self) -> tuple[Metric, ...]: ...
    @property
    def programs(self) -> tuple[Program, ...]: ...
    @property
    def stage(self) -> Stage: ...
    @property
    def quick(self) -> bool: ...
    @property
    def native(self) -> bool: ...
    @property
    def peer(self) -> bool: ...

    async def measure(self, machine: Machine) -> dict[str, float]:
        """Every metric's value, by its name; raises errors of Polyvisor."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """A workload that is a shell script for the guest; `read` finds the metrics in what it prints.

    `script` must do with a POSIX shell, and ends within `timeout_s` seconds on the slowest target. `prepare` is run before,
    once per guest, and counts for nothing; so is `prepare_peer`, in a second guest.
    """

    name: str
    about: str
    metrics: tuple[Metric, ...]
    script: str
    read: Callable[[str], dict[str, float]]
    programs: tuple[Program, ...] = ()
    prepare: str = ""
    prepare_peer: str = ""
    quick: bool = False
    native: bool = True
    timeout_s: float = 300.0
    stage: Stage = Stage.INSIDE

    @property
    def peer(self) -> bool:
        return bool(self.prepare_peer)

    async def measure(self, machine: Machine) -> dict[str, float]:
        if self.prepare_peer:
            await machine.prepared_peer(self.name, self.prepare_peer)
        if self.prepare:
            await machine.prepared(self.name, self.prepare)
        said = await machine.run(self.script, timeout_s=self.timeout_s)
        try:
            values = self.read(said)
            if not all(math.isfinite(value) and value > 0 for value in values.values()):
                raise ValueError("a speed or a time is above zero")
            return values
        except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError) as error:
            words = " ".join(said.split())[-200:] or "nothing"
            raise PolyvisorError(f"workload '{self.name}' said what can't be read: {words}") from error


@cache
def all_workloads() -> dict[str, Workload]:
    """Every workload, by name: what the modules in `workloads/` call WORKLOAD or WORKLOADS."""
    from polyvisor.compare import workloads

    found: dict[str, Workload] = {}
    for module in sorted(pkgutil.iter_modules(workloads.__path__), key=lambda each: each.name):
        loaded = importlib.import_module(f"{workloads.__name__}.{module.name}")
        if hasattr(loaded, "WORKLOAD"):
            found[loaded.WORKLOAD.name] = loaded.WORKLOAD
    return found


def choose_workloads(names: Sequence[str], *, quick: bool) -> list[Workload]:
    """The workloads called `names`, or, where none is, all of them, with `quick` the quick ones; raises InvalidInput."""
    known = all_workloads()
    for name in names:
        if name not in known:
            raise InvalidInput("workloads", name, "is not a workload", hint=nearest(name, list(known)))
    if names:
        return [known[name] for name in dict.fromkeys(names)]
    return [each for each in known.values() if each.quick or not quick]
