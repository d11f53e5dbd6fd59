"""How long the lab takes: from nothing to both hosts ready, and from their saved state.

"Nothing" is a home without VMs and without images, with Debian's packages in its cache. A host is ready when a command on it
has been answered over SSH, and its hypervisor has been looked at.
"""

from __future__ import annotations

import contextlib
import time

from bench.harness import Failed, Finding, Report, call, since, take_turns, tell, typical
from bench.product import Polyvisor

TITLE = "The lab: a KVM host and a Xen host"
NOTHING, SAVED = "lab up, from nothing", "lab up, from saved state"
NOTHING_LIMIT_S, SAVED_LIMIT_S = 8 * 60, 20
IMAGES = ("lab-kvm", "lab-xen", "tiny")
_TIMEOUT_S = 1800.0


def bench_lab(polyvisor: Polyvisor, rounds: int) -> Report:
    """`lab up` from nothing, twice; then `lab down` and `lab up`, `rounds` times."""
    report = Report(TITLE)
    tell(f"{TITLE}: fetching the packages")
    for image in IMAGES:
        _run(polyvisor, "image", "build", image)
    report.measures = take_turns({NOTHING: lambda: {"ms": _from_nothing(polyvisor)}}, 2, TITLE)
    report.measures |= take_turns({SAVED: lambda: _from_saved(polyvisor)}, rounds, TITLE)
    _run(polyvisor, "lab", "rm")
    report.findings = [
        Finding(NOTHING, typical(report.measures, NOTHING, "ms") / 1000, "s", NOTHING_LIMIT_S),
        Finding(SAVED, typical(report.measures, SAVED, "up") / 1000, "s", SAVED_LIMIT_S),
    ]
    return report


def _from_nothing(polyvisor: Polyvisor) -> float:
    _run(polyvisor, "lab", "rm")
    for image in IMAGES:
        with contextlib.suppress(Failed):  # not there
            _run(polyvisor, "image", "rm", image)
    return _run(polyvisor, "lab", "up")


def _from_saved(polyvisor: Polyvisor) -> dict[str, float]:
    down = _run(polyvisor, "lab", "down")
    up = _run(polyvisor, "lab", "up")
    for kind, proof in (("kvm1", "test -c /dev/kvm"), ("xen1", "xl list")):
        _run(polyvisor, "lab", "ssh", kind, "--", proof)
    return {"down": down, "up": up}


def _run(polyvisor: Polyvisor, *words: str) -> float:
    """Milliseconds that the command takes; raises Failed."""
    start = time.perf_counter()
    call(polyvisor.argv(*words), timeout_s=_TIMEOUT_S, env=polyvisor.environment)
    return since(start)
