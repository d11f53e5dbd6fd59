"""What contract tests share beside fixtures."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from polyvisor.host.api import HostApi
from polyvisor.remote.host import RemoteHost
from polyvisor.ssh import execute

BOOT_S = 120.0
DISK = "$(echo /dev/*vda)"  # vda, and xvda on Xen


async def needs(api: HostApi, verb: str) -> None:
    """Skip a test of what the driver of the host's VMs declares not to do, with the reason that it gives."""
    status = await api.status()
    for driver in status.capabilities:
        if status.hypervisor in [each.name for each in driver.accelerators] and (reason := driver.missing.get(verb)):
            pytest.skip(f"{driver.driver}: {verb}: {reason}")


async def guest(api: HostApi, name: str, command: str) -> str:
    """What `command` prints in the guest of VM `name`."""
    return (await execute(api, name, ["sh", "-c", command], timeout_s=60)).stdout.strip()


@contextlib.asynccontextmanager
async def dialled(api: HostApi, port: int) -> AsyncIterator[asyncio.StreamReader]:
    """What is said at a port of the host's loopback interface, through SSH where the host is another machine.

    Nothing is said, to the end, where nobody listens.
    """
    if isinstance(api, RemoteHost):
        through = await asyncio.create_subprocess_shell(
            f"exec {api.link.tunnel('127.0.0.1', port).replace('%%', '%')}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert through.stdout is not None
        try:
            yield through.stdout
        finally:
            with contextlib.suppress(ProcessLookupError):
                through.terminate()
            await through.communicate()
        return
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        nobody = asyncio.StreamReader()
        nobody.feed_eof()
        yield nobody
        return
    try:
        yield reader
    finally:
        writer.close()
