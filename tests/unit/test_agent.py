"""The agent: what it answers to calls, good and bad, and that none of them ends it."""

import asyncio
import io
import json
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor import __version__
from polyvisor.errors import InvalidInput, NotFound, PolyvisorError, WrongState
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.images.image import Image
from polyvisor.operation import Progress, Step, silent
from polyvisor.remote.agent import Agent
from polyvisor.remote.calls import Calls
from polyvisor.remote.uploads import Uploads
from polyvisor.remote.wire import FAILED, INVALID_REQUEST, NO_METHOD, PARSE_ERROR, raised
from polyvisor.status import HostStatus
from tests.unit.specs import QUICK
from tests.unit.test_wire import anything


class Odd(Host):
    """This machine, where some verbs do what is hard to provoke."""

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self.started: list[str] = []
        self.ended: list[str] = []
        self.imported: list[bytes] = []
        self.go_on = asyncio.Event()

    async def status(self) -> HostStatus:
        raise ZeroDivisionError("a fault")

    async def vms(self) -> Any:
        return await self._wait("vms")

    async def start(self, name: str, progress: Progress = silent, *, fresh: bool = False) -> Any:
        progress(Step("starting", 1, 2))
        return await self._wait(name)

    async def _wait(self, name: str) -> Any:
        self.started.append(name)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.ended.append(f"{name} was cancelled")
            raise
        self.ended.append(name)
        return []

    async def image_import(
        self, source: str, *, name: str | None = None, progress: Progress = silent, **options: Any
    ) -> Image:
        if "://" not in source:
            self.imported.append(Path(source).read_bytes())
        raise NotFound(f"asked for {source}")


class Side:
    """The other side of an agent."""

    def __init__(self, home: Home) -> None:
        self.host = Odd(home)
        self.output = io.BytesIO()
        self.uploads = Uploads(home)
        self.agent = Agent(self.host, Calls(home), self.uploads, self.output)
        self.reader = asyncio.StreamReader(limit=1 << 20)
        self.serving = asyncio.ensure_future(self.agent.serve(self.reader))

    def send(self, *messages: object) -> None:
        for message in messages:
            line = message if isinstance(message, bytes) else json.dumps(message).encode()
            self.reader.feed_data(line + b"\n")

    def call(self, number: object, method: str, key: str | None = None, /, **arguments: object) -> None:
        self.send(
            {
                "jsonrpc": "2.0",
                "id": number,
                "method": method,
                "params": {"arguments": arguments, "key": key or str(uuid.uuid4())},
            }
        )

    def messages(self) -> list[dict[str, Any]]:
        """What the agent has said after its greeting."""
        said = [json.loads(line) for line in self.output.getvalue().splitlines()]
        assert all(message["jsonrpc"] == "2.0" for message in said)
        return said[1:]

    async def answers(self, *messages: object) -> list[dict[str, Any]]:
        """What it says to `messages`, and to those before, until it has nothing more to do and ends."""
        self.send(*messages)
        await asyncio.sleep(0.01)
        await self.until(lambda: not self.agent._running)
        self.reader.feed_eof()
        await asyncio.wait_for(self.serving, 10)
        return self.messages()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture
async def side(tmp_path: Path) -> AsyncIterator[Side]:
    home = Home(tmp_path / "home")
    home.prepare()
    side = Side(home)
    yield side
    side.serving.cancel()
    await asyncio.wait([side.serving])


NAMES = {"jsonrpc": "2.0", "id": "last", "method": "names", "params": {"arguments": {}}}
ANSWERED = {"jsonrpc": "2.0", "id": "last", "result": []}


async def test_it_says_what_it_is(side: Side) -> None:
    assert await side.answers() == []
    hello = json.loads(side.output.getvalue())
    assert hello["method"] == "hello"
    assert hello["params"]["polyvisor"] == __version__


async def test_a_call_is_answered_under_its_number(side: Side) -> None:
    side.call(7, "names")
    side.call("seven", "names")
    assert sorted(map(str, await side.answers())) == sorted(
        map(str, [{"jsonrpc": "2.0", "id": number, "result": []} for number in (7, "seven")])
    )


