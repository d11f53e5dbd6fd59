"""The one place that speaks QMP, QEMU's control protocol, through the official `qemu.qmp` library.

`connected` gives a `Monitor` for one of a VM's sockets. A socket serves one client at a time and QEMU's queue for it is a
single place long, so a connection that finds it full tries again until its time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError

from polyvisor.errors import PolyvisorError, TimedOut

RETRY_S = 0.002

# The library logs every lost connection as an error; here the caller is told by an exception.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class QMPLost(PolyvisorError):
    """The connection ended before the answer came: the outcome is unknown until the VM is observed again."""

    code = "qmp-lost"


class QMPRefused(PolyvisorError):
    """QEMU answered a command with an error."""

    code = "qmp-refused"


class Monitor:
    """An open QMP connection."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its answer; raises QMPRefused, QMPLost."""
        try:
            return await self._client.execute(command, arguments or None)
        except ExecuteError as error:
            raise QMPRefused(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise QMPLost(f"the connection to QEMU ended during {command}") from error

    async def human(self, line: str) -> str:
        """Run a command of the human monitor, for what QMP lacks; returns what it printed, which is empty on success."""
        printed: str = await self.execute("human-monitor-command", **{"command-line": line})
        return printed.strip()

    async def run_state(self) -> str:
        """QEMU's RunState: running, paused, shutdown, guest-panicked, …"""
        status = await self.execute("query-status")
        return str(status["status"])


@contextlib.asynccontextmanager
async def connected(
    socket: Path, *, timeout_s: float, gone: Callable[[], bool] = lambda: False
) -> AsyncIterator[Monitor]:
    """Connect to the QMP socket at `socket`, waiting for it to appear and to be free.

    Raises TimedOut after `timeout_s` seconds, and QMPLost as soon as `gone` says that QEMU has ended.
    """
    directory = os.open(socket.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # By way of the descriptor the name fits into the 108 bytes of a socket address, however long the path.
        address = f"/proc/self/fd/{directory}/{socket.name}"
        client = await _client(address, time.monotonic() + timeout_s, gone)
    finally:
        os.close(directory)
    try:
        yield Monitor(client)
    finally:
        with contextlib.suppress(QMPError, OSError, EOFError):
            await client.disconnect()


async def _client(address: str, deadline: float, gone: Callable[[], bool]) -> QMPClient:
    while True:
        client = QMPClient("polyvisor")
        try:
            async with asyncio.timeout_at(_loop_time(deadline)):
                await client.connect(address)
        except TimeoutError as error:
            raise TimedOut("QEMU does not answer on its QMP socket") from error
        except (QMPError, OSError) as error:
            if gone():
                raise QMPLost("QEMU has ended") from error
            if time.monotonic() > deadline:
                raise TimedOut("QEMU does not answer on its QMP socket") from error
        else:
            return client
        await asyncio.sleep(RETRY_S)


def _loop_time(deadline: float) -> float:
    """A time of the monotonic clock, on the event loop's own clock."""
    return asyncio.get_running_loop().time() + max(0.0, deadline - time.monotonic())
