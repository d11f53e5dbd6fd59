"""Plain tables for terminals and pipes: aligned columns, no frames, nothing that `awk` would stumble over."""

from __future__ import annotations

import time
from collections.abc import Sequence

from polyvisor.errors import one_line


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`rows` under `header`, columns aligned; an empty cell is shown as -."""
    cells = [list(header), *([one_line(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Labels and values, one a line."""
    lines = [(one_line(label), one_line(value)) for label, value in rows]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label.ljust(width)}  {value}" for label, value in lines)


def age(since: float | None, now: float | None = None) -> str:
    """How long ago, in the largest fitting unit: ``3m``; empty for None."""
    if since is None:
        return ""
    seconds = max(0, int((time.time() if now is None else now) - since))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def memory(mib: int) -> str:
    """MiB as people write them: ``128M``, ``2G``."""
    return f"{mib // 1024}G" if mib >= 1024 and mib % 1024 == 0 else f"{mib}M"
