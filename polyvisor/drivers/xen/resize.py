"""vCPUs, memory and CPU shares of a domain of Xen while it runs, by `xl vcpu-set`, `mem-set`, `sched-credit2` and `vcpu-pin`.

The first two only tell the guest, by xenstore, what it is to have, and return: so what it has is asked until it is that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable

from polyvisor.drivers.xen import xl
from polyvisor.drivers.xen.config import xen_cap, xen_weight
from polyvisor.drivers.xen.listing import Domain
from polyvisor.errors import PolyvisorError, TimedOut
from polyvisor.spec.resources import Resources
from polyvisor.waiting import pause

PATIENCE_S = 30.0  # without any progress
SETTLED_S = 1.0
# What `xl list` shows as memory is rounded, and an HVM guest's video memory (8 MiB) is counted now and then.
SLACK_MIB = 10
_POLL_S = 0.1

Find = Callable[[], Awaitable[Domain]]


async def set_vcpus(find: Find, count: int) -> None:
    """Let a domain have `count` vCPUs online; raises TimedOut where its guest does not take part, ProcessFailed."""
    domain = await find()
    if domain.vcpus == count:
        return
    # Without it xl refuses more than the host has, which a domain may very well be started with.
    words = ("vcpu-set", "--ignore-host", str(domain.id))
    await xl.xl(*words, str(count))
    await _until(find, lambda d: d.vcpus, count, 0, "vCPUs", (*words, str(domain.vcpus)))


async def set_memory(find: Find, memory_mib: int, *, wait: bool = True) -> None:
    """Let a domain have `memory_mib`; raises TimedOut where its guest comes to less, ProcessFailed where Xen has less."""
    domain = await find()
    await xl.xl("mem-set", str(domain.id), f"{memory_mib}m")
    back = ("mem-set", str(domain.id), f"{domain.memory_mib}m")
    if wait:
        await _until(find, lambda d: d.memory_mib, memory_mib, SLACK_MIB, "MiB", back)


async def _until(
    find: Find, has: Callable[[Domain], int], wanted: int, slack: int, unit: str, back: tuple[str, ...]
) -> None:
    """Wait for as long as the guest comes nearer; what it was told is taken `back` where it does not get there."""
    try:
        value, since = has(await find()), time.monotonic()
        while abs(value - wanted) > slack or (value != wanted and time.monotonic() - since < SETTLED_S):
            if (now := has(await find())) != value:
                value, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE_S:
                hint = "let it boot to its end; or ask for what it can reach"
                raise TimedOut(f"its guest came to {value} {unit} instead of {wanted}", hint=hint)
            await pause(_POLL_S)
    except BaseException:
        with contextlib.suppress(PolyvisorError):
            await xl.xl(*back)
        raise


async def set_scheduling(domain: int, resources: Resources) -> None:
    """Weight, limit and affinity of a domain, all at once: what is as it was stays."""
    weight, cap = xen_weight(resources.cpu_weight), xen_cap(resources)
    await xl.xl("sched-credit2", "-d", str(domain), "-w", str(weight), "-c", str(cap))
    await xl.xl("vcpu-pin", str(domain), "all", resources.cpu_affinity)
