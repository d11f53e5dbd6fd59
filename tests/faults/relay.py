"""A relay between a client and a server on loopback, in which the network can be cut, or go silent, at any point."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

_CHUNK = 64 << 10


class Relay:
    """Passes on what comes to `port`. Each piece that is about to be passed on is told to `watch` first.

    `watch` may call `cut`, after which nothing of it arrives, or `silence`: what stands hangs, what is new works.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.watch: Callable[[], None] = lambda: None
        self._writers: set[asyncio.StreamWriter] = set()
        self._silent: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def cut(self) -> None:
        """Break every connection that stands."""
        for writer in self._writers:
            writer.transport.abort()

    def silence(self) -> None:
        """Let every connection that stands hang, as when a cable is pulled."""
        self._silent |= self._writers

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers |= {writer, back}
        self._tasks |= {
            asyncio.ensure_future(self._pass(reader, back)),
            asyncio.ensure_future(self._pass(there, writer)),
        }

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                self.watch()
                if writer in self._silent:
                    continue
                writer.write(data)
                await writer.drain()
        if writer not in self._silent:
            writer.close()
        self._writers.discard(writer)


@contextlib.asynccontextmanager
async def relaying(target: int) -> AsyncIterator[Relay]:
    """A relay to a port of loopback, until the end of the block."""
    relay = Relay(target)
    server = await asyncio.start_server(relay._serve, "127.0.0.1", 0)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()
        relay.cut()
        for writer in relay._silent:
            writer.transport.abort()
        for task in relay._tasks:
            task.cancel()
        await asyncio.gather(*relay._tasks, return_exceptions=True)
