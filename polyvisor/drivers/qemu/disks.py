"""New overlays for the disks of a running VM, all at one moment.

Commands: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (blockdev-add, transaction, blockdev-snapshot).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from polyvisor.drivers.base import BootDisk
from polyvisor.drivers.qemu.devices import disk_options
from polyvisor.drivers.qemu.qmp import Monitor
from polyvisor.errors import PolyvisorError

_DEVICE = re.compile(r"(?:\A|/)disk([0-9]+)-dev(?:/|\Z)")


async def switch(monitor: Monitor, disks: Sequence[BootDisk]) -> None:
    """Let the guest write to `disks` from now on, above what it wrote to until now; where it does already, nothing happens.

    Either all of them are switched or none. Raises QMPRefused, QMPLost, TimedOut.
    """
    written = await written_nodes(monitor)
    wanted = {disk.number: disk for disk in disks if written.get(disk.number) != disk.node}
    if not wanted:
        return
    known = {node["node-name"] for node in await monitor.execute("query-named-block-nodes", flat=True)}
    for disk in wanted.values():
        if disk.node not in known:  # by a command that was killed before it came further
            await monitor.execute("blockdev-add", **disk_options(disk, alone=True))
    actions = [
        {"type": "blockdev-snapshot", "data": {"node": written[i], "overlay": disk.node}} for i, disk in wanted.items()
    ]
    await monitor.execute("transaction", actions=actions)


async def forget(monitor: Monitor, disks: Sequence[BootDisk]) -> None:
    """Let QEMU close those of `disks` that nothing has been switched to."""
    known = {node["node-name"] for node in await monitor.execute("query-named-block-nodes", flat=True)}
    for node in {disk.node for disk in disks} & known - set((await written_nodes(monitor)).values()):
        await monitor.execute("blockdev-del", **{"node-name": node})


async def written_nodes(monitor: Monitor) -> dict[int, str]:
    """The block node that each disk of the guest writes to now, by the disk's number."""
    found = {}
    answer: Any = await monitor.execute("query-block")
    for each in answer:
        if (match := _DEVICE.search(str(each.get("qdev", "")))) and (inserted := each.get("inserted")):
            found[int(match[1])] = str(inserted["node-name"])
    if any(not node for node in found.values()):
        raise PolyvisorError("QEMU does not say what its disks are")
    return found
