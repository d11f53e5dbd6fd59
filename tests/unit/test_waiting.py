"""Verbs are begun without an event loop, and go on in one from where they ask for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from polyvisor import waiting
from polyvisor.waiting import event_loop, pause


def has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def interrupt(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_what_needs_no_loop_gets_none() -> None:
    async def work() -> tuple[bool, float]:
        began = time.monotonic()
        await pause(0.05)
        return has_loop(), time.monotonic() - began

    looped, took = waiting.run(work())
    assert not looped
    assert took >= 0.05


def test_asyncio_is_not_even_loaded() -> None:
    code = """
import sys
from polyvisor.waiting import pause, run
async def work():
    await pause(0.001)
run(work())
print("asyncio" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_it_goes_on_in_a_loop_from_where_it_asks_for_one() -> None:
    told = []

    async def work() -> list[bool]:
        seen = [has_loop()]
        await event_loop()
        seen.append(has_loop())
        async with asyncio.timeout(5):
            await asyncio.gather(asyncio.sleep(0), pause(0.001))
        await event_loop()
        return [*seen, has_loop()]

    assert waiting.run(work(), lambda: told.append("ready")) == [False, True, True]
    assert told == ["ready"]


async def test_within_a_loop_all_is_as_ever() -> None:
    began = time.monotonic()
    await asyncio.gather(*(pause(0.1) for _ in range(20)))
    await event_loop()
    assert 0.1 <= time.monotonic() - began < 1


@pytest.mark.parametrize("looped", [False, True])
def test_errors_come_out_as_they_are(looped: bool) -> None:
    async def work() -> None:
        if looped:
            await event_loop()
        raise LookupError("x")

    with pytest.raises(LookupError, match="x"):
        waiting.run(work())


async def cleaning_up(seen: list[str], wait: Coroutine[Any, Any, None]) -> None:
    try:
        await wait
        seen.append("not interrupted")
    except BaseException as error:
        seen.append(type(error).__name__)
        await pause(0.001)
        await event_loop()
        await asyncio.sleep(0)
        seen.append("cleaned up")
        raise


async def long_pauses() -> None:
    for _ in range(500):
        await pause(0.01)


async def busy_then_loop() -> None:
    time.sleep(0.3)
    await event_loop()


async def sleep_in_loop() -> None:
    await event_loop()
    await asyncio.sleep(5)


@pytest.mark.parametrize(
    ("wait", "seen_as"),
    [(long_pauses, "KeyboardInterrupt"), (busy_then_loop, "KeyboardInterrupt"), (sleep_in_loop, "CancelledError")],
)
def test_ctrl_c_comes_where_it_waits_and_lets_it_clean_up(wait: Any, seen_as: str) -> None:
    seen: list[str] = []
    interrupt(0.15)
    with pytest.raises(KeyboardInterrupt):
        waiting.run(cleaning_up(seen, wait()))
    assert seen == [seen_as, "cleaned up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_what_does_not_wait_is_not_torn_apart() -> None:
    async def work() -> str:
        time.sleep(0.3)
        return "whole"

    interrupt(0.1)
    assert waiting.run(work()) == "whole"


def test_the_second_ctrl_c_does_not_wait() -> None:
    async def work() -> None:
        time.sleep(5)

    interrupt(0.1)
    interrupt(0.2)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        waiting.run(work())
    assert time.monotonic() - began < 2


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt(0.05)
        waiting.run(pause(0.2))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
