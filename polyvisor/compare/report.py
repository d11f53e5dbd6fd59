"""From raw data to what is said of it: for every metric the targets beside the baseline, with verdicts. Pure functions.

The forms of a report (terminal, Markdown, HTML) are drawn from a `Report`; its JSON is the `Report` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from polyvisor.compare import statistics
from polyvisor.compare.environment import is_emulated, is_nested
from polyvisor.compare.results import Results
from polyvisor.compare.statistics import Comparison, Summary, Verdict
from polyvisor.compare.target import Kind, Target, nearest
from polyvisor.compare.workload import Metric
from polyvisor.errors import InvalidInput
from polyvisor.values import dataclass

EMULATED = "EMULATED: only the shape carries over to hardware, not the figures."


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A metric on one target: its values, what follows from them, and how often measuring failed.

    `comparison` is with the values of `baseline`, another cell's name; it is None for a baseline, and where there is nothing.
    """

    name: str
    values: tuple[float, ...]
    summary: Summary | None
    baseline: str | None = None
    comparison: Comparison | None = None
    failures: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A metric of a workload on every target."""

    workload: str
    metric: Metric
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report says. `emulated` and `nested` name targets; `errors` are what went wrong, and how often."""

    title: str
    created_at: float
    version: str
    image: str
    seed: int
    rows: tuple[Row, ...]
    summary: tuple[str, ...]
    emulated: tuple[str, ...]
    nested: tuple[str, ...]
    notes: tuple[str, ...]
    errors: tuple[str, ...]
    environments: dict[str, dict[str, str]]
    command: str

    @property
    def notice(self) -> str | None:
        """What stands in large letters on top, where figures are not those of hardware."""
        return f"{EMULATED} Emulated: {', '.join(self.emulated)}." if self.emulated else None


def report_of(results: Results, baseline: str | None = None) -> Report:
    """The report on `results`, where others are compared with target `baseline`.

    By default that is `native`, else the first target. Raises InvalidInput for a target that is not there.
    """
    plan = results.plan
    base = _baseline(plan.targets, baseline)
    rows = [
        Row(workload=workload, metric=metric, cells=tuple(_cells(results, workload, metric, base)))
        for workload in plan.workloads
        for metric in results.metrics.get(workload, ())
    ]
    rows = [row for row in rows if any(cell.values or cell.failures for cell in row.cells)]
    others = [target.label for target in plan.targets if target.label != base]
    return Report(
        title=f"Comparison of {', '.join(target.label for target in plan.targets)}",
        created_at=results.created_at,
        version=results.version,
        image=plan.image,
        seed=plan.seed,
        rows=tuple(rows),
        summary=tuple(in_words(label, base, rows) for label in others),
        emulated=_those(results, is_emulated),
        nested=_those(results, lambda _, facts: is_nested(facts)),
        notes=results.notes,
        errors=tuple(errors_of(results)),
        environments=results.environments,
        command=command_of(results),
    )


def _baseline(targets: Sequence[Target], wanted: str | None) -> str:
    labels = [target.label for target in targets]
    if wanted is not None and wanted not in labels:
        raise InvalidInput("baseline", wanted, "is not a target of this comparison", hint=nearest(wanted, labels))
    native = next((target.label for target in targets if target.kind is Kind.NATIVE), labels[0])
    return wanted or native


def _cells(results: Results, workload: str, metric: Metric, baseline: str) -> Iterator[Cell]:
    reference = results.values(baseline, workload, metric.name)
    native = {target.label for target in results.plan.targets if target.kind is Kind.NATIVE}
    measured = {m.workload for m in results.measurements if m.target in native}
    for target in results.plan.targets:
        values = results.values(target.label, workload, metric.name)
        if target.kind is Kind.NATIVE and not values and workload not in measured:
            continue  # it is about guests
        failures = [m for m in results.measurements if m.error and (m.target, m.workload) == (target.label, workload)]
        yield cell_of(
            target.label,
            values,
            None if target.label == baseline else baseline,
            reference,
            metric,
            failures=sum(each.round >= 0 for each in failures),
        )


def cell_of(
    name: str,
    values: Sequence[float],
    baseline: str | None,
    reference: Sequence[float],
    metric: Metric,
    *,
    failures: int = 0,
) -> Cell:
    """The cell of `values`, compared with `reference`, those of `baseline`, where there are such."""
    compared = None
    if baseline is not None and values and reference:
        compared = statistics.compare(reference, values, lower_is_better=metric.lower_is_better)
    return Cell(
        name=name,
        values=tuple(values),
        summary=statistics.summarize(values) if values else None,
        baseline=baseline,
        comparison=compared,
        failures=failures,
    )


