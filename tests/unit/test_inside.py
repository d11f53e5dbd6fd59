"""Whether a guest's SSH server answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

from polyvisor.host.api import SSHTarget
from polyvisor.host.inside import patience, ssh_answers


async def answers(greeting: bytes, after_s: float, timeout_s: float) -> bool:
    """Whether a server that says `greeting` after a while counts as one that answers."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(after_s)
        writer.write(greeting)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        here = Path("/nowhere")
        target = SSHTarget(address="127.0.0.1", port=port, user="u", identity=here, known_hosts=here, alias="a")
        return await ssh_answers(target, timeout_s)


async def test_a_greeting_counts() -> None:
    assert await answers(b"SSH-2.0-dropbear\r\n", 0, 5)


async def test_a_mere_connection_does_not() -> None:
    assert not await answers(b"", 0, 5)
    assert not await answers(b"HTTP/1.1 400\r\n", 0, 5)


async def test_a_server_that_takes_long_needs_patience() -> None:
    assert not await answers(b"SSH-2.0-OpenSSH\r\n", 0.5, 0.1)
    assert await answers(b"SSH-2.0-OpenSSH\r\n", 0.5, 10)


def test_patience_grows_to_a_limit() -> None:
    assert patience(0) == 1
    assert 5 < patience(30) < patience(60) <= patience(1000) == 20
