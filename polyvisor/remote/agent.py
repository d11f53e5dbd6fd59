"""The agent: a `Host` that another machine uses over stdin and stdout, for as long as the connection lasts.

A call that changes something is carried out even where the connection is lost meanwhile (whoever sent it will ask what came
of it); looks are given up. Then the process ends: nothing stays on the host.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import platform
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, BinaryIO

from polyvisor import __version__
from polyvisor.errors import InvalidInput, PolyvisorError, ProtocolError
from polyvisor.host.api import HostApi, SSHTarget
from polyvisor.host.keys import LOGIN
from polyvisor.operation import Step
from polyvisor.remote.calls import Calls
from polyvisor.remote.uploads import Uploads
from polyvisor.remote.wire import (
    INVALID_REQUEST,
    LOOKS,
    MAX_LINE,
    NO_METHOD,
    PARSE_ERROR,
    REPEATABLE,
    Access,
    decode,
    encode,
    failure,
    verbs,
)
from polyvisor.spec.parse import unstructure


class Agent:
    """Answers calls that come in on `reader`; answers go to `output` (a pipe, whose far end may vanish)."""

    def __init__(self, api: HostApi, calls: Calls, uploads: Uploads, output: BinaryIO) -> None:
        self.api = api
        self.calls = calls
        self.uploads = uploads
        self._output = output
        self._running: dict[object, asyncio.Task[None]] = {}
        self._lasting: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Answer until the other side is gone and what it has begun is done."""
        self._send({"method": "hello", "params": greeting()})
        while line := await reader.readline():
            self._receive(line)
        for task in set(self._running.values()) - self._lasting:
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _receive(self, line: bytes) -> None:
        try:
            message = decode(line)
        except ProtocolError as error:
            code = PARSE_ERROR if error.__cause__ else INVALID_REQUEST  # what is JSON has no cause in the parser
            self._send({"id": None, "error": {"code": code, "message": error.message}})
            return
        method, params, number = message.get("method"), message.get("params"), message.get("id")
        if not isinstance(params, dict):
            params = {}
        if method == "cancel":
            wanted = params.get("id")
            if isinstance(wanted, (int, str)) and (task := self._running.get(wanted)):
                task.cancel()
        elif isinstance(method, str) and "id" not in message:
            pass  # a notification is never answered
        elif not isinstance(method, str) or not isinstance(number, (int, str)):
            self._send({"id": None, "error": {"code": INVALID_REQUEST, "message": "this is not a call"}})
        elif method not in verbs():
            self._send({"id": number, "error": {"code": NO_METHOD, "message": f"there is no method {method!r:.40}"}})
        else:
            self._begin(number, method, params)

    def _begin(self, number: int | str, method: str, params: dict[str, Any]) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(number, method, params))
        self._running[number] = task
        if method not in LOOKS:
            self._lasting.add(task)
        task.add_done_callback(lambda done: self._ended(number, done))

    def _ended(self, number: int | str, task: asyncio.Task[None]) -> None:
        self._lasting.discard(task)
        if self._running.get(number) is task:
            del self._running[number]

    async def _answer(self, number: int | str, method: str, params: dict[str, Any]) -> None:
        async def work() -> dict[str, Any]:
            try:
                return {"result": await self._do(number, method, params.get("arguments", {}))}
            except PolyvisorError as error:
                return {"error": failure(error)}

        try:
            if method in LOOKS:
                outcome = await work()
            else:
                key = str(params.get("key"))
                outcome = await self.calls.once(key, method, work, repeatable=method in REPEATABLE)
        except PolyvisorError as error:
            outcome = {"error": failure(error)}
        except asyncio.CancelledError:
            self._send({"id": number, "error": failure(PolyvisorError(f"{method} was cancelled"))})
            raise
        except Exception as error:  # a fault of ours: the caller is told, and the agent lives on
            outcome = {"error": failure(PolyvisorError(f"{method}: {type(error).__name__}: {error}"))}
        self._send({"id": number, **outcome})

    async def _do(self, number: int | str, method: str, raw: object) -> Any:
        verb = verbs()[method]
        arguments = verb.arguments(raw)
        if verb.progress:
            arguments["progress"] = lambda step: self._report(number, step)
        if method in ("image_import", "vm_import"):
            return _plain(await self._import(getattr(self.api, method), arguments))
        result = await getattr(self.api, method)(**arguments)
        return _access(result) if isinstance(result, SSHTarget) else _plain(result)

    async def _import(self, verb: Callable[..., Awaitable[Any]], arguments: dict[str, Any]) -> Any:
        """Import what was uploaded before, or what a URL leads to: other files of this machine are nobody's business."""
        from polyvisor.images.download import is_url

        source = str(arguments["source"])
        if is_url(source):
            return await verb(**arguments)
        upload = self.uploads.find(source)
        try:
            return await verb(**{**arguments, "source": str(upload)})
        finally:  # whoever tries again sends it again
            self.uploads.forget(upload)

    def _report(self, number: int | str, step: Step) -> None:
        self._send({"method": "progress", "params": {"id": number, "step": unstructure(step)}})

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            self._output.write(encode(message))
            self._output.flush()