@pytest.mark.parametrize(
    ("message", "number", "code"),
    [
        (b"{", None, PARSE_ERROR),
        (b"hello", None, PARSE_ERROR),
        (b"\xff", None, PARSE_ERROR),
        (b"[" * 100_000, None, PARSE_ERROR),
        ([], None, INVALID_REQUEST),
        ([NAMES], None, INVALID_REQUEST),
        (5, None, INVALID_REQUEST),
        ({}, None, INVALID_REQUEST),
        ({"id": 1, "method": "names"}, None, INVALID_REQUEST),
        ({"jsonrpc": "1.0", "id": 1, "method": "names"}, None, INVALID_REQUEST),
        ({"jsonrpc": "2.0"}, None, INVALID_REQUEST),
        ({"jsonrpc": "2.0", "id": 1}, None, INVALID_REQUEST),
        ({"jsonrpc": "2.0", "id": 1, "method": ["names"]}, None, INVALID_REQUEST),
        ({"jsonrpc": "2.0", "id": None, "method": "names"}, None, INVALID_REQUEST),
        ({"jsonrpc": "2.0", "id": [1], "method": "names"}, None, INVALID_REQUEST),
        ({"jsonrpc": "2.0", "id": 1, "method": "frobnicate"}, 1, NO_METHOD),
        ({"jsonrpc": "2.0", "id": 1, "method": "close"}, 1, NO_METHOD),
        ({"jsonrpc": "2.0", "id": 1, "method": "console"}, 1, NO_METHOD),
        ({"jsonrpc": "2.0", "id": 1, "method": "__init__"}, 1, NO_METHOD),
        ({"jsonrpc": "2.0", "id": 1, "method": "show"}, 1, FAILED),
        ({"jsonrpc": "2.0", "id": 1, "method": "show", "params": []}, 1, FAILED),
        ({"jsonrpc": "2.0", "id": 1, "method": "show", "params": {"arguments": None}}, 1, FAILED),
        ({"jsonrpc": "2.0", "id": 1, "method": "kill", "params": {"arguments": {"name": "a"}}}, 1, FAILED),
    ],
)
async def test_what_is_no_call_is_refused(side: Side, message: object, number: object, code: int) -> None:
    (answer,) = [answer for answer in await side.answers(message, NAMES) if answer != ANSWERED]
    assert answer["id"] == number
    assert answer["error"]["code"] == code
    assert 0 < len(answer["error"]["message"]) < 300
    assert "result" not in answer


async def test_notifications_are_never_answered(side: Side) -> None:
    for method in ("names", "frobnicate", "cancel", "hello"):
        side.send({"jsonrpc": "2.0", "method": method, "params": {"id": 5}})
    assert await side.answers(NAMES) == [ANSWERED]


@pytest.mark.parametrize("number", [None, [], {}, [1], 1.5, "nope", 99])
async def test_a_cancellation_of_nothing_does_nothing(side: Side, number: object) -> None:
    assert await side.answers({"jsonrpc": "2.0", "method": "cancel", "params": {"id": number}}, NAMES) == [ANSWERED]


@QUICK
@given(
    st.binary(max_size=30).filter(lambda line: b"\n" not in line)
    | anything
    | st.fixed_dictionaries(
        {"jsonrpc": st.just("2.0"), "method": st.sampled_from(("show", "cancel", "kill", "nope")) | anything},
        optional={"id": anything, "params": anything | st.dictionaries(st.sampled_from(("id", "arguments")), anything)},
    )
)
def test_whatever_comes_the_agent_lives_on(tmp_path_factory: pytest.TempPathFactory, message: object) -> None:
    async def converse() -> list[dict[str, Any]]:
        home = Home(tmp_path_factory.getbasetemp() / "agent-home")
        home.prepare()
        return await Side(home).answers(message, NAMES)

    assert ANSWERED in asyncio.run(converse())


class TestErrors:
    async def test_an_error_of_a_verb_arrives_as_it_was(self, side: Side) -> None:
        side.call(1, "show", name="nope")
        side.call(2, "show", name="../x")
        first, second = (raised(answer["error"]) for answer in await side.answers())
        assert type(first) is NotFound
        assert type(second) is InvalidInput
        assert second.field == "name"

    async def test_a_fault_of_ours_is_told_and_the_agent_lives_on(self, side: Side) -> None:
        side.call(1, "status")
        failed, fine = await side.answers(NAMES)
        error = raised(failed["error"])
        assert type(error) is PolyvisorError
        assert error.message == "status: ZeroDivisionError: a fault"
        assert fine == ANSWERED

    async def test_a_key_that_is_none(self, side: Side) -> None:
        side.call(1, "kill", "../../x", name="a")
        (answer,) = await side.answers()
        error = raised(answer["error"])
        assert isinstance(error, InvalidInput)
        assert error.field == "key"

    async def test_files_of_the_host_are_not_imported(self, side: Side) -> None:
        for number, source in enumerate(("/etc/passwd", "file:///etc/passwd", "x://y", "")):
            side.call(number, "image_import", source=source, name="x")
        errors = [raised(answer["error"]) for answer in await side.answers()]
        assert [(type(error), error.message) for error in errors] == [(NotFound, "there is no such upload")] * 4
        assert side.host.imported == []

    async def test_what_was_uploaded_is_imported_and_forgotten_also_where_that_fails(self, side: Side) -> None:
        upload = side.uploads.take(io.BytesIO(b"content"), "x.raw", 7)
        side.call(1, "image_import", source=upload, name="x")
        side.call(2, "image_import", source="http://h/x", name="x")
        messages = [raised(answer["error"]).message for answer in await side.answers()]
        assert "asked for http://h/x" in messages
        assert side.host.imported == [b"content"]
        with pytest.raises(NotFound):
            side.uploads.find(upload)


