"""Events: the changes between one look at the VMs and the next.

There is no daemon that could miss one, or lose them; what came and went between two looks is not seen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from polyvisor.status import Event, VMStatus

if TYPE_CHECKING:
    from polyvisor.host.api import HostApi

PERIOD_S = 0.5


async def changes(host: HostApi, names: Sequence[str], period_s: float = PERIOD_S) -> AsyncIterator[Event]:
    """Changes of the VMs `names` (all, where that is empty), looked for every `period_s` seconds."""
    before = await _look(host, names)
    while True:
        await asyncio.sleep(period_s)
        now = await _look(host, names)
        for event in compared(before, now, time.time()):
            yield event
        before = now


async def _look(host: HostApi, names: Sequence[str]) -> dict[str, VMStatus]:
    return {status.name: status for status in await host.vms() if not names or status.name in names}


def compared(before: Mapping[str, VMStatus], now: Mapping[str, VMStatus], at: float) -> Iterator[Event]:
    """What happened between two looks, by name of VM."""
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old is not None and (new is None or new.id != old.id):
            yield Event(at=at, vm=name, event="removed")
            old = None
        if new is None:
            continue
        if old is None:
            yield Event(at=at, vm=name, event="created")
        if old is None or old.state is not new.state:
            yield Event(at=at, vm=name, event=new.state.value, detail=new.reason)
        elif old.started_at != new.started_at:
            yield Event(at=at, vm=name, event="restarted")
        elif old.forwards != new.forwards:
            yield Event(at=at, vm=name, event="forwards-changed", detail=", ".join(map(str, new.forwards)))
