"""Whether `polyvisor compare` can be believed: a target against itself, and one whose slowness is known.

    uv run python -m bench.compare [--metrics N] [--runs N]

*A against A*: the same target twice, measured as users do, again and again, until there are N verdicts (by default 100) on real
values; "no difference shown" has to come out in 95 of 100. *Slowed*: a target with a CPU limit of 50 %, which has to be found,
and sized within 10 %: 45 to 55 % of the loops of the one without. Raw data stays in bench/results/compare. A busy machine is
no place for this: what runs beside can be a real difference.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.harness import RESULTS, Failed
from bench.product import Polyvisor
from polyvisor.compare.cap import cap_refusal
from polyvisor.compare.report import Cell, report_of
from polyvisor.compare.results import Results, read
from polyvisor.compare.statistics import Verdict

DIRECTORY = RESULTS / "compare"
# Cheap, and of all kinds: timed from outside, counted by the guest, and memory.
WORKLOADS = "boot,create,memory,loop,syscalls,spawn,hash,pipe"
GOAL = 0.95
SIZE, TOLERANCE = 0.5, 0.1
_HOURS_S = 4 * 3600.0


def comparison(polyvisor: Polyvisor, file: Path, *words: str) -> Results:
    """Run `polyvisor compare` and return its raw data, which stays in `file`; raises Failed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    polyvisor("compare", *words, "--image", "tiny", "--limit", "600", "-o", str(file), timeout_s=_HOURS_S)
    return read(file)


def compared(results: Results) -> Iterator[tuple[str, Cell]]:
    """Each metric that has a verdict, by name."""
    for row in report_of(results).rows:
        for cell in row.cells:
            if cell.comparison is not None:
                yield f"{row.workload} {row.metric.name}", cell


def calibrate(polyvisor: Polyvisor, wanted: int, runs: int, directory: Path) -> bool:
    """A against A, until there are `wanted` verdicts; returns whether enough of them say that there is no difference."""
    verdicts: list[Verdict] = []
    turn = 0
    while len(verdicts) < wanted:
        turn += 1
        words = ["--targets", "a=tcg,b=tcg", "--workloads", WORKLOADS, "--runs", str(runs), "--seed", str(turn)]
        found = comparison(polyvisor, directory / f"a-a-{turn}.json", *words)
        for name, cell in compared(found):
            assert cell.comparison is not None
            verdicts.append(cell.comparison.verdict)
            if cell.comparison.verdict is not Verdict.NONE:
                print(f"  {name}: {cell.comparison.verdict} ({cell.comparison.change:+.1%}, p {cell.comparison.p:.4f})")
        if Verdict.TOO_FEW in verdicts:
            raise Failed(f"{runs} runs are too few for a verdict: use --runs 5 or more")
    right = verdicts.count(Verdict.NONE)
    met = right >= GOAL * len(verdicts)
    outcome = "met" if met else "MISSED"
    print(f"A against A: no difference shown in {right} of {len(verdicts)} (goal: {GOAL:.0%}): {outcome}")
    return met


def find_slowed(polyvisor: Polyvisor, runs: int, directory: Path) -> bool:
    """A target with half a CPU against one with a whole one; returns whether it is found, and sized."""
    if reason := cap_refusal():
        print(f"!! NOT MEASURED: a slowed target: {reason}")
        return False
    words = ["--targets", "full=tcg,half=tcg:cpu_limit=50", "--workloads", "loop,hash", "--runs", str(runs)]
    found = dict(compared(comparison(polyvisor, directory / "slowed.json", *words)))
    met = True
    for name, cell in found.items():
        assert cell.comparison is not None
        left = 1 + cell.comparison.change
        right = cell.comparison.verdict is Verdict.WORSE and abs(left - SIZE) <= TOLERANCE * SIZE
        outcome = "met" if right else "MISSED"
        goal = f"goal: {SIZE:.0%} within {TOLERANCE:.0%}"
        print(f"slowed, {name}: {cell.comparison.verdict}, {left:.1%} of the speed ({goal}): {outcome}")
        met = met and right
    return met


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--metrics", type=int, default=100, help="verdicts of A against A (default: 100)")
    parser.add_argument("--runs", type=int, default=6, help="runs of each comparison (default: 6)")
    options = parser.parse_args()
    directory = DIRECTORY / time.strftime("%Y%m%dT%H%M%S")
    with tempfile.TemporaryDirectory(prefix="polyvisor-bench-") as scratch:
        Path(scratch).chmod(0o711)
        polyvisor = Polyvisor(Path(scratch) / "home")
        polyvisor.prepare()
        try:
            results = [
                find_slowed(polyvisor, options.runs, directory),
                calibrate(polyvisor, options.metrics, options.runs, directory),
            ]
        except Failed as error:
            print(f"!! {error}", file=sys.stderr)
            return 1
    print(f"raw data: {directory}")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
