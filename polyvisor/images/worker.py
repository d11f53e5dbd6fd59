"""Blocking work (hashing, unpacking, downloading) in a thread, for the asynchronous code of images.

The thread belongs to this call alone and is a daemon: a caller that is cancelled (Ctrl-C) does not wait for a network
that hangs. The work learns of it at its next report of progress, which raises `Stopped`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from polyvisor.operation import Progress, Step

T = TypeVar("T")
_GRACE_S = 1.0


class Stopped(BaseException):
    """Raised inside the work when nobody waits for it any more."""


async def in_thread(work: Callable[[Progress], T], progress: Progress) -> T:
    """Run `work` in a thread and return what it returns; its progress is reported in the event loop.

    A caller that is cancelled waits a second at most for the work to notice.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    stopped = threading.Event()

    def report(step: Step) -> None:
        if stopped.is_set():
            raise Stopped
        loop.call_soon_threadsafe(progress, step)

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work(report)
        except Stopped:
            pass  # nobody looks at the result
        except BaseException as error:  # handed to the caller
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=body, daemon=True).start()
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.wait([done], timeout=_GRACE_S)
        if done.done() and not done.cancelled():
            done.exception()  # looked at, so that nobody is told of it
        raise
