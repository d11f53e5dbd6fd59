"""Progress of long verbs: a bar on a terminal, a line per phase elsewhere, nothing for what is done within a second."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from polyvisor.errors import one_line
from polyvisor.operation import Step

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE_S = 1.0
_REDRAW_S = 0.1


class Display:
    """A progress callback that draws on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._began = time.monotonic()
        self._drawn = 0.0
        self._phase: str | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if self._quiet or now - self._began < PATIENCE_S:
            return
        if not sys.stderr.isatty():
            self._line(step)
        elif step.phase != self._phase or now - self._drawn > _REDRAW_S:
            self._drawn = now
            self._draw(step)
        self._phase = step.phase

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._phase = None
        self._began = time.monotonic()

    def _line(self, step: Step) -> None:
        if step.phase != self._phase:
            print(f"{one_line(step.phase)} …", file=sys.stderr, flush=True)

    def _draw(self, step: Step) -> None:
        bar = self._bar or self._start()
        if step.phase != self._phase or self._task is None:
            if self._task is not None:
                bar.remove_task(self._task)
            self._task = bar.add_task(one_line(step.phase), total=step.total, amount=_amount(step))
        bar.update(self._task, completed=step.done, total=step.total, amount=_amount(step))

    def _start(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        return self._bar


def _amount(step: Step) -> str:
    """How far, in the unit of the step: ``12.0/400.5 MiB``."""
    if step.total is None:
        return "" if not step.done else _of(step.done, step.unit)
    return f"{_of(step.done, step.unit)} of {_of(step.total, step.unit)}"


def _of(number: int, unit: str) -> str:
    return human_size(number) if unit == "B" else one_line(f"{number} {unit}".strip())


def human_size(size: float) -> str:
    """Bytes as people read them: ``1.4 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < (1024 if unit == "B" else 1023.95):
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
