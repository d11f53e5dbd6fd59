"""QMP against a server that behaves, and against some that don't."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from socket import AF_UNIX
from socket import socket as Socket  # noqa: N812
from typing import Any

import pytest

from polyvisor.drivers.qemu.qmp import Monitor, QMPLost, QMPRefused, answer, connected, tell_all
from polyvisor.errors import PolyvisorError, TimedOut

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]


def greeting_of(version: tuple[int, int]) -> bytes:
    """What a QEMU of this version says first."""
    numbers = {"micro": 22, "minor": version[1], "major": version[0]}
    return (
        json.dumps({"QMP": {"version": {"qemu": numbers, "package": ""}, "capabilities": ["oob"]}}).encode() + b"\r\n"
    )


async def commands(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """What a client sends: JSON objects one after the other, with or without white space between them."""
    text = ""
    while piece := await reader.read(4096):
        text += piece.decode()
        while text.strip():
            try:
                command, end = json.JSONDecoder().raw_decode(text.lstrip())
            except ValueError:
                break
            text = text.lstrip()[end:]
            yield command


class FakeQemu:
    """A QMP server; `answer` gives the reply to each command, with `events` that come before it; None closes the connection."""

    def __init__(self, answer: Answer, *, version: tuple[int, int] = (7, 2), greeting: bytes | None = None) -> None:
        self.answer = answer
        self.greeting = greeting_of(version) if greeting is None else greeting
        self.seen: list[dict[str, Any]] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            writer.write(self.greeting)
            async for command in commands(reader):
                self.seen.append(command)
                reply = {"return": {}} if command["execute"] == "qmp_capabilities" else await self.answer(command)
                if reply is None:
                    break
                for event in reply.pop("events", ()):
                    at = {"seconds": int(time.time()), "microseconds": int(time.time() % 1 * 1e6)}
                    writer.write(json.dumps({"event": event, "timestamp": at}).encode() + b"\r\n")
                identity = {"id": command["id"]} if "id" in command else {}
                writer.write(json.dumps({**reply, **identity}).encode() + b"\r\n")
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def listening(fake: FakeQemu, socket: Path) -> AsyncIterator[Path]:
    directory = os.open(socket.parent, os.O_RDONLY)
    try:
        server = await asyncio.start_unix_server(fake.serve, f"/proc/self/fd/{directory}/{socket.name}")
    finally:
        os.close(directory)
    try:
        yield socket
    finally:
        server.close()


async def fine(command: dict[str, Any]) -> dict[str, Any]:
    return {"return": {"status": "running"}}


async def closing(command: dict[str, Any]) -> None:
    return None


async def silent(command: dict[str, Any]) -> None:
    await asyncio.sleep(60)


async def refusing(command: dict[str, Any]) -> dict[str, Any]:
    return {"error": {"class": "GenericError", "desc": "there is no such thing"}}


async def test_the_version_is_in_the_greeting(tmp_path: Path) -> None:
    fake = FakeQemu(fine, version=(10, 1))
    async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
        assert monitor.version == (10, 1)


@pytest.mark.parametrize(
    "version", ["{}", '{"qemu": 7}', '{"qemu": {"major": 7}}', '{"qemu": {"major": "x", "minor": 1}}']
)
async def test_a_version_that_is_none(tmp_path: Path, version: str) -> None:
    greeting = f'{{"QMP": {{"version": {version}, "capabilities": []}}}}\r\n'.encode()
    fake = FakeQemu(fine, greeting=greeting)
    async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
        with pytest.raises(QMPLost, match="greeting"):
            _ = monitor.version


async def test_greeting_negotiation_and_answer(tmp_path: Path) -> None:
    fake = FakeQemu(fine)
    async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
        assert await monitor.run_state() == "running"
        await monitor.execute("set-action", shutdown="pause")
    assert [command["execute"] for command in fake.seen] == ["qmp_capabilities", "query-status", "set-action"]
    assert fake.seen[2]["arguments"] == {"shutdown": "pause"}
    assert "arguments" not in fake.seen[1]


async def test_what_the_human_monitor_prints(tmp_path: Path) -> None:
    async def printing(command: dict[str, Any]) -> dict[str, Any]:
        return {"return": "host forwarding removed\r\n"}

    fake = FakeQemu(printing)
    async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
        assert await monitor.human("hostfwd_remove nic0 tcp::1") == "host forwarding removed"
    assert fake.seen[-1]["arguments"] == {"command-line": "hostfwd_remove nic0 tcp::1"}


async def test_a_command_that_qemu_refuses(tmp_path: Path) -> None:
    fake = FakeQemu(refusing)
    async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
        with pytest.raises(QMPRefused, match="QEMU refused stop: there is no such thing"):
            await monitor.execute("stop")
        with pytest.raises(QMPRefused):
            await monitor.execute("cont")


async def test_a_connection_that_ends_before_the_answer(tmp_path: Path) -> None:
    async with listening(FakeQemu(closing), tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
        with pytest.raises(QMPLost, match="ended during quit"):
            await monitor.execute("quit")
        with pytest.raises(QMPLost):
            await monitor.execute("stop")


async def test_whoever_is_cancelled_leaves_the_only_place_free_at_once(tmp_path: Path) -> None:
    """Who undoes what was cancelled wants QEMU to answer, while the error is still on its way."""
    with Socket(AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        server.settimeout(2)
        for steps in range(12):

            async def connect() -> None:
                try:
                    async with connected(tmp_path / "s", timeout_s=5):
                        raise AssertionError("nobody has greeted it")
                except asyncio.CancelledError:
                    await asyncio.sleep(0)  # the loop closes what it has to close
                    with contextlib.suppress(BlockingIOError):
                        server.setblocking(False)
                        while True:
                            accepted = server.accept()[0]
                            accepted.settimeout(0.5)
                            assert accepted.recv(1) == b"", "it is open still"
                            accepted.close()
                    raise

            task = asyncio.ensure_future(connect())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_an_answer_that_never_comes(tmp_path: Path) -> None:
    began = time.monotonic()
    async with listening(FakeQemu(silent), tmp_path / "s") as socket, connected(socket, timeout_s=0.3) as monitor:
        with pytest.raises(TimedOut, match=r"QEMU did not answer stop within 0\.3 s"):
            await monitor.execute("stop")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("greeting", [b"", b"\x00\xff\r\n", b"SSH-2.0-x\r\n", b"{}\r\n", b'{"QMP": 5}\r\n'])
async def test_a_greeting_that_never_comes_or_is_none(tmp_path: Path, greeting: bytes) -> None:
    began = time.monotonic()
    async with listening(FakeQemu(fine, greeting=greeting), tmp_path / "s") as socket:
        with pytest.raises(TimedOut, match="does not answer"):
            async with connected(socket, timeout_s=0.2):
                pass
    assert time.monotonic() - began < 2


async def test_a_socket_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    async def later() -> Monitor:
        async with connected(tmp_path / "s", timeout_s=5) as monitor:
            await monitor.run_state()
            return monitor

    task = asyncio.create_task(later())
    await asyncio.sleep(0.05)
    async with listening(FakeQemu(fine), tmp_path / "s"):
        await task


async def test_a_socket_without_anyone_behind_it(tmp_path: Path) -> None:
    async with listening(FakeQemu(fine), tmp_path / "s"):
        pass
    with pytest.raises(TimedOut):
        async with connected(tmp_path / "s", timeout_s=0.05):
            pass


async def test_a_qemu_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(QMPLost, match="QEMU has ended"):
        async with connected(tmp_path / "s", timeout_s=30, gone=lambda: True):
            pass
    assert time.monotonic() - began < 1


async def test_a_directory_that_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(PolyvisorError):
        async with connected(tmp_path / "gone" / "s", timeout_s=1):
            pass


async def test_paths_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100) / "run"
    deep.mkdir(parents=True)
    async with listening(FakeQemu(fine), deep / "qmp.sock") as socket, connected(socket, timeout_s=5) as monitor:
        assert await monitor.run_state() == "running"
    assert len(str(deep)) > 200


async def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async with listening(FakeQemu(fine), tmp_path / "s") as socket:
        async with connected(socket, timeout_s=5):
            pass
        await asyncio.sleep(0.02)
        before = descriptors()
        for _ in range(5):
            async with connected(socket, timeout_s=5) as monitor:
                await monitor.run_state()
            with pytest.raises(TimedOut):
                async with connected(tmp_path / "absent", timeout_s=0.01):
                    pass
        await asyncio.sleep(0.02)
        assert descriptors() <= before


def never() -> bool:
    return False


async def test_an_answer_is_waited_for_without_the_library(tmp_path: Path) -> None:
    fake = FakeQemu(fine)
    task = asyncio.create_task(answer(tmp_path / "s", timeout_s=5, gone=never))
    await asyncio.sleep(0.05)
    async with listening(fake, tmp_path / "s"):
        await task
    assert [command["execute"] for command in fake.seen] == ["qmp_capabilities"]


@pytest.mark.parametrize(
    "said", [b"", b"\x00\xff\r\n", b"SSH-2.0-x\r\n", b"{}\r\n", b'{"QMP": 5}\r\n', b"[]\r\n", b"x" * 9999]
)
async def test_a_greeting_that_is_none_is_not_answered(tmp_path: Path, said: bytes) -> None:
    began = time.monotonic()
    fake = FakeQemu(fine, greeting=said)
    async with listening(fake, tmp_path / "s") as socket:
        with pytest.raises(TimedOut, match="does not answer"):
            await answer(socket, timeout_s=0.2, gone=never)
    assert time.monotonic() - began < 2
    assert fake.seen == []


async def test_a_qemu_that_greets_and_then_ends_has_not_answered(tmp_path: Path) -> None:
    """It greets from a thread of its own while it sets the machine up, which may fail."""
    gone: list[bool] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting_of((7, 2)))
        await reader.readline()
        await asyncio.sleep(0.05)
        gone.append(True)
        writer.close()

    server = await asyncio.start_unix_server(greet, tmp_path / "s")
    with pytest.raises(QMPLost, match="QEMU has ended"):
        await answer(tmp_path / "s", timeout_s=30, gone=lambda: bool(gone))
    server.close()


async def test_no_answer_is_waited_for_from_a_qemu_that_has_ended(tmp_path: Path) -> None:
    gone: list[bool] = []
    async with listening(FakeQemu(fine, greeting=b"{"), tmp_path / "s") as socket:
        task = asyncio.create_task(answer(socket, timeout_s=30, gone=lambda: bool(gone)))
        await asyncio.sleep(0.05)
        gone.append(True)
        with pytest.raises(QMPLost, match="QEMU has ended"):
            await task
    with pytest.raises(QMPLost):
        await answer(tmp_path / "gone" / "s", timeout_s=30, gone=never)


async def test_many_are_told_when_all_are_there(tmp_path: Path) -> None:
    """And answer, whatever events come before that."""
    told: list[int] = []

    async def counting(command: dict[str, Any]) -> dict[str, Any]:
        told.append(sum(fake.connections for fake in fakes))
        return {"return": {}, "events": ["RESUME"]}

    fakes = [FakeQemu(counting) for _ in range(3)]
    async with contextlib.AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(listening(fake, tmp_path / str(i))) for i, fake in enumerate(fakes)]
        await tell_all(sockets, "cont", timeout_s=5)
    assert told == [3, 3, 3]
    assert [[command["execute"] for command in fake.seen] for fake in fakes] == [["qmp_capabilities", "cont"]] * 3


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (refusing, QMPRefused, "refused cont: there is no such thing"),
        (closing, QMPLost, "QEMU has ended"),
        (silent, TimedOut, "does not answer"),
    ],
)
async def test_one_of_many_fails(tmp_path: Path, reply: Answer, error: type[PolyvisorError], words: str) -> None:
    async with listening(FakeQemu(fine), tmp_path / "a") as one, listening(FakeQemu(reply), tmp_path / "b") as other:
        with pytest.raises(error, match=words):
            await tell_all([one, other], "cont", timeout_s=1)


@pytest.mark.parametrize("greeting", [b"", b"\x00\xff\r\n", b"SSH-2.0-x\r\n", b"x" * 99999])
async def test_many_of_which_one_is_no_qemu(tmp_path: Path, greeting: bytes) -> None:
    fake = FakeQemu(closing, greeting=greeting + b"\r\n5\r\n[]\r\n")
    async with listening(FakeQemu(fine), tmp_path / "a") as one, listening(fake, tmp_path / "b") as other:
        with pytest.raises(QMPLost):
            await tell_all([one, other], "cont", timeout_s=5)
    with pytest.raises(QMPLost):
        await tell_all([tmp_path / "nowhere"], "cont", timeout_s=5)
