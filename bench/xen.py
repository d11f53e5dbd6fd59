"""What Polyvisor adds to Xen's own toolstack, on a Xen host of the lab: to start a guest, to list fifty, and how many fit.

All of it happens on the host, whose processor is emulated where this machine has none that nests: there, Python alone takes
some twenty times as long to start as here. So a start is measured as a whole command, and over a
connection that is open already.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from statistics import median

from bench.harness import Failed, Finding, Report, call, difference, ratio, since, take_turns, tell, typical
from bench.product import Polyvisor
from polyvisor.errors import PolyvisorError
from polyvisor.home import Home
from polyvisor.host.api import HostApi
from polyvisor.host.host import Host
from polyvisor.lab.lab import Lab
from polyvisor.remote.host import RemoteHost
from polyvisor.spec.vm import Mode, VMSpec

TITLE = "Xen's toolstack (lab-xen1, guests in mode pv)"
COMMAND, CALL, PEER = "polyvisor start", "start, over an open connection", "xl create"
LISTED, LIMIT_MS = 50, 1000
MEMORY_MIB, GUEST_MIB = 8 * 1024, 96  # tiny in mode pv: its kernel, unpacked, leaves no room in 64
_HOST = "lab-xen1"
_TIMEOUT_S = 1800.0


class XenHost:
    """The lab's Xen host, brought up if need be, with one VM; commands run on it as root."""

    def __init__(self, polyvisor: Polyvisor, scratch: Home) -> None:
        self.polyvisor = polyvisor
        memory = ("-m", f"{MEMORY_MIB}M")
        call(polyvisor.argv("lab", "up", _HOST, *memory), timeout_s=_TIMEOUT_S, env=polyvisor.environment)
        self._entry = Lab(Host(polyvisor.home)).hosts.get(_HOST)
        self._scratch = scratch

    @contextlib.asynccontextmanager
    async def api(self) -> AsyncIterator[HostApi]:
        remote = RemoteHost(self._entry, self._scratch)
        try:
            yield remote
        finally:
            await remote.close()

    def shell(self, script: str) -> str:
        argv = self.polyvisor.argv("lab", "ssh", _HOST, "--", script)
        return call(argv, timeout_s=_TIMEOUT_S, env=self.polyvisor.environment)

    def timed(self, command: str, afterwards: str = "true") -> dict[str, float]:
        """Milliseconds of `command`, by the host's clock. `$app` is Polyvisor as the connection has brought it there."""
        app = 'app="python3 $(ls -td ~/.cache/polyvisor/polyvisor-*.pyz | head -n 1)"'
        script = (
            f"a=$(date +%s%N); {command} >/dev/null && b=$(date +%s%N) && {afterwards} >/dev/null && echo $((b - a))"
        )
        return {"ms": int(self.shell(f"{app}; {script}")) / 1e6}


def bench_xen(polyvisor: Polyvisor, scratch: Home, rounds: int) -> Report:
    """Starts in turns; then guests one after the other until no more fit, and a list of fifty of them."""
    report = Report(TITLE)
    tell(f"{TITLE}: bringing the host up")
    host = XenHost(polyvisor, scratch)
    asyncio.run(_clear(host))
    asyncio.run(_prepare(host))
    place = "/var/lib/polyvisor/vms/bench"
    report.measures = take_turns(
        {
            COMMAND: lambda: host.timed("$app start bench", "$app kill bench"),
            CALL: lambda: asyncio.run(_started(host)),
            PEER: lambda: host.timed(f"cd {place} && xl create xl.cfg", "xl destroy bench"),
        },
        rounds,
        TITLE,
    )
    fitting, listing = asyncio.run(_many(host))
    report.findings = [
        Finding(f"{COMMAND}: longer than {PEER} by", difference(report.measures, "ms", COMMAND, PEER), "ms"),
        Finding(f"{CALL}: as many times as long as {PEER}", ratio(report.measures, "ms", CALL, PEER), "×"),
        Finding(
            f"{CALL}: longer than {PEER} by",
            difference(report.measures, "ms", CALL, PEER),
            "ms",
            100 + typical(report.measures, PEER, "ms") / 10,
        ),
        Finding(f"polyvisor ls with {LISTED} guests", listing, "ms", LIMIT_MS),
        Finding(
            f"guests of {GUEST_MIB} MiB that fit into {MEMORY_MIB} MiB (dom0 has 2048)", fitting, "", 10, at_most=False
        ),
    ]
    asyncio.run(_clear(host))
    return report


async def _prepare(host: XenHost) -> None:
    """A VM that was started once, so that there is a configuration for xl."""
    async with host.api() as api:
        await api.run(VMSpec(name="bench", image="tiny", mode=Mode.PV))
        await api.kill("bench")


async def _clear(host: XenHost) -> None:
    async with host.api() as api:
        for status in await api.vms():
            await api.remove(status.name, force=True)


async def _started(host: XenHost) -> dict[str, float]:
    async with host.api() as api:
        await api.show("bench")  # which opens the connection
        began = time.perf_counter()
        await api.start("bench")
        elapsed = since(began)
        await api.kill("bench")
    return {"ms": elapsed}


async def _many(host: XenHost) -> tuple[float, float]:
    """How many guests fit; and how long `ls` takes with fifty, in milliseconds. Raises Failed where fewer fit."""
    count, listing = 0, 0.0
    async with host.api() as api:
        while True:
            tell(f"{TITLE}: guest {count + 1}")
            try:
                await api.run(VMSpec(name=f"g{count}", image="tiny", mode=Mode.PV, memory_mib=GUEST_MIB))
            except PolyvisorError as error:
                if "memory" not in error.message:
                    raise Failed(f"guest {count + 1}: {error.message}") from error
                break
            count += 1
            if count == LISTED:
                listing = median([host.timed("$app ls")["ms"] for _ in range(5)])
    if count < LISTED:
        raise Failed(f"no more than {count} guests fit")
    return count, listing