def in_words(name: str, baseline: str, rows: Sequence[Row]) -> str:
    """What the verdicts on target `name` come to, in a sentence or two."""
    found: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    for row in rows:
        for cell in row.cells:
            if cell.name == name and cell.comparison is not None:
                about = f"{row.workload} {row.metric.name} ({change_of(cell.comparison)})"
                found[cell.comparison.verdict].append(about)
    total = sum(map(len, found.values()))
    if not total:
        return f"{name} could not be compared with {baseline}."
    said = [
        f"{word} in {len(found[verdict])} of {total}: {', '.join(found[verdict])}"
        for verdict, word in ((Verdict.BETTER, "better"), (Verdict.WORSE, "worse"))
        if found[verdict]
    ]
    if found[Verdict.NONE]:
        said.append(f"no difference shown in {len(found[Verdict.NONE])} of {total}")
    if found[Verdict.TOO_FEW]:
        said.append(f"too few runs to tell in {len(found[Verdict.TOO_FEW])} of {total}")
    return f"{name} against {baseline}: {'; '.join(said)}."


def figure(value: float) -> str:
    """A number with three digits that count: ``1,234,000``, ``12.3``, ``0.0123``."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        digits = len(f"{abs(value):.0f}") - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}"


def change_of(comparison: Comparison) -> str:
    """The change of a median, with its sign: ``+12 %``, or, where it is no ratio, ``+0.3``; from a tripling on ``× 3.1``."""
    if not comparison.is_relative:
        return f"{'+' if comparison.change >= 0 else '−'}{figure(abs(comparison.change))}"
    return _share(comparison.change)


def _share(change: float) -> str:
    if change >= 2:
        return f"× {figure(1 + change)}"
    return f"{'+' if change >= 0 else '−'}{abs(change) * 100:.1f} %"


def interval_of(comparison: Comparison) -> str:
    """The interval of a change: ``−3.0 % to +4.1 %``; empty where there is none."""
    if comparison.low is None or comparison.high is None:
        return ""
    if not comparison.is_relative:
        return f"{comparison.low:+.3g} to {comparison.high:+.3g}"
    return f"{_share(comparison.low)} to {_share(comparison.high)}"


def _those(results: Results, true: Callable[[Target, dict[str, str]], bool]) -> tuple[str, ...]:
    targets = results.plan.targets
    return tuple(t.label for t in targets if true(t, results.environments.get(t.label, {})))


def errors_of(results: Results) -> Iterator[str]:
    """Each thing that went wrong, with how often."""
    found: dict[tuple[str, str, str], int] = {}
    for each in results.measurements:
        if each.error:
            key = (each.target, each.workload, each.error)
            found[key] = found.get(key, 0) + 1
    for (target, workload, error), count in found.items():
        yield f"{target}, {workload}: {error}" + (f" ({count} times)" if count > 1 else "")


def command_of(results: Results) -> str:
    """The command that does the same again, in the same order."""
    plan = results.plan
    words = ["polyvisor compare", f"--targets {','.join(map(str, plan.targets))}"]
    words += [f"--workloads {','.join(plan.workloads)}", f"--image {plan.image}", f"--runs {plan.runs}"]
    return " ".join([*words, f"--warmups {plan.warmups}", f"--seed {plan.seed}"])


def diff_of(old: Results, new: Results) -> Report:
    """The report on what has changed between two comparisons, target by target; raises InvalidInput where they share none."""
    labels = [target.label for target in old.plan.targets]
    shared = [target.label for target in new.plan.targets if target.label in labels]
    if not shared:
        has = ", ".join(target.label for target in new.plan.targets)
        raise InvalidInput("targets", has, f"are none of the old comparison's ({', '.join(labels)})")
    rows = tuple(_diff_rows(old, new, shared))
    emulated = [t for t in shared if t in {*report_targets(old), *report_targets(new)}]
    return Report(
        title=f"What has changed for {', '.join(shared)}",
        created_at=new.created_at,
        version=new.version,
        image=new.plan.image if new.plan.image == old.plan.image else f"{old.plan.image}, then {new.plan.image}",
        seed=new.plan.seed,
        rows=rows,
        summary=tuple(in_words(f"{label}, new", f"{label}, old", rows) for label in shared),
        emulated=tuple(emulated),
        nested=(),
        notes=tuple(_other_places(old, new, shared)),
        errors=(*errors_of(old), *errors_of(new)),
        environments={f"{label}, new": new.environments.get(label, {}) for label in shared},
        command=command_of(new),
    )


def report_targets(results: Results) -> tuple[str, ...]:
    """The labels of emulated targets."""
    return _those(results, is_emulated)


def _diff_rows(old: Results, new: Results, shared: Sequence[str]) -> Iterator[Row]:
    for workload, metrics in new.metrics.items():
        for metric in metrics:
            for label in shared:
                before, after = (each.values(label, workload, metric.name) for each in (old, new))
                if before and after:
                    cells = (
                        cell_of(f"{label}, old", before, None, (), metric),
                        cell_of(f"{label}, new", after, f"{label}, old", before, metric),
                    )
                    yield Row(workload=workload, metric=metric, cells=cells)


def _other_places(old: Results, new: Results, shared: Sequence[str]) -> Iterator[str]:
    """What is another thing in the new environment than in the old one."""
    for label in shared:
        before, after = old.environments.get(label, {}), new.environments.get(label, {})
        for key in sorted({*before, *after} - {"load"}):
            if before.get(key) != after.get(key):
                yield f"{label}: {key} was {before.get(key, 'unknown')}, and is {after.get(key, 'unknown')}"
