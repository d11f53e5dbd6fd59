"""A connection to the agent of a host: an ssh process, and the calls that are under way through it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from polyvisor.errors import ConnectionLost, InvalidInput, NotPermitted, PolyvisorError, ProtocolError, Unavailable
from polyvisor.operation import Progress, Step, silent
from polyvisor.process import converse
from polyvisor.remote.address import Entry
from polyvisor.remote.link import Link, explained, unexplained
from polyvisor.remote.wire import MAX_LINE, decode, encode, raised
from polyvisor.spec.parse import convert
from polyvisor.ssh import SSH_FAILED

# How the host's shell says what it lacks, before there is an agent that could.
_WANTS, _NO_PYTHON, _OLD_PYTHON, _NO_PLACE = "wants", "no-python", "old-python", "no-place"
_MARK = b"polyvisor-agent: "
_NOISE = 200  # lines that a talkative login shell may print before
_UNDO_S = 20.0


def command(application: Path, home: str | None, words: str) -> str:
    """What the host's shell runs to become the agent: it asks for the application where it does not have it yet.

    It is one line in single quotes, which means the same to every shell that a user may have there. The empty line that it
    prints first ends what a login shell has left unended.
    """
    size = application.stat().st_size
    name = application.name
    script = (
        "echo; umask 077; "
        "for p in python3 python3.14 python3.13 python3.12 python3.11; do "
        '"$p" -c "import sys; assert sys.version_info >= (3, 11)" 2>/dev/null && break; p=; done; '
        f'say() {{ echo "{_MARK.decode()}$*"; }}; '
        f'if [ -z "$p" ]; then if v=$(python3 --version 2>&1); then say {_OLD_PYTHON} "$v"; else say {_NO_PYTHON}; fi; '
        "exit 1; fi; "
        'd="${XDG_CACHE_HOME:-$HOME/.cache}/polyvisor"; '
        f'f="$d/{name}"; '
        f'if ! [ -f "$f" ]; then mkdir -p "$d" && (: >"$f.$$") || {{ say {_NO_PLACE} "$d"; exit 1; }}; '
        f'say {_WANTS}; head -c {size} >"$f.$$"; '
        f'if [ "$(wc -c <"$f.$$")" -eq {size} ]; then mv "$f.$$" "$f"; else rm "$f.$$"; exit 1; fi; fi; '
        + (f"export POLYVISOR_HOME={_in_double_quotes(home)}; " if home else "")
        + f'exec "$p" "$f" agent {words}'
    )
    return f"exec sh -c '{script}'"


def _in_double_quotes(path: str) -> str:
    if any(character in "'\"\\$`!\n" for character in path):
        raise InvalidInput("home", path, "has characters that a shell would take for its own", hint="choose another")
    return f'"{path}"'


async def _open(
    link: Link, application: Path, home: str | None, words: str, errors: IO[bytes]
) -> tuple[asyncio.subprocess.Process, dict[str, Any]]:
    """Start an agent; returns ssh's process and the agent's first message. Raises what is wrong with host or connection."""
    argv = link.argv(command(application, home, words))
    process = await converse(argv, errors=errors, limit=MAX_LINE)
    try:
        with contextlib.suppress(ConnectionError):  # ssh has ended, and says why
            if line := await _first_line(link.entry, process, application):
                return process, decode(line)
        status = await process.wait()
        errors.seek(0)
        said = errors.read(64 << 10).decode(errors="replace")
        # Of any other status, the words are those of the host's shell.
        raise explained(link.entry, said) if status == SSH_FAILED else unexplained(link.entry, said)
    except BaseException:
        await end(process)
        raise


async def _first_line(entry: Entry, process: asyncio.subprocess.Process, application: Path) -> bytes:
    """The first line of the agent, which gets the application where it is wanted; nothing where the connection ends."""
    assert process.stdin is not None and process.stdout is not None  # noqa: S101 (both are pipes)
    for _ in range(_NOISE):
        line = await process.stdout.readline()
        if not line or line.startswith(b'{"jsonrpc"'):
            return line
        if line.startswith(_MARK):
            about, _, detail = line.removeprefix(_MARK).decode(errors="replace").strip().partition(" ")
            if about != _WANTS:
                raise _lacking(entry, about, detail)
            process.stdin.write(application.read_bytes())
            await process.stdin.drain()
    raise ProtocolError(
        f"host '{entry.name}' ({entry.url}): its shell prints too much at a login",
        hint="let its start-up files print on a terminal only",
    )


def _lacking(entry: Entry, about: str, detail: str) -> PolyvisorError:
    where = f"host '{entry.name}' ({entry.url})"
    if about == _NO_PYTHON:
        return Unavailable(f"{where}: there is no Python", hint="install it there: apt-get install python3")
    if about == _OLD_PYTHON:
        return Unavailable(f"{where}: {detail} is too old", hint="install Python 3.11 or newer there")
    return NotPermitted(f"{where}: {detail} can't be written", hint="is the disk full, or the home not yours?")


async def end(process: asyncio.subprocess.Process) -> None:
    """End an ssh process; what the agent has begun goes on."""
    if process.returncode is None:
        # Its own kill() looks first whether it has ended, and would take its exit status away from asyncio.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    transport = getattr(process, "_transport", None)
    if transport is not None:  # or its pipes would be closed by the garbage collector, with a warning
        transport.close()


class Connection:
    """Calls to one agent; made by `Connection.open`."""

    def __init__(self, entry: Entry, process: asyncio.subprocess.Process, hello: Mapping[str, Any]) -> None:
        self.entry = entry
        self.hello = hello
        self.loop = asyncio.get_running_loop()
        self._process = process
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[asyncio.Future[Any], Progress]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, link: Link, application: Path, home: str | None) -> Connection:
        """Start an agent on the host. Raises Unavailable, NotPermitted or TimedOut with what is wrong, and a remedy."""
        with tempfile.TemporaryFile() as errors:
            process, message = await _open(link, application, home, "serve", errors)
        return cls(link.entry, process, message.get("params") or {})

    @property
    def usable(self) -> bool:
        """Whether calls can be made: the connection stands, and belongs to the event loop that runs."""
        return not self._reading.done() and self.loop is asyncio.get_running_loop()

    async def call(
        self, method: str, arguments: Mapping[str, Any], *, key: str | None = None, progress: Progress = silent
    ) -> Any:
        """The plain result of a call; raises what the other side raised, or ConnectionLost.

        Whoever cancels it cancels the call on the host, and waits while that undoes what it has done.
        """
        number = next(self._numbers)
        answer: asyncio.Future[Any] = self.loop.create_future()
        self._waiting[number] = answer, progress
        try:
            self._send(number, {"method": method, "params": {"arguments": arguments, "key": key}})
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            with contextlib.suppress(ConnectionLost):
                self._send(None, {"method": "cancel", "params": {"id": number}})
            await asyncio.wait([answer], timeout=_UNDO_S)
            raise
        finally:
            del self._waiting[number]
            if answer.done() and not answer.cancelled():
                answer.exception()  # looked at
            answer.cancel()

    async def close(self) -> None:
        """End the connection; the host carries on with what it has begun."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        await end(self._process)

    def _send(self, number: int | None, message: Mapping[str, Any]) -> None:
        if self._reading.done():
            raise self._lost()
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write(encode(message if number is None else {"id": number, **message}))

    async def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101
        try:
            while line := await self._process.stdout.readline():
                self._receive(decode(line))
        except (PolyvisorError, ValueError, OSError):
            pass  # whatever follows can't be understood either
        finally:
            for answer, _ in self._waiting.values():
                if not answer.done():
                    answer.set_exception(self._lost())

    def _receive(self, message: Mapping[str, Any]) -> None:
        if message.get("method") == "progress":
            params = message.get("params")
            if isinstance(params, dict) and (waiting := self._waiting_for(params.get("id"))):
                waiting[1](convert(params.get("step"), Step, "step"))
            return
        waiting = self._waiting_for(message.get("id"))
        if waiting is None or waiting[0].done():
            return
        if "error" in message:
            waiting[0].set_exception(raised(message["error"]))
        else:
            waiting[0].set_result(message.get("result"))

    def _waiting_for(self, number: object) -> tuple[asyncio.Future[Any], Progress] | None:
        return self._waiting.get(number) if isinstance(number, int) else None

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"host '{self.entry.name}': the connection is lost")


