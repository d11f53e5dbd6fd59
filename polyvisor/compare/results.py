"""Raw data of a comparison: one JSON file, written anew after every measurement, from which reports are drawn.

It holds the plan too, so that a comparison that was cut off can go on (`--resume`), and every failure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from polyvisor.compare.plan import Plan
from polyvisor.compare.workload import Metric
from polyvisor.errors import InvalidInput, NotFound, PolyvisorError
from polyvisor.files import storage_errors, write_atomic
from polyvisor.spec.parse import structure, unstructure
from polyvisor.values import dataclass

FORMAT = 1
MAX_FILE = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came of one workload on one target in one round: `values` by metric, or the `error`.

    `at` is when it ended, in seconds since the epoch; `took_s` how long it took, by the clock of who measures.
    """

    round: int
    target: str
    workload: str
    at: float
    took_s: float
    values: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def place(self) -> tuple[int, str, str]:
        return self.round, self.target, self.workload


@dataclass(frozen=True, kw_only=True)
class Results:
    """A comparison: what was planned, where (`environments`, by target), and what was measured so far.

    `metrics` are those of each workload, as they were then. `notes` are what a reader should know beside, in words.
    """

    id: str
    created_at: float
    version: str
    plan: Plan
    metrics: dict[str, tuple[Metric, ...]]
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()

    def having(self, *measurements: Measurement) -> Results:
        """With `measurements` in place of earlier ones of the same place in the plan."""
        places = {each.place for each in measurements}
        kept = tuple(each for each in self.measurements if each.place not in places)
        return replace(self, measurements=(*kept, *measurements))

    def noting(self, note: str) -> Results:
        return self if note in self.notes else replace(self, notes=(*self.notes, note))

    def measured(self) -> set[tuple[int, str, str]]:
        """The places in the plan that have values."""
        return {each.place for each in self.measurements if each.error is None}

    def values(self, target: str, workload: str, metric: str) -> list[float]:
        """All that was measured of a metric on a target, but for warm-ups, by round."""
        found = [m for m in self.measurements if m.target == target and m.workload == workload and m.round >= 0]
        return [each.values[metric] for each in sorted(found, key=lambda m: m.round) if metric in each.values]


def to_json(results: Results) -> str:
    return json.dumps({"format": FORMAT, **unstructure(results)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str | bytes, name: str) -> Results:
    """The results in `text`, which file `name` holds; raises InvalidInput for anything else."""
    try:
        raw: Any = json.loads(text, parse_int=_whole, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("file", name, f"is not the raw data of a comparison: {error}") from error
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise InvalidInput("file", name, f"is not the raw data of a comparison, of format {FORMAT}")
    try:
        found = structure(_with_floats(raw), Results)
    except InvalidInput as error:
        raise InvalidInput("file", name, f"is not the raw data of a comparison: {error.message}") from error
    for each in found.measurements:
        if not all(map(math.isfinite, each.values.values())):
            raise InvalidInput("file", name, f"has a value of {each.workload} that is no number")
    return found


def _whole(text: str) -> int:
    if len(text) > 18:
        raise ValueError("it has a number of very many digits")
    return int(text)


def _refuse(text: str) -> None:
    raise ValueError(f"it has {text} for a number")


def _with_floats(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with whole numbers as floats where those belong: other programs write 2 for 2.0."""

    def number(value: object) -> object:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def one(each: object) -> object:
        if not isinstance(each, dict):
            return each
        values = each.get("values")
        values = {key: number(value) for key, value in values.items()} if isinstance(values, dict) else values
        times = {key: number(each[key]) for key in ("at", "took_s") if key in each}
        return {**each, **times, **({} if values is None else {"values": values})}

    measurements, plan = raw.get("measurements"), raw.get("plan")
    if isinstance(measurements, list):
        raw = {**raw, "measurements": [one(each) for each in measurements]}
    if isinstance(plan, dict) and "limit_s" in plan:
        raw = {**raw, "plan": {**plan, "limit_s": number(plan["limit_s"])}}
    return {**raw, "created_at": number(raw.get("created_at"))}


def write(path: Path, results: Results) -> None:
    """Write `results` so that a crash leaves the old or the new; raises StorageFull, NotPermitted."""
    with storage_errors(f"writing {path}"):
        write_atomic(path, to_json(results), mode=0o644)


def read(path: Path) -> Results:
    """The results in a file; raises NotFound, InvalidInput."""
    try:
        with storage_errors(f"reading {path}"), path.open("rb") as file:
            text = file.read(MAX_FILE + 1)
    except PolyvisorError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise NotFound(f"there is no file {path}", hint="polyvisor compare writes one, and says where") from error
        raise
    if len(text) > MAX_FILE:
        raise InvalidInput("file", str(path), "is larger than 256 MiB")
    return from_json(text, str(path))


def merged(every: Sequence[Results]) -> Results:
    """Several comparisons as one: their rounds one after the other, targets of the same name taken for the same.

    Raises InvalidInput where two of the same name are not the same.
    """
    first, *others = every
    result = first
    for other in others:
        result = _joined(result, other)
    return result


def _joined(result: Results, other: Results) -> Results:
    known = {target.label: target for target in result.plan.targets}
    for target in other.plan.targets:
        if known.setdefault(target.label, target) != target:
            problem = f"is {known[target.label]} in one file and {target} in the other"
            raise InvalidInput("targets", target.label, problem, hint="give them other names, as new=tcg")
    if result.plan.image != other.plan.image:
        problem = f"is '{result.plan.image}' in one file and '{other.plan.image}' in the other"
        raise InvalidInput("image", other.plan.image, problem, hint="merge comparisons of the same image")
    runs = result.plan.runs
    shifted = [replace(m, round=m.round + runs) if m.round >= 0 else m for m in other.measurements]
    plan = replace(
        result.plan,
        runs=runs + other.plan.runs,
        targets=tuple(known.values()),
        workloads=tuple(dict.fromkeys((*result.plan.workloads, *other.plan.workloads))),
    )
    joined = replace(
        result,
        plan=plan,
        metrics={**other.metrics, **result.metrics},
        environments={**other.environments, **result.environments},
    )
    for note in other.notes:
        joined = joined.noting(note)
    return joined.having(*(m for m in shifted if m.place not in result.measured()))
