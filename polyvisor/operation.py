"""Progress of a verb that takes a while.

A long verb reports through one callback type. The command line draws a bar from it, an API streams it
as events, and callers that don't care pass nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from polyvisor.values import dataclass


@dataclass(frozen=True)
class Step:
    """Where a long verb stands: `done` of `total`, counted in `unit` ("B" is drawn as bytes)."""

    phase: str
    done: int = 0
    total: int | None = None
    unit: str = ""


Progress = Callable[[Step], None]


def silent(step: Step) -> None:
    """The progress callback of a caller that does not want to know."""
