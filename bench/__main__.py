"""`python -m bench`: run the benchmarks, print tables, write the values as JSON."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.cli import bench_cli
from bench.fork import bench_fork
from bench.harness import RESULTS, Failed, Report, as_text, call, environment, tell, write_results
from bench.lab import bench_lab
from bench.libvirt import Libvirt, libvirt
from bench.listing import bench_listing
from bench.product import Polyvisor
from bench.remote import bench_remote
from bench.start import Stamps, bench_start
from bench.xen import bench_xen
from polyvisor.drivers.qemu.programs import find_binary
from polyvisor.home import Home

BENCHES = ("cli", "start", "ls", "remote", "fork")
LONG = ("lab", "xen")  # these take a quarter of an hour and more: only when asked for


def main() -> int:
    options = _options()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pv-bench-", dir="/tmp")))
        scratch.chmod(0o755)  # QEMU runs as a user of its own
        stamps = Stamps(scratch, find_binary())
        polyvisor = Polyvisor(options.home or scratch / "home", stamps.script)
        tell("preparing Polyvisor's image and libvirt")
        polyvisor.prepare()
        peer = _peer(stack)
        benches: dict[str, Callable[[], Report]] = {
            "cli": lambda: bench_cli(polyvisor, 2 * options.runs),
            "start": lambda: bench_start(polyvisor, stamps, scratch, peer, options.runs),
            "ls": lambda: bench_listing(polyvisor, scratch, peer, options.runs),
            "fork": lambda: bench_fork(polyvisor, peer, options.runs),
            "remote": lambda: bench_remote(polyvisor, scratch, options.runs),
            "lab": lambda: bench_lab(polyvisor, options.runs),
            "xen": lambda: bench_xen(polyvisor, Home(scratch / "xen"), options.runs),
        }
        machine = environment(
            qemu=call([find_binary(), "--version"]).splitlines()[0],
            libvirt=peer if isinstance(peer, str) else peer.version(),
        )
        reports = []
        for name in options.only or BENCHES:
            reports.append(benches[name]())
            print(as_text(reports[-1]), flush=True)
    print(f"\nValues and machine: {write_results(reports, machine, options.results)}")
    missed = [finding for report in reports for finding in report.findings if finding.met is False]
    return 1 if options.strict and (missed or any(report.missing for report in reports)) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", action="append", choices=BENCHES + LONG, help="run this one alone (repeatable)")
    parser.add_argument("--runs", type=int, default=12, help="rounds of each (default: %(default)s; at least 2)")
    parser.add_argument("--home", type=Path, help="a Polyvisor home to use, emptied of VMs (default: a new one)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes (default: bench/results)")
    parser.add_argument("--strict", action="store_true", help="fail where a goal is missed or a peer is absent")
    options = parser.parse_args()
    if options.runs < 2:
        parser.error("--runs: at least 2")
    return options


def _peer(stack: ExitStack) -> Libvirt | str:
    """libvirt, or why it can't be had."""
    try:
        return stack.enter_context(libvirt())
    except Failed as error:
        return str(error)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(f"bench: {error}")