def _plain(value: object) -> object:
    return [unstructure(item) for item in value] if isinstance(value, list) else unstructure(value)


def _access(target: SSHTarget) -> dict[str, Any]:
    known = target.known_hosts.read_text() if target.known_hosts.exists() else ""
    access = Access(
        address=target.address,
        port=target.port,
        user=target.user,
        alias=target.alias,
        identity=target.identity.read_text(),
        known_hosts=known,
        own=target.identity.name == LOGIN.name,
    )
    plain: dict[str, Any] = unstructure(access)
    return plain


def greeting() -> dict[str, Any]:
    """What an agent says of itself before all else."""
    return {"polyvisor": __version__, "python": platform.python_version(), "user": os.geteuid()}


async def standard_input() -> asyncio.StreamReader:
    """What comes in on stdin, as a stream."""
    reader = asyncio.StreamReader(limit=MAX_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def serve() -> None:
    """Be the agent of this machine on this process's stdin and stdout."""
    from polyvisor.host.host import Host

    # The connection's end is no reason to drop what was begun.
    for number in (signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    host = Host()
    calls, uploads = Calls(host.home), Uploads(host.home)
    calls.sweep()
    uploads.sweep()
    await Agent(host, calls, uploads, sys.stdout.buffer).serve(await standard_input())


def main(words: list[str]) -> int:
    """Be an agent, as `connection.command` asks: `serve`, or `stream` and what of, in base64."""
    if words[:1] == ["stream"]:
        asyncio.run(stream(json.loads(base64.urlsafe_b64decode(words[1]))))
    else:
        asyncio.run(serve())
    return 0


async def stream(raw: dict[str, Any]) -> None:
    """Carry bytes over stdin and stdout, by `raw["kind"]`: `console`, `log`, `events` (a line each), `image_export`, `upload`,
    `parcel`, `arrive`, `vm_export`.

    The first line says that it begins, or what is wrong.
    """
    from polyvisor.host.host import Host

    kind, host, out = raw.get("kind"), Host(), sys.stdout.buffer

    def begin(outcome: dict[str, Any]) -> None:
        out.write(encode(outcome))
        out.flush()

    try:
        if kind == "console":
            await _console(host, str(raw["name"]), begin, out)
        elif kind == "log":
            chunks = host.log(str(raw["name"]), hypervisor=bool(raw["hypervisor"]), follow=bool(raw["follow"]))
            await _chunks(chunks, begin, out)
        elif kind == "events":
            await _events(host, tuple(map(str, raw["names"])), begin, out)
        elif kind == "image_export":
            await _chunks(host.image_export(str(raw["name"])), begin, out)
        elif kind == "vm_export":
            await _chunks(host.vm_export(str(raw["name"])), begin, out)
        elif kind == "parcel":
            await _chunks(host.parcel(str(raw["name"]), str(raw["token"])), begin, out)
        elif kind == "arrive":
            begin({"result": None})
            await host.arrive(_incoming)
            begin({"result": None})
        elif kind == "upload":
            uploads = Uploads(host.home)
            begin({"result": None})
            begin({"result": uploads.take(sys.stdin.buffer, str(raw["name"]), int(raw["size"]))})
        else:
            raise InvalidInput("kind", kind, "is not a stream")
    except PolyvisorError as error:
        begin({"error": failure(error)})
    except BrokenPipeError:
        pass


async def _console(host: HostApi, name: str, begin: Any, out: BinaryIO) -> None:
    reader, writer = await host.console(name)
    begin({"result": None})
    typed = await standard_input()

    async def type_in() -> None:
        while data := await typed.read(4096):
            writer.write(data)
            await writer.drain()

    async def show() -> None:
        while data := await reader.read(64 << 10):
            out.write(data)
            out.flush()

    tasks = [asyncio.ensure_future(type_in()), asyncio.ensure_future(show())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        writer.close()


async def _incoming() -> AsyncGenerator[bytes]:
    """What comes in on stdin."""
    reader = await standard_input()
    while data := await reader.read(1 << 20):
        yield data


async def _chunks(chunks: AsyncIterator[bytes], begin: Any, out: BinaryIO) -> None:
    async def show() -> None:
        first = await anext(chunks, b"")
        begin({"result": None})
        out.write(first)
        out.flush()
        async for chunk in chunks:
            out.write(chunk)
            out.flush()

    await _while_connected(show())


async def _events(host: HostApi, names: tuple[str, ...], begin: Any, out: BinaryIO) -> None:
    for name in names:
        await host.show(name)
    begin({"result": None})

    async def show() -> None:
        async for event in host.events(names):
            out.write(encode({"method": "event", "params": unstructure(event)}))
            out.flush()

    await _while_connected(show())


async def _while_connected(work: Coroutine[Any, Any, None]) -> None:
    """Do `work` to its end, or until the other side is gone: where nothing is written, nothing else would tell."""
    connected = asyncio.ensure_future((await standard_input()).read())
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait([connected, working], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
    finally:
        connected.cancel()
        working.cancel()
