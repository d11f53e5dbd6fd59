"""What tests of VMs on the lab's Xen host share: the host's shell, and guests that are asked on their consoles."""

from __future__ import annotations

import asyncio
import time

import pytest

from polyvisor.host.api import HostApi
from polyvisor.lab.lab import Lab
from polyvisor.remote.host import RemoteHost
from polyvisor.ssh import execute
from polyvisor.status import VMState

BOOT_S = 300.0


def home_of(api: HostApi) -> str:
    """Where on the host the VMs of `api` are."""
    assert isinstance(api, RemoteHost)
    return str(api.entry.home)


async def on_host(lab: Lab, script: str) -> str:
    """What `script` prints, run by a shell of the host."""
    return (await execute(lab.host, "lab-xen1", ["sh", "-c", script], timeout_s=300)).stdout


async def log(api: HostApi, name: str, *, hypervisor: bool = False) -> str:
    return b"".join([chunk async for chunk in api.log(name, hypervisor=hypervisor)]).decode(errors="replace")


async def says(api: HostApi, name: str, word: str, times: int = 1, within_s: float = BOOT_S) -> None:
    heard = b""
    async with asyncio.timeout(within_s):
        async for chunk in api.log(name, follow=True):
            if (heard := heard + chunk).count(word.encode()) >= times:
                return
    pytest.fail(f"VM '{name}' ended before it said '{word}': {heard[-300:]!r}")


async def typed(api: HostApi, name: str, text: str, answer: str) -> bool:
    """Type `text` on the console; whether it answers."""
    reader, writer = await api.console(name)
    try:
        writer.write(text.encode())
        await writer.drain()
        heard = b""
        async with asyncio.timeout(BOOT_S):
            while answer.encode() not in heard and (data := await reader.read(4096)):
                heard += data
        await asyncio.sleep(0.5)
        return answer.encode() in heard
    finally:
        writer.close()
        await asyncio.sleep(1)


async def until(api: HostApi, name: str, state: VMState) -> str:
    """Wait for `state`; returns the reason."""
    deadline = time.monotonic() + BOOT_S
    while (status := (await api.show(name)).status).state is not state:
        assert time.monotonic() < deadline, status
        await asyncio.sleep(1)
    return status.reason or ""
