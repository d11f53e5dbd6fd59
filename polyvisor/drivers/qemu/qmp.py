"""The one place that speaks QMP, QEMU's control protocol, through the official `qemu.qmp` library.

`connected` gives a `Monitor` for one of a VM's sockets. A socket serves one client at a time and QEMU's queue for it is a
single place long, so a connection that finds it full tries again until its time is up. The library is imported when a VM
is first spoken to: commands that find none alive don't pay for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyvisor.errors import PolyvisorError, TimedOut
from polyvisor.waiting import event_loop, pause

if TYPE_CHECKING:
    from socket import socket as Connection  # noqa: N812

    from qemu.qmp import QMPClient

RETRY_S = 0.002
_GONE, _SILENT = "QEMU has ended", "QEMU does not answer on its QMP socket"
_LONGEST = 4096  # of the greeting and of the first answer


class QMPLost(PolyvisorError):
    """The connection ended before the answer came: the outcome is unknown until the VM is observed again."""

    code = "qmp-lost"


class QMPRefused(PolyvisorError):
    """QEMU answered a command with an error."""

    code = "qmp-refused"


class Monitor:
    """An open QMP connection; each command may take `timeout_s` seconds."""

    def __init__(self, client: QMPClient, timeout_s: float) -> None:
        self._client = client
        self.timeout_s = timeout_s

    @property
    def version(self) -> tuple[int, int]:
        """That of the QEMU at the other end, which may be older than the one that is installed now; raises QMPLost."""
        greeting = self._client.greeting
        try:
            numbers: Any = greeting.QMP.version["qemu"] if greeting else {}
            return int(numbers["major"]), int(numbers["minor"])
        except (KeyError, TypeError, ValueError) as error:
            raise QMPLost("QEMU's greeting can't be understood") from error

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its answer; raises QMPRefused, QMPLost, TimedOut."""
        from qemu.qmp import ExecuteError, QMPError

        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._client.execute(command, arguments or None)
        except TimeoutError as error:
            raise TimedOut(f"QEMU did not answer {command} within {self.timeout_s:g} s") from error
        except ExecuteError as error:
            raise QMPRefused(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise QMPLost(f"the connection to QEMU ended during {command}") from error

    async def execute_with(self, file: int, command: str, **arguments: Any) -> Any:
        """Run a command that takes an open file, which QEMU gets along with it; raises as `execute` does."""
        from qemu.qmp import QMPError

        try:
            self._client.send_fd_scm(file)
        except (QMPError, OSError) as error:
            raise QMPLost(f"the connection to QEMU ended before {command}") from error
        return await self.execute(command, **arguments)

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[Callable[[], list[dict[str, Any]]]]:
        """Listen to QEMU's events of these names; what is given returns those that came, and forgets them."""
        with self._client.listener(names) as listener:
            yield lambda: [dict(event) for event in listener.clear()]

    async def human(self, line: str) -> str:
        """Run a command of the human monitor, for what QMP lacks; returns what it printed, which is empty on success."""
        printed: str = await self.execute("human-monitor-command", **{"command-line": line})
        return printed.strip()

    async def run_state(self) -> str:
        """QEMU's RunState: running, paused, shutdown, guest-panicked, …"""
        status = await self.execute("query-status")
        if not isinstance(status, dict):
            raise QMPLost("QEMU's answer to query-status can't be understood")
        return str(status.get("status"))


@contextlib.asynccontextmanager
async def connected(
    socket: Path, *, timeout_s: float, gone: Callable[[], bool] = lambda: False
) -> AsyncIterator[Monitor]:
    """Connect to the QMP socket at `socket`, waiting for it to appear and to be free.

    Raises TimedOut after `timeout_s` seconds, and QMPLost as soon as `gone` says that QEMU has ended.
    """
    await event_loop()
    import logging

    from qemu.qmp import QMPError

    # The library logs every lost connection as an error; here the caller is told by an exception.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    with _address(socket) as address:
        client = await _client(address, time.monotonic() + timeout_s, gone)
    try:
        yield Monitor(client, timeout_s)
    finally:
        with contextlib.suppress(QMPError, OSError, EOFError):
            await client.disconnect()


async def answer(socket: Path, *, timeout_s: float, gone: Callable[[], bool]) -> None:
    """Wait until QEMU answers on `socket`: then the machine is set up. Raises TimedOut, QMPLost.

    Its greeting is no sign of that: a thread of its own sends it, maybe before QEMU finds that it can't start. What
    is said here is little, so this does without the library and without asyncio, which take longer to load than QEMU.
    """
    deadline = time.monotonic() + timeout_s
    with _address(socket) as address:
        while not await _answers(address, lambda: gone() or time.monotonic() > deadline):
            if gone():
                raise QMPLost(_GONE)
            if time.monotonic() > deadline:
                raise TimedOut(_SILENT)
            await pause(RETRY_S)


async def _answers(address: str, late: Callable[[], bool]) -> bool:
    """Whether there is an answer from `address` before it is too `late`; False, too, where nobody listens there yet.

    Greeting, negotiation, answer: docs/interop/qmp-spec.rst, 2.2 and 4.
    """
    from socket import AF_UNIX, socket

    with socket(AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.connect(address)
        if isinstance((await _heard(connection, late)).get("QMP"), dict):
            connection.send(b'{"execute": "qmp_capabilities"}\n')
            return "return" in await _heard(connection, late)
    return False


async def _heard(connection: Connection, late: Callable[[], bool]) -> dict[str, Any]:
    """The next message, which is a line; an empty one where what comes is none, or nothing comes before it is too `late`."""
    line = b""
    while b"\n" not in line and len(line) < _LONGEST and not late():
        try:
            line += (piece := connection.recv(_LONGEST))
        except BlockingIOError:
            await pause(RETRY_S)
        else:
            if not piece:
                break
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


async def tell_all(sockets: Sequence[Path], command: str, *, timeout_s: float) -> None:
    """Have many QEMUs run one command, all as nearly at once as can be; raises QMPRefused, QMPLost, TimedOut.

    Each is connected and waits before the first is told: where the command lets guests go, those that go leave the host little
    time for the others. Without the library, which takes several times as long for so few words.
    """
    async with contextlib.AsyncExitStack() as open_:
        try:
            async with asyncio.timeout(timeout_s):
                lines = await asyncio.gather(*(_negotiated(socket, open_) for socket in sockets))
                for _, writer in lines:
                    writer.write(b'{"execute": "%s"}\n' % command.encode())
                await asyncio.gather(*(_returned(reader, command) for reader, _ in lines))
        except TimeoutError as error:
            raise TimedOut(_SILENT) from error
        except (OSError, ValueError, TypeError) as error:  # the last two: what it says is no QMP
            raise QMPLost(f"the connection to QEMU ended during {command}") from error


async def _negotiated(
    socket: Path, open_: contextlib.AsyncExitStack
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which commands are taken, which is closed with `open_`."""
    with _address(socket) as address:
        reader, writer = await asyncio.open_unix_connection(address)
    open_.callback(writer.close)
    await reader.readline()  # the greeting
    writer.write(b'{"execute": "qmp_capabilities"}\n')
    await _returned(reader, "qmp_capabilities")
    return reader, writer


async def _returned(reader: asyncio.StreamReader, command: str) -> None:
    """Wait until the command is done, whatever events come before; raises QMPRefused, QMPLost, ValueError."""
    while line := await reader.readline():
        message = json.loads(line)
        if "return" in message:
            return
        if "error" in message:
            raise QMPRefused(f"QEMU refused {command}: {message['error'].get('desc')}")
    raise QMPLost(_GONE)


@contextlib.contextmanager
def _address(socket: Path) -> Iterator[str]:
    """Where to connect to `socket`; raises QMPLost where its directory is not to be had.

    By way of the directory's descriptor the name fits into the 108 bytes of a socket address, however long the path.
    """
    try:
        directory = os.open(socket.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise QMPLost(f"{socket.parent} can't be entered: {error.strerror}") from error
    try:
        yield f"/proc/self/fd/{directory}/{socket.name}"
    finally:
        os.close(directory)


async def _client(address: str, deadline: float, gone: Callable[[], bool]) -> QMPClient:
    from qemu.qmp import QMPClient, QMPError

    while True:
        client = QMPClient("polyvisor")
        connection = await _connection(address, deadline, gone)
        try:
            async with asyncio.timeout_at(_loop_time(deadline)):
                await client.connect(connection)
        except BaseException as error:
            # The library asserts at the end of `connect` that it is connected; QEMU may have ended by then.
            if isinstance(error, AssertionError):
                with contextlib.suppress(QMPError, OSError, EOFError):
                    await client.disconnect()
            # Cancelled early, the library has not made it its own; who undoes what was cancelled wants QEMU's only place.
            connection.close()
            if isinstance(error, TimeoutError):
                raise TimedOut(_SILENT) from error
            if not isinstance(error, (QMPError, OSError, AssertionError)):
                raise
            _require_hope(deadline, gone, error)
        else:
            return client
        await asyncio.sleep(RETRY_S)


async def _connection(address: str, deadline: float, gone: Callable[[], bool]) -> Connection:
    """A connection to `address`, as soon as somebody listens there and has a place free.

    The library could wait for that too, but formats a traceback at each attempt, which takes longer than all the rest.
    """
    from socket import AF_UNIX, socket

    while True:
        connection = socket(AF_UNIX)
        connection.setblocking(False)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            _require_hope(deadline, gone, error)
        else:
            return connection
        await asyncio.sleep(RETRY_S)


def _require_hope(deadline: float, gone: Callable[[], bool], error: BaseException) -> None:
    """Raise QMPLost, TimedOut where it is of no use to try again."""
    if gone():
        raise QMPLost(_GONE) from error
    if time.monotonic() > deadline:
        raise TimedOut(_SILENT) from error


def _loop_time(deadline: float) -> float:
    """A time of the monotonic clock, on the event loop's own clock."""
    return asyncio.get_running_loop().time() + max(0.0, deadline - time.monotonic())