class TestUnderWay:
    async def test_progress_carries_the_number(self, side: Side) -> None:
        side.call(3, "start", name="a")
        await side.until(side.messages)
        assert side.messages() == [
            {
                "jsonrpc": "2.0",
                "method": "progress",
                "params": {"id": 3, "step": {"phase": "starting", "done": 1, "total": 2}},
            }
        ]
        side.host.go_on.set()

    async def test_calls_do_not_wait_for_each_other(self, side: Side) -> None:
        side.call(1, "start", name="a")
        await side.until(lambda: side.host.started)
        side.send(NAMES)
        await side.until(lambda: ANSWERED in side.messages())
        assert side.host.ended == []
        side.host.go_on.set()

    async def test_one_that_is_cancelled_is_answered(self, side: Side) -> None:
        side.call(1, "start", name="a")
        side.call(2, "start", name="b")
        await side.until(lambda: len(side.host.started) == 2)
        side.send({"jsonrpc": "2.0", "method": "cancel", "params": {"id": 1}})
        await side.until(lambda: side.host.ended)
        assert side.host.ended == ["a was cancelled"]
        side.host.go_on.set()
        answers = {answer["id"]: answer for answer in await side.answers() if "id" in answer}
        assert raised(answers[1]["error"]).message == "start was cancelled"
        assert answers[2]["result"] == []

    async def test_the_same_call_sent_again_is_done_once(self, side: Side) -> None:
        key = str(uuid.uuid4())
        for number in (1, 2):
            side.call(number, "start", key, name="a")
        await side.until(lambda: side.host.started)
        side.host.go_on.set()
        answers = [answer for answer in await side.answers() if "id" in answer]
        assert sorted(answer["id"] for answer in answers) == [1, 2]
        assert [answer["result"] for answer in answers] == [[], []]
        assert side.host.started == ["a"]

    async def test_one_that_was_cut_short_and_can_not_be_repeated(self, side: Side) -> None:
        key = str(uuid.uuid4())
        (side.host.home.path / "calls").mkdir()
        (side.host.home.path / "calls" / key).write_text('{"verb": "reboot", "pid": 1}\n')
        side.call(1, "reboot", key, name="a")
        (answer,) = await side.answers()
        assert isinstance(raised(answer["error"]), WrongState)


class TestEnd:
    """The other side is gone while calls are under way."""

    @pytest.fixture
    async def left(self, side: Side) -> Side:
        side.call(1, "start", name="a")
        side.call(2, "vms")
        await side.until(lambda: len(side.host.started) == 2)
        side.reader.feed_eof()
        return side

    async def test_looks_are_given_up_and_the_rest_is_done(self, left: Side) -> None:
        await left.until(lambda: left.host.ended)
        assert left.host.ended == ["vms was cancelled"]
        assert not left.serving.done()
        left.host.go_on.set()
        await asyncio.wait_for(left.serving, 10)
        assert left.host.ended == ["vms was cancelled", "a"]

    async def test_its_outcome_is_kept_for_who_asks_again(self, left: Side) -> None:
        left.host.go_on.set()
        await asyncio.wait_for(left.serving, 10)
        (noted,) = (left.host.home.path / "calls").iterdir()
        again = Side(left.host.home)
        again.call(9, "start", noted.name, name="a")
        assert await again.answers() == [{"jsonrpc": "2.0", "id": 9, "result": []}]
        assert again.host.started == []


async def test_a_pipe_that_nobody_reads_ends_nothing(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def write(self, data: object) -> int:
            raise BrokenPipeError

    home = Home(tmp_path / "home")
    home.prepare()
    host = Odd(home)
    host.go_on.set()
    reader = asyncio.StreamReader()
    reader.feed_data(
        json.dumps(
            {
                "jsonrpc": "2.0",
                "id": 1,
                "method": "start",
                "params": {"arguments": {"name": "a"}, "key": str(uuid.uuid4())},
            }
        ).encode()
        + b"\n"
    )
    reader.feed_eof()
    await Agent(host, Calls(home), Uploads(home), Broken()).serve(reader)
    assert host.ended == ["a"]
