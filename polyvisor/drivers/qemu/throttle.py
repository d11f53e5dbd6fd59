"""How fast the disks of a guest of QEMU are at most. See docs/design/resize.md.

Command: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (block_set_io_throttle); how QEMU counts:
docs/throttle.txt in its sources.
"""

from __future__ import annotations

import re

from polyvisor.drivers.qemu.qmp import Monitor
from polyvisor.spec.resources import Resources

_GROUP = "disks"  # what is in one group shares one budget
_MIB = 1 << 20
# Of a virtio device it is the part behind the PCI device that has the disk: /machine/peripheral/disk0-dev/virtio-backend.
_DISK = re.compile(r"(?:.*/)?disk[0-9]+-dev(?:/|\Z)")


async def throttle(monitor: Monitor, resources: Resources) -> None:
    """Let all disks together have as many requests and MiB a second as `resources` say, or any number. Raises QMPRefused."""
    budget = {"iops": resources.disk_iops_limit or 0, "bps": (resources.disk_rate_limit_mib or 0) * _MIB}
    neither_alone = dict.fromkeys(("iops_rd", "iops_wr", "bps_rd", "bps_wr"), 0)
    for device in await monitor.execute("query-block"):
        if _DISK.match(place := str(device.get("qdev", ""))):
            await monitor.execute("block_set_io_throttle", id=place, group=_GROUP, **budget, **neither_alone)
