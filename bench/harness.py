"""What every benchmark here needs: cases that take turns, medians, ratios within one run, a record of the machine.

A *case* is one way of doing the job (Polyvisor, a peer); each of its runs gives one or more *measures* in milliseconds.
Cases take turns, in another order each round, so that a slow minute of the machine hits all of them and each comes after
each of the others, and comparisons are made between the runs of the same round.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

from polyvisor import __version__

RESULTS = Path(__file__).parent / "results"

Case = Callable[[], Mapping[str, float]]
Measures = dict[str, dict[str, list[float]]]  # case → measure → a value for each round, in ms


@dataclass(frozen=True)
class Finding:
    """One number drawn from the measures; `goal` is what it should be `at_most` or at least, where it has one."""

    text: str
    value: float
    unit: str
    goal: float | None = None
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


@dataclass
class Report:
    """What one benchmark found; `missing` says what could not be measured, and why."""

    title: str
    measures: Measures = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


class Failed(Exception):
    """A measured command failed, or did not do in time what was waited for; a peer that can't be had."""


def take_turns(cases: Mapping[str, Case], rounds: int, title: str) -> Measures:
    """Run every case once a round, `rounds` times, in an order that is drawn for each round, and is the same in every run.

    What one case leaves behind (warm caches, a daemon that tidies up) would otherwise always meet the same other one.
    """
    measures: Measures = {name: {} for name in cases}
    draw = Random(rounds)
    for number in range(rounds):
        for name in draw.sample(list(cases), len(cases)):
            tell(f"{title}: round {number + 1} of {rounds}, {name}")
            for measure, value in cases[name]().items():
                measures[name].setdefault(measure, []).append(value)
    tell("")
    return measures


def ratio(measures: Measures, measure: str, of: str, to: str) -> float:
    """How many times as long `of` takes as `to`: the median over the rounds."""
    return median(a / b for a, b in zip(measures[of][measure], measures[to][measure], strict=True))


def difference(measures: Measures, measure: str, of: str, less: str) -> float:
    """How many milliseconds longer `of` takes than `less`: the median over the rounds."""
    return median(a - b for a, b in zip(measures[of][measure], measures[less][measure], strict=True))


def typical(measures: Measures, case: str, measure: str) -> float:
    """The median of one measure."""
    return median(measures[case][measure])


def timed(argv: Sequence[str], *, timeout_s: float = 60, **options: Any) -> float:
    """Milliseconds that command `argv` takes to end; raises Failed where it ends with an error."""
    start = time.perf_counter()
    call(argv, timeout_s=timeout_s, **options)
    return since(start)


def call(argv: Sequence[str], *, timeout_s: float = 60, **options: Any) -> str:
    """What command `argv` prints; raises Failed where it ends with an error or not at all."""
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            argv,
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            **{"stdin": subprocess.DEVNULL, **options},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{argv[0]}: {error}") from error
    if done.returncode:
        raise Failed(f"{' '.join(argv)[:200]}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def since(start: float) -> float:
    """Milliseconds since `start`, a time of `time.perf_counter`."""
    return (time.perf_counter() - start) * 1000


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float = 60) -> float:
    """Poll every millisecond; the time (`perf_counter`) at which it happened. Raises Failed."""
    deadline = time.perf_counter() + timeout_s
    while not happened():
        if time.perf_counter() > deadline:
            raise Failed(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.001)
    return time.perf_counter()


def tell(text: str) -> None:
    """One line of progress on a terminal, replaced by the next."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# --- the record ---


def environment(**versions: str) -> dict[str, Any]:
    """The machine and the versions that the numbers belong to; nothing that names the machine or its user."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "polyvisor": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": int(_first("/proc/meminfo", "MemTotal").split()[0]) // 1024,
        "load": round(os.getloadavg()[0], 2),
        "root": os.geteuid() == 0,
        **versions,
    }


def _commit() -> str:
    try:
        return call(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]).strip()
    except Failed:
        return "unknown"


def _first(path: str, key: str) -> str:
    line = next((line for line in Path(path).read_text().splitlines() if line.startswith(key)), ":")
    return line.partition(":")[2].strip()


def write_results(reports: Sequence[Report], machine: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write all values and what follows from them as JSON; the file is named after the time."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{machine['at'].replace(':', '')}.json"
    plain = {"environment": machine, "benches": [_plain(report) for report in reports]}
    path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    return path


def _plain(report: Report) -> dict[str, Any]:
    cases = {
        case: {
            measure: summary(values) | {"values": [round(v, 2) for v in values]} for measure, values in found.items()
        }
        for case, found in report.measures.items()
    }
    findings = [asdict(finding) | {"met": finding.met} for finding in report.findings]
    return {"title": report.title, "unit": "ms", "cases": cases, "findings": findings, "missing": report.missing}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of at least two values."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    found = {"median": median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}
    return {key: round(value, 2) for key, value in found.items()} | {"runs": len(values)}


def as_text(report: Report) -> str:
    """A report for people: a table of medians with their middle halves, then what follows from them."""
    rows = [("", "", "median", "middle half", "min", "max", "runs")]
    for case, found in report.measures.items():
        for measure, values in found.items():
            s = summary(values)
            half = f"{s['q1']:.0f} to {s['q3']:.0f}"
            rows.append(
                (case, measure, f"{s['median']:.0f} ms", half, f"{s['min']:.0f}", f"{s['max']:.0f}", str(len(values)))
            )
    lines = ["", report.title, "-" * len(report.title), *columns(rows), ""]
    lines += [f"  {_verdict(finding)}" for finding in report.findings]
    lines += [f"  !! NOT MEASURED: {missing}" for missing in report.missing]
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words as lines, the first two columns flush left, the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _verdict(finding: Finding) -> str:
    value = f"{finding.text}: {finding.value:.1f} {finding.unit}"
    if finding.goal is None:
        return value
    bound = "at most" if finding.at_most else "at least"
    return f"{value} (goal: {bound} {finding.goal:g}): {'met' if finding.met else 'MISSED'}"
