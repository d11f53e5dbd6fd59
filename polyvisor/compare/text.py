"""A report for the terminal, and as Markdown. Pure functions on text; columns are laid out by who prints them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from polyvisor.compare.report import Cell, Report, Row, change_of, figure, interval_of

HEADER = ("WORKLOAD", "METRIC", "TARGET", "MEDIAN", "95 % INTERVAL", "RUNS", "CHANGE", "99 % INTERVAL", "VERDICT")


def table_rows(report: Report) -> list[tuple[str, ...]]:
    """A row of HEADER's columns for each metric on each target; what repeats itself is left out."""
    rows = []
    for row in report.rows:
        for i, cell in enumerate(row.cells):
            rows.append((row.workload if i == 0 else " ", _metric(row) if i == 0 else " ", cell.name, *_figures(cell)))
    return rows


def _metric(row: Row) -> str:
    return f"{row.metric.name} ({row.metric.unit}{', less is better' if row.metric.lower_is_better else ''})"


def _figures(cell: Cell) -> tuple[str, ...]:
    """Median to verdict, of one cell."""
    failed = f"{cell.failures} failed" if cell.failures else ""
    if cell.summary is None:
        return ("", "", "0", "", "", failed or "not measured")
    s = cell.summary
    spread = f"{figure(s.low)} to {figure(s.high)}" if s.low is not None and s.high is not None else ""
    start = (figure(s.median), spread, str(s.runs))
    if cell.comparison is None:
        return (*start, "", "", ", ".join(filter(None, ["baseline" if cell.baseline is None else "", failed])))
    verdict = ", ".join(filter(None, [cell.comparison.verdict.value, failed]))
    return (*start, change_of(cell.comparison), interval_of(cell.comparison), verdict)


def markdown(report: Report) -> str:
    """The report as Markdown (GitHub's tables)."""
    return "\n".join(_markdown(report)) + "\n"


def _markdown(report: Report) -> Iterator[str]:
    yield f"# {_safe(report.title)}\n"
    if report.notice:
        yield f"> # {_safe(report.notice)}\n"
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.created_at))
    yield f"{at}, Polyvisor {_safe(report.version)}, image {_safe(report.image)}, seed {report.seed}.\n"
    yield from (f"- {_safe(line)}" for line in report.summary)
    yield ""
    yield _line(*(word.lower() for word in HEADER))
    yield "|" + "---|" * len(HEADER)
    for row in table_rows(report):
        yield _line(*row)
    yield ""
    for title, lines in (("Notes", report.notes), ("Failures", report.errors)):
        if lines:
            yield f"## {title}\n"
            yield from (f"- {_safe(line)}" for line in lines)
            yield ""
    yield "## Environment\n"
    for name, facts in report.environments.items():
        yield f"### {_safe(name)}\n"
        yield "| | |\n|---|---|"
        yield from (_line(key, value) for key, value in facts.items())
        yield ""
    yield f"## Do it again\n\n```sh\n{report.command}\n```"


def _line(*words: str) -> str:
    return "| " + " | ".join(_safe(word.strip()) for word in words) + " |"


def _safe(text: str) -> str:
    """`text`, which may come from another machine, as Markdown that means just that."""
    plain = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in plain)
