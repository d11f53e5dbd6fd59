"""What a host by SSH costs: a verb over a connection that is open, and a whole command, beside the same here.

The host is this machine, by an sshd of its own on loopback: what is measured is Polyvisor and SSH, not a network.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.harness import Finding, Report, take_turns, tell, timed, typical
from bench.product import Polyvisor
from polyvisor.home import Home
from polyvisor.host.api import HostApi
from polyvisor.host.host import Host
from polyvisor.remote.host import RemoteHost
from tests.sshd import Server, serving

TITLE = "A host by SSH"
OVER, HERE = "show over an open connection", "show in this process"
LIMIT_MS = 10
CALLS = 20


def bench_remote(polyvisor: Polyvisor, scratch: Path, rounds: int) -> Report:
    """Round trips of `show` for a VM that runs, and `polyvisor ls` with and without --host."""
    report = Report(TITLE)
    (scratch / "sshd").mkdir()
    with serving(scratch / "sshd") as server:
        tell(f"{TITLE}: starting a VM")
        polyvisor("run", "tiny", "--name", "shown", "--wait")
        client = Polyvisor(scratch / "client")
        identity = ("--identity", str(server.identity), "--known-hosts", str(server.known_hosts))
        client("host", "add", "loop", server.entry().url, *identity, "--home", str(polyvisor.home))
        report.measures = take_turns(
            {
                OVER: lambda: {"ms": asyncio.run(_over(server, polyvisor.home, scratch))},
                HERE: lambda: {"ms": asyncio.run(_each(Host(polyvisor.home)))},
                "polyvisor --host loop ls": lambda: {
                    "ms": timed(client.argv("--host", "loop", "ls"), env=client.environment)
                },
                "polyvisor ls": lambda: {"ms": timed(polyvisor.argv("ls"), env=polyvisor.environment)},
            },
            rounds,
            TITLE,
        )
        polyvisor("rm", "--force", "shown")
    report.findings = [Finding(OVER, typical(report.measures, OVER, "ms"), "ms", LIMIT_MS)]
    return report


async def _over(server: Server, home: Path, scratch: Path) -> float:
    remote = RemoteHost(server.entry(home), Home(scratch / "client"))
    try:
        return await _each(remote)
    finally:
        await remote.close()


async def _each(api: HostApi) -> float:
    """Milliseconds of the median call, once the first one has opened what has to be opened."""
    await api.show("shown")
    return sorted([await _timed(lambda: api.show("shown")) for _ in range(CALLS)])[CALLS // 2]


async def _timed(call: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await call()
    return (time.perf_counter() - began) * 1000
