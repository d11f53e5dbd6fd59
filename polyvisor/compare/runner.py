"""Measuring, by a plan: each target in turn, each result on disk before the next, and whatever fails is a result too.

A guest that dies costs one measurement: the next one has a new guest. A host that is lost costs the rest of its target's
visit, and after two visits in a row the target; the others go on. Whoever cancels (Ctrl-C) keeps what there is. A plan that
is carried on measures what has no values yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from polyvisor.compare.machine import Machine
from polyvisor.compare.plan import Visit, visits
from polyvisor.compare.results import Measurement, Results, write
from polyvisor.compare.workload import Workload
from polyvisor.errors import (
    HostKeyChanged,
    InvalidInput,
    LoginRefused,
    PolyvisorError,
    ProcessFailed,
    StorageFull,
    Unavailable,
)
from polyvisor.operation import Progress, Step, silent

LOST_AFTER = 2
# A host that is not to be reached, whatever its guests do.
_HOST_IS_GONE = (Unavailable, LoginRefused, HostKeyChanged)


class Runner:
    """Carries out the plan of `results`, on `machines` by target, and keeps what comes of it in `file`."""

    def __init__(
        self,
        results: Results,
        file: Path,
        machines: Mapping[str, Machine],
        workloads: Mapping[str, Workload],
        progress: Progress = silent,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.results = results
        self._file = file
        self._machines = machines
        self._workloads = workloads
        self._progress = progress
        self._clock = clock
        self._checked: set[str] = set()
        self._lost: dict[str, int] = {}

    async def run(self) -> Results:
        """Measure all that has no values yet; raises InvalidInput where an image lacks a program, StorageFull."""
        todo = self._todo()
        total = sum(len(visit.workloads) for visit in todo)
        pace = Pace(total, self._clock)
        self._keep()
        try:
            for number, visit in enumerate(todo):
                if self._late(pace, todo, number):
                    break
                if self._lost.get(visit.target.label, 0) < LOST_AFTER:
                    await self._visit(visit, pace)
                else:
                    pace.skip(len(visit.workloads))
        finally:
            await self._close()
        return self.results

    def _todo(self) -> list[Visit]:
        """The visits of the plan, without what was measured already; warm-ups only where a target has something left."""
        done, found = self.results.measured(), []
        for visit in visits(self.results.plan, self._workloads):
            left = tuple(n for n in visit.workloads if (visit.round, visit.target.label, n) not in done)
            if left:
                found.append(Visit(round=visit.round, target=visit.target, workloads=left))
        return found

    def _late(self, pace: Pace, todo: Sequence[Visit], number: int) -> bool:
        """Whether the round that begins here would end after the plan's limit; what was begun is finished."""
        limit, visit = self.results.plan.limit_s, todo[number]
        if limit is None or number == 0 or todo[number - 1].round == visit.round or visit.round < 1:
            return False
        work = sum(len(each.workloads) for each in todo if each.round == visit.round)
        if pace.elapsed_s + pace.expected_s(work) <= limit:
            return False
        measured = len({v.round for v in todo[:number] if v.round >= 0})
        note = f"the time ({limit / 60:.0f} minutes) was enough for {measured} of {self.results.plan.runs} runs"
        self.results = self.results.noting(note)
        self._keep()
        return True

    async def _visit(self, visit: Visit, pace: Pace) -> None:
        machine = self._machines[visit.target.label]
        for position, name in enumerate(visit.workloads):
            self._tell(visit, name, pace)
            gone = await self._measure(machine, visit, self._workloads[name])
            pace.count()
            if gone:
                pace.skip(len(visit.workloads) - position - 1)
                return
        self._lost.pop(visit.target.label, None)
        await self._discard(machine, visit)

    async def _measure(self, machine: Machine, visit: Visit, workload: Workload) -> bool:
        """One measurement, kept; returns whether the target's host is gone."""
        label, began = visit.target.label, self._clock()
        values: dict[str, float] = {}
        failure: PolyvisorError | None = None
        try:
            await self._check_programs(machine, visit)
            values = await workload.measure(machine)
        except StorageFull:
            raise
        except PolyvisorError as error:
            if isinstance(error, InvalidInput):
                raise
            failure = error
        took_s = self._clock() - began
        measurement = Measurement(
            round=visit.round,
            target=label,
            workload=workload.name,
            at=time.time(),
            took_s=took_s,
            values=values,
            error=None if failure is None else failure.message,
        )
        self.results = self.results.having(measurement)
        self._keep()
        if failure is None:
            return False
        return await self._recover(machine, visit, failure)

    async def _check_programs(self, machine: Machine, visit: Visit) -> None:
        """Once for each target: raise InvalidInput where it lacks a program of the plan."""
        label = visit.target.label
        if label in self._checked:
            return
        needed = {p.name: p.package for name in visit.workloads for p in self._workloads[name].programs}
        if lacking := await machine.lacking(list(needed)):
            users = [n for n in visit.workloads for p in self._workloads[n].programs if p.name == lacking[0]]
            plan = self.results.plan
            where = f"image '{plan.image}'" if visit.target.kind != "native" else f"the host of target '{label}'"
            hint = "--image bench has all of them" if visit.target.kind != "native" else "install it there"
            raise InvalidInput(
                "workloads",
                users[0],
                f"{where} lacks the program '{lacking[0]}' (Debian's package {needed[lacking[0]]})",
                hint=f"{hint}, or choose other workloads",
            )
        self._checked.add(label)

    async def _recover(self, machine: Machine, visit: Visit, failure: PolyvisorError) -> bool:
        """After a failure: see to a fresh start for the next measurement; returns whether the host is gone."""
        label = visit.target.label
        if isinstance(failure, _HOST_IS_GONE):
            self._lose(label, failure)
            return True
        if isinstance(failure, ProcessFailed) and await machine.alive():
            return False  # what failed is a program in it
        return not await self._discard(machine, visit)

    async def _discard(self, machine: Machine, visit: Visit) -> bool:
        """Remove the machine; returns whether that went well."""
        try:
            await machine.discard()
        except PolyvisorError as error:
            self._lose(visit.target.label, error)
            return False
        return True

    def _lose(self, label: str, error: PolyvisorError) -> None:
        self._lost[label] = self._lost.get(label, 0) + 1
        if self._lost[label] == LOST_AFTER:
            self.results = self.results.noting(f"target '{label}' was given up: {error.message}")
            self._keep()

    async def _close(self) -> None:
        for label, machine in self._machines.items():
            if label not in self._lost:  # a lost host would have to be waited for; the next comparison there tidies up
                with contextlib.suppress(PolyvisorError):
                    await machine.close()

    def _keep(self) -> None:
        write(self._file, self.results)

    def _tell(self, visit: Visit, name: str, pace: Pace) -> None:
        runs = self.results.plan.runs
        turn = "warm-up" if visit.round < 0 else f"run {visit.round + 1} of {runs}"
        self._progress(Step(f"{turn}, {visit.target.label}: {name}{pace.left()}", pace.done, pace.total))


class Pace:
    """How far it is, and how long it will take: `done` of `total`, of which some were left out."""

    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self.total, self.done, self._measured = total, 0, 0
        self._clock, self._began = clock, clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    def count(self) -> None:
        self._measured += 1
        self.done += 1

    def skip(self, count: int) -> None:
        self.done += count

    def expected_s(self, count: int) -> float:
        """How long `count` measurements take at the pace so far."""
        return self.elapsed_s / self._measured * count if self._measured else 0.0

    def left(self) -> str:
        """The time left, in words; nothing before there is something to go by."""
        if self._measured < 3:
            return ""
        seconds = self.expected_s(self.total - self.done)
        return f" ({seconds / 60:.0f} min left)" if seconds >= 90 else f" ({seconds:.0f} s left)"