class Stream:
    """Bytes from and to a host, beside the calls, on an ssh process of their own; made by `Stream.open`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None  # noqa: S101
        self.process = process
        self.reader: asyncio.StreamReader = process.stdout
        self.writer: asyncio.StreamWriter = process.stdin

    @classmethod
    async def open(cls, link: Link, application: Path, home: str | None, kind: str, **arguments: object) -> Stream:
        """Begin a stream of this `kind` (see `agent.stream`); raises what the host says is wrong with it."""
        words = base64.urlsafe_b64encode(json.dumps({"kind": kind, **arguments}).encode()).decode()
        with tempfile.TemporaryFile() as errors:
            process, message = await _open(link, application, home, f"stream {words}", errors)
        if "error" in message:
            await end(process)
            raise raised(message["error"])
        return cls(process)

    async def result(self) -> Any:
        """What the host says when it has taken all that was written."""
        self.writer.write_eof()
        line = await self.reader.readline()
        if not line:
            raise ConnectionLost("the connection is lost")
        message = decode(line)
        if "error" in message:
            raise raised(message["error"])
        return message.get("result")

    async def check_end(self) -> None:
        """Raises ConnectionLost unless it was the host that ended the stream."""
        if await self.process.wait() == SSH_FAILED:
            raise ConnectionLost("the connection is lost", hint="what came before is not all there is; begin it again")

    async def close(self) -> None:
        await end(self.process)
