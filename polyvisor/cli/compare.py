"""`compare`: measure hypervisors against each other, draw reports, and tell what has changed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.cli.context import Context
from polyvisor.cli.spec_flags import whole
from polyvisor.cli.table import table
from polyvisor.errors import AlreadyExists, InvalidInput, PolyvisorError

if TYPE_CHECKING:
    from polyvisor.compare.place import Place
    from polyvisor.compare.plan import Plan
    from polyvisor.compare.report import Report
    from polyvisor.compare.results import Results

QUICK_RUNS, RUNS = 6, 10
QUICK_MINUTES, MINUTES = 10, 60


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--targets",
        metavar="TARGETS",
        help="kvm, xen-pv, xen-pvh, xen-hvm, tcg, native, by commas; also LABEL=KIND:SETTING=VALUE@HOST "
        "(default: all that works)",
    )
    parser.add_argument(
        "--hosts", metavar="HOSTS", help="hosts to measure on, by commas (default: this one, and those of the lab)"
    )
    parser.add_argument("--workloads", metavar="NAMES", help="what to measure, by commas (default: everything)")
    parser.add_argument(
        "--features", action="store_true", help="find out what each target can do by doing it, instead of measuring"
    )
    parser.add_argument("--list", action="store_true", help="list the workloads and what they measure, and end")
    parser.add_argument(
        "--quick", action="store_true", help="a few cheap workloads on image tiny, within ten minutes by default"
    )
    about = f"how often everything is measured (default: {RUNS}; {QUICK_RUNS} with --quick)"
    parser.add_argument("--runs", type=whole("runs"), metavar="N", help=about)
    parser.add_argument(
        "--warmups", type=whole("warmups"), default=1, metavar="N", help="rounds before, which don't count (default: 1)"
    )
    about = f"begin no run that would end later (default: {MINUTES}; {QUICK_MINUTES} with --quick)"
    parser.add_argument("--limit", type=whole("limit"), metavar="MINUTES", help=about)
    parser.add_argument("--image", help="image of the guests (default: bench; tiny with --quick)")
    parser.add_argument("--seed", type=whole("seed"), default=1, metavar="N", help="of the order (default: 1)")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where raw data is kept (default: compare-TIME.json here)"
    )
    parser.add_argument("--resume", metavar="FILE", help="go on with a comparison that was cut off, from its raw data")
    _report_flags(parser)
    parser.set_defaults(action=_compare)
    verbs = parser.add_subparsers(metavar="VERB")
    sub = verbs.add_parser("report", help="draw the report of raw data again; of several files, of all their runs")
    sub.add_argument("files", nargs="+", metavar="FILE", help="raw data of a comparison")
    _report_flags(sub)
    sub.set_defaults(action=_report)
    sub = verbs.add_parser("diff", help="tell what has changed between two comparisons")
    sub.add_argument("old", metavar="OLD", help="raw data of a comparison")
    sub.add_argument("new", metavar="NEW", help="raw data of a later one")
    _file_flags(sub)
    sub.set_defaults(action=_diff)


def _report_flags(parser: argparse.ArgumentParser) -> None:
    # Flags of the verb below would replace those given before it by their defaults.
    parser.add_argument(
        "--baseline",
        metavar="TARGET",
        default=argparse.SUPPRESS,
        help="what others are compared with (default: native, else the first)",
    )
    _file_flags(parser)


def _file_flags(parser: argparse.ArgumentParser) -> None:
    about = "write the report as one HTML page too, with plots"
    parser.add_argument("--html", metavar="FILE", default=argparse.SUPPRESS, help=about)
    parser.add_argument(
        "--markdown", metavar="FILE", default=argparse.SUPPRESS, help="write the report as Markdown too"
    )


def _compare(context: Context, options: argparse.Namespace) -> int:
    if options.list:
        return _list(context)
    if options.features:
        return _features(context, options)
    from polyvisor.compare import statistics

    statistics.require()
    results, file = _begun(options)
    try:
        results = context.run(_measure(context, options, results, file))
    except BaseException:
        _keep(context, file)
        raise
    context.note(f"raw data: {file}")
    return _show(context, options, _drawn(results, options))


def _keep(context: Context, file: Path) -> None:
    """Say where what was measured is; a file without anything goes."""
    from polyvisor.compare.results import read

    if not file.exists():
        return
    if read(file).measurements:
        context.note(f"what was measured is in {file}; go on: polyvisor compare --resume {file}")
    else:
        file.unlink()


def _begun(options: argparse.Namespace) -> tuple[Results | None, Path]:
    """The comparison to go on with, if any, and the file for its raw data; raises AlreadyExists, NotFound, InvalidInput."""
    from polyvisor.compare import results

    if options.resume:
        for name in ("targets", "hosts", "workloads", "runs", "limit", "image", "output"):
            if getattr(options, name) is not None:
                raise InvalidInput(name, getattr(options, name), "stands beside --resume", hint="the file says it all")
        return results.read(Path(options.resume)), Path(options.resume)
    file = Path(options.output or time.strftime("compare-%Y%m%dT%H%M%S.json"))
    if file.exists():
        raise AlreadyExists(f"there is a file {file} already", hint=f"another name, or: --resume {file}")
    return None, file


async def _measure(context: Context, options: argparse.Namespace, results: Results | None, file: Path) -> Results:
    from polyvisor.compare import session
    from polyvisor.compare.runner import Runner

    places = await _places(context, options, results)
    try:
        if results is None:
            plan = _plan(options, list(places.values()))
            if len(plan.targets) == 1 and not options.targets:
                context.note(f"{plan.targets[0].label} is all that works here; for KVM and Xen: polyvisor lab up")
            results = await session.new_results(plan, places)
        else:
            session.check_same_machines(results, places)
            results = session.resumed(results)
        workloads = session.workloads_of(results)
        machines = session.machines_of(results, places)
        await session.have_image(results.plan.image, results.plan.targets, places, context.progress)
        return await Runner(results, file, machines, workloads, context.progress).run()
    finally:
        for place in places.values():
            await place.api.close()


async def _places(context: Context, options: argparse.Namespace, results: Results | None) -> dict[str | None, Place]:
    """The hosts that the comparison is about, by name, in order of preference.

    Raises what is wrong with one that was asked for; one of the lab that does not answer is left out.
    """
    from polyvisor.compare.place import Place, hosts_named, seeks_hosts

    if results is not None:
        wanted: list[str | None] = list(dict.fromkeys(target.host for target in results.plan.targets))
        optional: list[str] = []
    else:
        texts = _words(options.targets)
        named = hosts_named(texts, _words(options.hosts))
        wanted = [*([] if options.hosts else [None]), *named]
        alone = options.hosts or context.is_elsewhere or not seeks_hosts(texts)
        optional = [] if alone else [name for name in _lab_hosts() if name not in named]
    places: dict[str | None, Place] = {}
    for name in [*wanted, *optional]:
        from polyvisor.cli.remote import named_host

        try:
            api = context.host if name is None else named_host(name)
            places[name] = Place(name=name, api=api, status=await api.status())
        except PolyvisorError as error:
            if name not in optional:
                raise
            context.note(f"{name} is left out: {error.message}")
    return places


def _lab_hosts() -> list[str]:
    from polyvisor.cli.remote import known_hosts

    return [name for name in known_hosts().names() if name.startswith("lab-")]


def _plan(options: argparse.Namespace, places: Sequence[Place]) -> Plan:
    from polyvisor.compare.place import choose_targets
    from polyvisor.compare.plan import Plan
    from polyvisor.compare.workload import choose_workloads

    targets = choose_targets(_words(options.targets), places, everywhere=bool(options.hosts))
    workloads = choose_workloads(_words(options.workloads), quick=options.quick)
    minutes = options.limit if options.limit is not None else QUICK_MINUTES if options.quick else MINUTES
    if minutes < 1:
        raise InvalidInput("limit", minutes, "is no time", hint="write minutes, at least 1")
    if not 0 <= options.warmups <= 100:
        raise InvalidInput("warmups", options.warmups, "is out of range", hint="use 0 to 100")
    return Plan(
        seed=options.seed,
        runs=options.runs if options.runs is not None else QUICK_RUNS if options.quick else RUNS,
        warmups=options.warmups,
        image=options.image or ("tiny" if options.quick else "bench"),
        targets=tuple(targets),
        workloads=tuple(workload.name for workload in workloads),
        limit_s=60.0 * minutes,
    )


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",")] if text else []


def _list(context: Context) -> int:
    from polyvisor.compare.workload import all_workloads

    every = list(all_workloads().values())
    if context.json:
        context.print_json([{"name": w.name, "about": w.about, "quick": w.quick, "metrics": w.metrics} for w in every])
        return 0
    rows = [(w.name, "yes" if w.quick else "", ", ".join(m.name for m in w.metrics), w.about) for w in every]
    print(table(("WORKLOAD", "QUICK", "METRICS", "WHAT IT DOES"), rows))
    return 0


def _features(context: Context, options: argparse.Namespace) -> int:
    """Probe targets, one after the other; Ctrl-C ends it."""
    from polyvisor.compare.features import Finding, Prober, probe
    from polyvisor.compare.place import choose_targets
    from polyvisor.compare.session import have_image
    from polyvisor.compare.target import Kind

    for name in ("workloads", "runs", "limit", "output", "resume"):
        if getattr(options, name) is not None:
            raise InvalidInput(name, getattr(options, name), "stands beside --features", hint="leave one of them out")
    image = options.image or "tiny"

    async def work() -> list[Finding]:
        places = await _places(context, options, None)
        try:
            targets = choose_targets(_words(options.targets), list(places.values()), everywhere=bool(options.hosts))
            if any(target.kind is Kind.NATIVE for target in targets):
                raise InvalidInput("targets", "native", "has no guest to be probed", hint="leave it out")
            await have_image(image, targets, places, context.progress)
            found = []
            for target in targets:
                place = places[target.host]
                prober = Prober(target, place.api, place.shell, f"probe-{target.label}", image)
                found += await probe(prober, context.progress)
            return found
        finally:
            for place in places.values():
                await place.api.close()

    findings = context.run(work())
    if context.json:
        context.print_json(findings)
    else:
        rows = [(f.feature, f.target, f.outcome.value, f.detail) for f in findings]
        print(table(("FEATURE", "TARGET", "RESULT", "WHAT WAS SEEN"), sorted(rows, key=lambda row: row[0])))
    return 0


def _report(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.compare import statistics
    from polyvisor.compare.results import merged, read

    statistics.require()
    return _show(context, options, _drawn(merged([read(Path(name)) for name in options.files]), options))


def _diff(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.compare import statistics
    from polyvisor.compare.report import diff_of
    from polyvisor.compare.results import read

    statistics.require()
    return _show(context, options, diff_of(read(Path(options.old)), read(Path(options.new))))


def _drawn(results: Results, options: argparse.Namespace) -> Report:
    from polyvisor.compare.report import report_of

    return report_of(results, getattr(options, "baseline", None))


def _show(context: Context, options: argparse.Namespace, report: Report) -> int:
    from polyvisor.compare.html import page
    from polyvisor.compare.text import markdown
    from polyvisor.files import storage_errors, write_atomic

    for name, text in _forms(options, report, {"html": page, "markdown": markdown}).items():
        with storage_errors(f"writing {name}"):
            write_atomic(Path(name), text, mode=0o644)
    if context.json:
        context.print_json(report)
    else:
        _print(context, report)
    return 0


def _forms(options: argparse.Namespace, report: Report, kinds: Mapping[str, object]) -> dict[str, str]:
    """File name → text of each form of the report that is asked for."""
    return {name: draw(report) for kind, draw in kinds.items() if (name := getattr(options, kind, None))}  # type: ignore[operator]


def _print(context: Context, report: Report) -> None:
    from polyvisor.compare.text import HEADER, table_rows

    if report.notice:
        frame = "=" * min(len(report.notice), 100)
        print(f"{frame}\n{context.line(report.notice)}\n{frame}")
    if report.rows:
        print(table(HEADER, table_rows(report)))
    for line in report.summary:
        print(context.line(line))
    for line in (*report.notes, *(f"failed: {error}" for error in report.errors)):
        print(context.line(line))
