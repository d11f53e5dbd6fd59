"""What the command line costs before it does anything: `polyvisor --version`, beside bare Python and virsh."""

from __future__ import annotations

import shutil
import sys

from bench.harness import Finding, Report, difference, take_turns, timed, typical
from bench.product import Polyvisor

TITLE = "Start-up of the command line"
OURS, PYTHON, PEER = "polyvisor --version", "python -c pass", "virsh --version"
LIMIT_MS = 60


def bench_cli(polyvisor: Polyvisor, rounds: int) -> Report:
    report = Report(TITLE)
    cases = {
        OURS: lambda: {"ends": timed(polyvisor.argv("--version"), env=polyvisor.environment)},
        PYTHON: lambda: {"ends": timed([sys.executable, "-c", "pass"])},
    }
    if shutil.which("virsh"):
        cases[PEER] = lambda: {"ends": timed(["virsh", "--version"])}
    else:
        report.missing.append(f"{PEER}: libvirt is not installed: sh scripts/setup.sh bench")
    report.measures = take_turns(cases, rounds, TITLE)
    report.findings = [
        Finding("polyvisor --version", typical(report.measures, OURS, "ends"), "ms", LIMIT_MS),
        Finding("of this, above Python's own", difference(report.measures, "ends", OURS, PYTHON), "ms"),
    ]
    return report
