"""A report as one HTML page that needs nothing else: no script, no network, plots as SVG in it. Pure functions.

Whatever comes from elsewhere (names, environments, errors) is escaped; should something have been forgotten, a content security
policy forbids the page to load or run anything.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from html import escape

from polyvisor.compare.plot import colors_of, plot
from polyvisor.compare.report import Cell, Report, Row, change_of, figure, interval_of
from polyvisor.compare.statistics import Verdict

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #667; --line: #d5d9e0; --soft: #f4f6f9;
        --good: #1a7f4b; --bad: #b3372c; --loud: #8a1f11; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --paper: #15181d; --faint: #9aa3b2; --line: #333a45; --soft: #1e232b;
          --good: #5ac78f; --bad: #f0857a; --loud: #c2402f; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 0 auto;
       padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: .2rem; }
.notice { background: var(--loud); color: #fff; font-size: 1.5rem; font-weight: 700; line-height: 1.25; padding: 1rem 1.25rem;
          border-radius: .4rem; }
.faint, .about { color: var(--faint); } .about { margin: 0 0 .3rem; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; margin: .4rem 0 1rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; } pre { background: var(--soft); padding: .8rem; overflow-x: auto; border-radius: .3rem; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .tick { text-anchor: middle; fill: var(--faint); } svg .name { text-anchor: end; }
svg .grid { stroke: var(--line); } svg .interval { stroke-width: 3; opacity: .55; } svg .median { stroke-width: 3; }
svg .value { opacity: .5; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_HOW = """Every round visits every target once, in a new order, with a new guest. Dots are single runs, thin bars medians, lines
their 95&nbsp;% bootstrap intervals. A difference is claimed where the 99&nbsp;% bootstrap interval of the change leaves zero
out and a rank test agrees at 1&nbsp;%; everything else is “no difference shown”, which does not mean that there is none."""


def page(report: Report) -> str:
    """The whole page."""
    return "\n".join(_page(report)) + "\n"


def _page(report: Report) -> Iterator[str]:
    title = escape(report.title)
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    if report.notice:
        yield f'<p class="notice" role="alert">{escape(report.notice)}</p>'
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.created_at))
    made = f"{at}, Polyvisor {report.version}, image {report.image}, seed {report.seed}"
    yield f'<p class="faint">{escape(made)}</p>'
    yield "<h2>Summary</h2>"
    yield _list(report.summary or ("There is one target alone: nothing to compare it with.",))
    if report.nested:
        told = f"On hosts that are virtual machines themselves: {', '.join(report.nested)}."
        yield f"<p>{escape(told)}</p>"
    yield f'<p class="faint">{_HOW}</p>'
    yield from _metrics(report.rows)
    for heading, lines in (("Notes", report.notes), ("What failed", report.errors)):
        if lines:
            yield f"<h2>{heading}</h2>\n{_list(lines)}"
    yield "<h2>Environment</h2>"
    yield _environments(report.environments)
    yield f"<h2>Do it again</h2>\n<pre>{escape(report.command)}</pre>"
    yield "</body>\n</html>"


def _metrics(rows: Sequence[Row]) -> Iterator[str]:
    colors = colors_of(list(dict.fromkeys(cell.name for row in rows for cell in row.cells)))
    workload = None
    for row in rows:
        if row.workload != workload:
            workload = row.workload
            yield f"<h2>{escape(workload)}</h2>"
        best = "less is better" if row.metric.lower_is_better else "more is better"
        yield f"<h3>{escape(row.metric.name)} ({escape(row.metric.unit)}, {best})</h3>"
        yield f'<p class="about">{escape(row.metric.about)}</p>'
        if any(cell.values for cell in row.cells):
            yield plot(row, colors)
        yield _table(row)


def _table(row: Row) -> str:
    heads = ("target", "median", "95 % interval", "runs", "change", "99 % interval", "verdict")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="wide"><table><tr>{head}</tr>\n' + "\n".join(map(_row, row.cells)) + "\n</table></div>"


def _row(cell: Cell) -> str:
    s, c = cell.summary, cell.comparison
    numbers = ["", "", "0"]
    if s is not None:
        spread = f"{figure(s.low)} to {figure(s.high)}" if s.low is not None and s.high is not None else ""
        numbers = [figure(s.median), spread, str(s.runs)]
    numbers += [change_of(c), interval_of(c)] if c else ["", ""]
    cells = "".join(f'<td class="number">{escape(number)}</td>' for number in numbers)
    return f"<tr><td>{escape(cell.name)}</td>{cells}{_verdict(cell)}</tr>"


def _verdict(cell: Cell) -> str:
    failed = f"{cell.failures} failed" if cell.failures else ""
    if cell.comparison is None:
        said = "not measured" if cell.summary is None else "baseline" if cell.baseline is None else ""
        return f"<td>{escape(', '.join(filter(None, [said, failed])))}</td>"
    verdict = cell.comparison.verdict
    kind = {Verdict.BETTER: ' class="better"', Verdict.WORSE: ' class="worse"'}.get(verdict, "")
    return f"<td{kind}>{escape(', '.join(filter(None, [verdict.value, failed])))}</td>"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _environments(found: dict[str, dict[str, str]]) -> str:
    """A table with a column for each environment that is another one; targets that share one share the column."""
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, facts in found.items():
        alike.setdefault(tuple(facts.items()), []).append(name)
    columns = [(", ".join(names), dict(facts)) for facts, names in alike.items()]
    keys = list(dict.fromkeys(key for _, facts in columns for key in facts))
    head = "".join(f"<th>{escape(names)}</th>" for names, _ in columns)
    rows = [
        f"<tr><th>{escape(key)}</th>"
        + "".join(f"<td>{escape(facts.get(key, ''))}</td>" for _, facts in columns)
        + "</tr>"
        for key in keys
    ]
    return f'<div class="wide"><table><tr><th></th>{head}</tr>\n' + "\n".join(rows) + "\n</table></div>"
