"""The table of contract tests × targets: printed at the end of a run, and written to reports/contract.md.

Targets are tested in several runs of pytest (`make test` has two), so results are kept in reports/contract.json in between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

PROPERTY = "contract"
REPORTS = Path(__file__).parents[1] / "reports"
TARGETS = ("QEMU here", "QEMU by SSH", "QEMU/KVM", "Xen PV", "Xen PVH", "Xen HVM")
_MARKS = {"passed": "ok", "failed": "FAILED", "error": "FAILED"}
# What may leave a test out: what a driver declares in its Capabilities (`needs` in contract/guest.py), what is only run when
# all is asked for, and a lab that this machine can't have.
_DECLARED = re.compile(
    r"(?:qemu|xen): [a-z-]+: .|.*POLYVISOR_TEST_ALL=1|(?:there is no lab|the lab is left out): .", re.DOTALL
)
Results = dict[str, dict[str, str]]


def mark(item: pytest.Item) -> None:
    """Note with a contract's test which targets it tests, for its report."""
    if isinstance(item, pytest.Function) and item.function.__module__.startswith("tests.contract."):
        item.user_properties.append((PROPERTY, [item.originalname, _targets(item)]))


def _targets(item: pytest.Function) -> list[str]:
    params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    if "/lab/" not in item.nodeid:
        return ["QEMU by SSH" if params.get("api") == "by-ssh" else "QEMU here"]
    if "test_kvm" in item.nodeid:
        return ["QEMU/KVM"]
    # Whatever makes no VM is the same in each mode.
    return [f"Xen {params['spec'].value.upper()}"] if "spec" in params else ["Xen PV", "Xen PVH", "Xen HVM"]


def results(reports: Iterable[pytest.TestReport]) -> Results:
    """By test and target: `ok`, `FAILED`, or why it was skipped, which has to be a reason that was declared.

    A test of several parameters is as good as its worst.
    """
    found: Results = {}
    for report in reports:
        for name, value in report.user_properties:
            if name != PROPERTY or (report.when != "call" and report.outcome == "passed"):
                continue
            test, targets = cast("tuple[str, list[str]]", value)
            outcome = _MARKS.get(report.outcome) or _reason(report)
            for target in targets:
                before = found.setdefault(test, {}).get(target)
                found[test][target] = "FAILED" if "FAILED" in (before, outcome) else outcome
    return found


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped; FAILED where nothing that was declared says so."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = text.removeprefix("Skipped: ")
    return reason if _DECLARED.match(reason) else "FAILED"


def merged(before: Results, now: Results) -> Results:
    return {
        test: {**before.get(test, {}), **now.get(test, {})} for test in [*before, *(t for t in now if t not in before)]
    }


def table(found: Results) -> str:
    """Markdown; reasons of skips are notes below."""
    reasons = list(dict.fromkeys(v for row in found.values() for v in row.values() if v not in _MARKS.values()))
    lines = [f"| test | {' | '.join(TARGETS)} |", f"|{' --- |' * (len(TARGETS) + 1)}"]
    for test, row in found.items():
        cells = [_cell(row.get(target, "not run"), reasons) for target in TARGETS]
        lines.append(f"| {test.removeprefix('test_').replace('_', ' ')} | {' | '.join(cells)} |")
    notes = [f"[{i}] left out: {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes, ""])


def _cell(outcome: str, reasons: list[str]) -> str:
    return f"[{reasons.index(outcome) + 1}]" if outcome in reasons else outcome


def summary(found: Results) -> list[str]:
    """A line for each target that was tested."""
    return [
        line for target in TARGETS if (line := _line(target, [row[target] for row in found.values() if target in row]))
    ]


def _line(target: str, outcomes: list[str]) -> str:
    if not outcomes:
        return ""
    ok, failed = outcomes.count("ok"), outcomes.count("FAILED")
    return f"{target}: {ok} ok, {failed} failed, {len(outcomes) - ok - failed} left out with a reason"


def write(now: Results, directory: Path = REPORTS) -> Path:
    """Write the table, with what earlier runs found of other targets; returns its path."""
    directory.mkdir(exist_ok=True)
    kept = directory / "contract.json"
    before: Mapping[str, dict[str, str]] = json.loads(kept.read_text()) if kept.exists() else {}
    every = merged(dict(before), now)
    kept.write_text(json.dumps(every))
    path = directory / "contract.md"
    path.write_text(f"# The contract of HostApi: tests and targets\n\n{table(every)}")
    return path
