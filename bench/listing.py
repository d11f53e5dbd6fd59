"""`polyvisor ls` beside `virsh list --all`, with 10, 100 and 1,000 VMs that are defined and not running."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from bench.harness import Finding, Report, ratio, take_turns, tell, timed, typical
from bench.libvirt import PREFIX, Libvirt, domain
from bench.product import Polyvisor

TITLE = "Listing VMs"
SIZES = (10, 100, 1000)
LIMIT_AT_10_MS = 120
OURS, PEER = "polyvisor ls", "virsh list --all"


def bench_listing(polyvisor: Polyvisor, scratch: Path, libvirt: Libvirt | str, rounds: int) -> Report:
    """Grow both collections and list them at each size; `libvirt` is the peer, or why there is none."""
    report = Report(TITLE)
    if isinstance(libvirt, str):
        report.missing.append(f"{PEER}: {libvirt}")
    have = 0
    for size in SIZES:
        tell(f"{TITLE}: making {size} VMs")
        names = [f"bench-{number:04}" for number in range(have, size)]
        _create(polyvisor, scratch, names)
        cases = {OURS: lambda: _timed(polyvisor.argv("ls"), env=polyvisor.environment)}
        if isinstance(libvirt, Libvirt):
            _define(libvirt, names)
            cases[PEER] = partial(_timed, libvirt.argv("list", "--all"), **libvirt.options)
        for case, found in take_turns(cases, rounds, f"{TITLE} ({size})").items():
            report.measures.setdefault(case, {})[f"{size} VMs"] = found["ms"]
        have = size
    tell(f"{TITLE}: removing them")
    polyvisor("rm", "--force", "--all", timeout_s=300)
    report.findings = _findings(report)
    return report


def _timed(argv: list[str], **options: object) -> Mapping[str, float]:
    return {"ms": timed(argv, **options)}  # type: ignore[arg-type]


def _create(polyvisor: Polyvisor, scratch: Path, names: list[str]) -> None:
    specs = scratch / "specs.yaml"
    specs.write_text("---\n".join(f"name: {name}\nimage: tiny\n" for name in names))
    polyvisor("apply", "--no-start", "--file", str(specs), timeout_s=300)


def _define(libvirt: Libvirt, names: list[str]) -> None:
    files = []
    for name in names:
        file = libvirt.here / f"{name}.xml"
        none = libvirt.here / "none"
        xml = domain(
            PREFIX + name,
            emulator="/usr/bin/qemu-system-x86_64",
            kernel=none,
            initrd=none,
            cmdline="",
            memory_mib=128,
            kvm=False,
            console=libvirt.here / f"{name}.log",
        )
        file.write_text(xml)
        files.append(file)
    libvirt.batch([f"define {file}" for file in files])


def _findings(report: Report) -> list[Finding]:
    found = report.measures
    first, last = f"{SIZES[0]} VMs", f"{SIZES[-1]} VMs"
    findings = [Finding(f"polyvisor ls with {first}", typical(found, OURS, first), "ms", LIMIT_AT_10_MS)]
    if PEER in found:
        findings += [
            Finding(f"virsh takes as many times as long with {size} VMs", ratio(found, f"{size} VMs", PEER, OURS), "×")
            for size in SIZES[:-1]
        ]
        ahead = ratio(found, last, PEER, OURS)
        findings.append(Finding(f"virsh takes as many times as long with {last}", ahead, "×", 1, at_most=False))
    return findings
