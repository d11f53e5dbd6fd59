"""Waiting, with an event loop or without one.

To load asyncio takes longer than most commands take for all the rest, and they wait for nothing, or for one thing alone. So a
verb is a coroutine that can be begun without an event loop: where it looks again and again it awaits `pause`, and before it
uses asyncio it awaits `event_loop`. `run` drives it. Within asyncio, where agents and other programs call the same verbs,
`pause` is asyncio's sleep and `event_loop` does nothing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from types import coroutine

TYPE_CHECKING = False  # the real one costs the import of typing
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, TypeVar

    T = TypeVar("T")

_LOOP = None  # what is asked for an event loop with; anything else is a time in seconds


async def pause(seconds: float) -> None:
    """Wait for some milliseconds."""
    if _has_loop():
        import asyncio

        await asyncio.sleep(seconds)
    else:
        await _ask(seconds)


async def event_loop() -> None:
    """See to it that from here on asyncio runs the caller."""
    if not _has_loop():
        await _ask(_LOOP)


def run(work: Coroutine[Any, Any, T], ready: Callable[[], None] = lambda: None) -> T:
    """Run `work` to its end, without an event loop for as long as it does not ask for one; then `ready` is called.

    Ctrl-C raises KeyboardInterrupt in `work` where that waits, and nowhere else: what it does between two waits is done
    wholly, as with asyncio. Whoever presses it again means it.
    """
    with _interrupt() as interrupted:
        try:
            _begin(work, interrupted)
        except StopIteration as done:
            result: T = done.value
            return result
        ready()
        import asyncio

        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until asyncio sees to it
    try:
        return asyncio.run(_rest(work, mask))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _begin(work: Coroutine[Any, Any, T], interrupted: Callable[[], bool]) -> None:
    """Run `work` until it asks for an event loop; raises StopIteration where it comes to its end before."""
    asked, told = work.send(None), False
    while True:
        if asked is not _LOOP:
            time.sleep(asked)
        if interrupted() and not told:
            asked, told = work.throw(KeyboardInterrupt()), True
        elif asked is _LOOP:
            return
        else:
            asked = work.send(None)


async def _rest(work: Coroutine[Any, Any, T], mask: set[int]) -> T:
    """What is left of `work`, which has asked for the event loop that runs this."""
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return await _continued(work)


@coroutine
def _continued(work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    # A coroutine that has begun can't be awaited, but goes on for whoever sends to it.
    return (yield from work.__await__())


@coroutine
def _ask(question: float | None) -> Generator[float | None, None, None]:
    yield question


def _has_loop() -> bool:
    """Whether asyncio runs the caller; without loading it."""
    events = sys.modules.get("asyncio.events")
    return events is not None and events._get_running_loop() is not None


@contextlib.contextmanager
def _interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block the first SIGINT is noted, which the function given tells; another raises KeyboardInterrupt."""
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # it is ignored, say
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
