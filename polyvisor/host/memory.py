"""What VMs occupy of their host's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.status import MemoryUse, VMState, VMStatus

if TYPE_CHECKING:
    from polyvisor.host.host import Host

_KIB = 1024


async def memory_use(host: Host, names: Sequence[str]) -> dict[str, MemoryUse]:
    """See `HostApi.memory_use`."""
    found: dict[str, MemoryUse] = {}
    for status in await host.vms():
        if (not names or status.name in names) and (use := await _of(host, status)) is not None:
            found[status.name] = use
    return found


async def _of(host: Host, status: VMStatus) -> MemoryUse | None:
    if status.state not in (VMState.RUNNING, VMState.PAUSED):
        return None
    vm = host.store.directory(status.name)
    if host.drivers.of(vm) is host.drivers.qemu:
        return of_process(status.pid) if status.pid is not None else None
    given = await host.drivers.of(vm).usage(vm)  # a domain shares nothing
    return MemoryUse(own_mib=given.memory_mib, shared_mib=0.0) if given.memory_mib is not None else None


def of_process(pid: int) -> MemoryUse | None:
    """What a process occupies; None where it has ended, or is another user's. Takes milliseconds for each GiB."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    return parsed(text)


def parsed(text: str) -> MemoryUse | None:
    """What stands in a process's smaps_rollup (proc(5)); None where that is nothing."""
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if rest.endswith("kB"):
            sizes[key] = int(rest.split()[0])
    if "Pss" not in sizes:
        return None
    own = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
    return MemoryUse(own_mib=own / _KIB, shared_mib=max(0, sizes["Pss"] - own) / _KIB)
