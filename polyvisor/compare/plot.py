"""One plot for each metric, as SVG: every value a dot, the median a bar, its interval a line. Pure functions, no library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from polyvisor.compare.report import Cell, Row, figure

WIDTH, LEFT, RIGHT = 720, 190, 24
_LINE, _TOP, _AXIS = 30, 8, 26
_COLORS = ("#1f6fb2", "#c4572a", "#2f8f57", "#8a4fa3", "#a37a1c", "#5b6770")


def plot(row: Row, colors: dict[str, str]) -> str:
    """The plot of a metric: a line for each target that has values, on an axis that begins at zero where that helps."""
    cells = [cell for cell in row.cells if cell.values]
    height = _TOP + _LINE * len(cells) + _AXIS
    low, high, ticks = axis([value for cell in cells for value in cell.values])
    scale = (WIDTH - LEFT - RIGHT) / (high - low)

    def x(value: float) -> str:
        return f"{LEFT + (value - low) * scale:.1f}"

    title = f"{row.workload}: {row.metric.name} in {row.metric.unit}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">',
        *(_tick(x(tick), figure(tick), height) for tick in ticks),
    ]
    for i, cell in enumerate(cells):
        parts += _target(cell, _TOP + _LINE * i + _LINE // 2, x, colors.get(cell.name, _COLORS[-1]))
    return "\n".join([*parts, "</svg>"])


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name."""
    return {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(names)}


def axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Where an axis for `values` begins and ends, and its ticks: round numbers, four to nine of them."""
    low, high = min(values), max(values)
    if low > 0 and low < high * 0.6:
        low = 0.0  # lengths can be compared then
    if high == low:
        low, high = low - abs(low or 1) / 10, high + abs(high or 1) / 10
    step = _round_step((high - low) / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, last * step, [tick * step for tick in range(first, last + 1)]


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5, 10, … times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _tick(x: str, text: str, height: int) -> str:
    line = f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{height - _AXIS}" class="grid"/>'
    return f'{line}<text x="{x}" y="{height - 8}" class="tick">{escape(text)}</text>'


def _target(cell: Cell, y: int, at: Callable[[float], str], color: str) -> list[str]:
    s = cell.summary
    assert s is not None  # noqa: S101 - it has values
    parts = [f'<text x="{LEFT - 12}" y="{y + 4}" class="name">{escape(cell.name)}</text>']
    if s.low is not None and s.high is not None:
        ends = f'x1="{at(s.low)}" x2="{at(s.high)}" y1="{y}" y2="{y}"'
        parts.append(f'<line {ends} stroke="{color}" class="interval"/>')
    parts += [
        # Dots that would cover each other stand a little apart.
        f'<circle cx="{at(value)}" cy="{y + (i % 3 - 1) * 4}" r="3" fill="{color}" class="value"/>'
        for i, value in enumerate(cell.values)
    ]
    said = escape(f"{cell.name}: median {figure(s.median)} of {s.runs}")
    bar = f'x1="{at(s.median)}" x2="{at(s.median)}" y1="{y - 11}" y2="{y + 11}"'
    return [*parts, f'<line {bar} stroke="{color}" class="median"><title>{said}</title></line>']
