"""Calls with a key are done once, whoever sends them again and whenever; and nothing is kept for ever."""

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import stat
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polyvisor.errors import InvalidInput, PolyvisorError, WrongState
from polyvisor.home import Home
from polyvisor.remote.calls import KEPT_S, Calls

KEY = "7c5a0b0e-58a6-4f0e-9e0a-0123456789ab"
BEGUN = '{"verb": "run", "pid": 4194304}\n'

Work = Callable[[], Awaitable[dict[str, Any]]]


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(Home(tmp_path))


async def test_a_home_that_such_a_call_makes_is_as_any_other(tmp_path: Path) -> None:
    """Also where the umask is that of an agent: root's VMs, which run as other users, have to get through."""
    before = os.umask(0o077)
    try:
        await Calls(Home(tmp_path / "new")).once(KEY, "run", Counted(), repeatable=True)
    finally:
        os.umask(before)
    Home(tmp_path / "like").prepare()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "like").stat().st_mode
    assert stat.S_IMODE((tmp_path / "new" / "calls").stat().st_mode) == 0o700


class Counted:
    """Work that says how many times it was done."""

    def __init__(self, wait_s: float = 0.0) -> None:
        self.times = 0
        self.wait_s = wait_s

    async def __call__(self) -> dict[str, Any]:
        self.times += 1
        await asyncio.sleep(self.wait_s)
        return {"result": self.times}


def noted(calls: Calls, text: str) -> None:
    """Note under KEY what an agent has left that was killed."""
    calls.directory.mkdir()
    (calls.directory / KEY).write_text(text)


async def test_a_call_sent_again_gets_the_first_outcome(calls: Calls) -> None:
    work = Counted()
    assert await calls.once(KEY, "run", work, repeatable=False) == {"result": 1}
    assert await calls.once(KEY, "run", work, repeatable=False) == {"result": 1}
    assert await Calls(calls.home).once(KEY, "run", work, repeatable=True) == {"result": 1}
    assert work.times == 1


async def test_an_error_is_an_outcome_like_others(calls: Calls) -> None:
    async def work() -> dict[str, Any]:
        return {"error": {"message": "no\nway – at all"}}

    assert await calls.once(KEY, "run", work, repeatable=True) == await work()
    assert await calls.once(KEY, "run", Counted(), repeatable=True) == await work()


async def test_other_keys_are_other_calls(calls: Calls) -> None:
    work = Counted()
    for expected in (1, 2, 3):
        assert await calls.once(str(uuid.uuid4()), "run", work, repeatable=False) == {"result": expected}


async def test_at_the_same_time_it_is_done_once_and_all_get_its_outcome(calls: Calls) -> None:
    work = Counted(0.1)
    sent = (Calls(calls.home).once(KEY, "run", work, repeatable=False) for _ in range(5))
    assert await asyncio.gather(*sent) == [{"result": 1}] * 5
    assert work.times == 1


async def test_it_waits_for_a_call_of_another_process(calls: Calls) -> None:
    noted(calls, "")
    fd = os.open(calls.directory / KEY, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    waiting = asyncio.ensure_future(calls.once(KEY, "run", work := Counted(), repeatable=False))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    os.write(fd, BEGUN.encode() + b'{"result": "theirs"}\n')
    os.close(fd)
    assert await waiting == {"result": "theirs"}
    assert work.times == 0


async def test_the_key_is_noted_for_this_user_alone(calls: Calls) -> None:
    await calls.once(KEY, "run", Counted(), repeatable=False)
    assert calls.directory.stat().st_mode & 0o777 == 0o700
    assert (calls.directory / KEY).stat().st_mode & 0o777 == 0o600


class TestCutShort:
    @pytest.mark.parametrize("torn", ["", '{"result": {"na', "\x00" * 40])
    async def test_what_can_be_repeated_is_repeated(self, calls: Calls, torn: str) -> None:
        noted(calls, BEGUN + torn)
        work = Counted()
        assert await calls.once(KEY, "start", work, repeatable=True) == {"result": 1}
        assert await calls.once(KEY, "start", work, repeatable=True) == {"result": 1}
        assert work.times == 1

    @pytest.mark.parametrize("torn", ["", '{"result": {"na'])
    async def test_of_others_nobody_knows(self, calls: Calls, torn: str) -> None:
        noted(calls, BEGUN + torn)
        work = Counted()
        for _ in range(2):
            with pytest.raises(WrongState, match="'run' was cut short") as caught:
                await calls.once(KEY, "run", work, repeatable=False)
            assert caught.value.hint
        assert work.times == 0

    @pytest.mark.parametrize("torn", ["", '{"verb": "r', BEGUN[:-1]])
    async def test_before_it_was_noted_nothing_was_begun(self, calls: Calls, torn: str) -> None:
        noted(calls, torn)
        assert await calls.once(KEY, "run", Counted(), repeatable=False) == {"result": 1}

    async def test_again_and_again(self, calls: Calls) -> None:
        """What an agent leaves whose number has fewer digits than that of the one before."""
        noted(calls, BEGUN.replace("}", "000}") + '{"result": {"na')

        async def killed() -> dict[str, Any]:
            raise KeyboardInterrupt

        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                await calls.once(KEY, "start", killed, repeatable=True)
        with pytest.raises(WrongState):
            await calls.once(KEY, "run", killed, repeatable=False)
        assert await calls.once(KEY, "start", Counted(), repeatable=True) == {"result": 1}

    async def test_an_outcome_that_is_shorter_than_what_was_torn(self, calls: Calls) -> None:
        noted(calls, BEGUN + "x" * 500)
        for _ in range(2):
            assert await calls.once(KEY, "start", Counted(), repeatable=True) == {"result": 1}


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond some bytes: the system writes what fits, as on a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def test_nothing_is_begun_that_can_not_be_noted(calls: Calls) -> None:
    work = Counted()
    with full_disk(), pytest.raises(PolyvisorError, match="noting the call"):
        await calls.once(KEY, "run", work, repeatable=False)
    assert work.times == 0


async def test_a_fault_in_the_work_is_not_hidden(calls: Calls) -> None:
    async def faulty() -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await calls.once(KEY, "run", faulty, repeatable=False)
    with pytest.raises(WrongState):
        await calls.once(KEY, "run", faulty, repeatable=False)


@pytest.mark.parametrize(
    "key", ["", "None", "../../etc/passwd", "..", f"../{KEY}", f"{KEY}/", f"{KEY}\n", KEY.upper(), KEY[:-1], "x" * 300]
)
async def test_what_is_no_key_touches_nothing(calls: Calls, key: str) -> None:
    work = Counted()
    with pytest.raises(InvalidInput) as caught:
        await calls.once(key, "run", work, repeatable=True)
    assert caught.value.field == "key"
    assert work.times == 0
    assert not calls.directory.exists()


async def test_old_calls_are_forgotten_and_no_others(calls: Calls) -> None:
    calls.sweep()
    await calls.once(KEY, "run", Counted(), repeatable=False)
    old = calls.directory / str(uuid.uuid4())
    for path, age_s in ((old, KEPT_S + 60), (calls.directory / str(uuid.uuid4()), KEPT_S - 60)):
        path.write_text(BEGUN)
        os.utime(path, (time.time() - age_s,) * 2)
    calls.sweep()
    assert not old.exists()
    assert len(list(calls.directory.iterdir())) == 2
    assert json.loads((calls.directory / KEY).read_text().splitlines()[1]) == {"result": 1}


def test_where_none_can_be_kept_there_are_none_to_forget(calls: Calls) -> None:
    calls.directory.write_text("")
    calls.sweep()
