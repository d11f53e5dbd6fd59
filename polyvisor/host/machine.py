"""This machine, as the kernel describes it in /proc."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from polyvisor.errors import Unsupported
from polyvisor.home import Home
from polyvisor.host.plan import check_resources, choose_accelerator, explain_choice
from polyvisor.spec.vm import VMSpec
from polyvisor.status import Capabilities, HostStatus

_ANY = VMSpec(name="any", image="any")


def total_memory_mib() -> int:
    """Memory of this host, in MiB."""
    return _meminfo("MemTotal")


def check_room(spec: VMSpec, memory_mib: int, accelerator: str, drivers: tuple[Capabilities, ...]) -> Capabilities:
    """The driver of `accelerator`, which can give what `spec` asks for; raises InvalidInput, Unsupported."""
    driver = next(each for each in drivers if accelerator in [one.name for one in each.accelerators])
    check_resources(spec, memory_mib, driver, driver.memory_mib or total_memory_mib())
    return driver


def host_status(
    home: Home, drivers: tuple[Capabilities, ...], vms_by_state: dict[str, int], free_mib: int | None = None
) -> HostStatus:
    """The status of this machine; `drivers` is what its drivers found, the preferred first.

    `free_mib` is memory for guests where theirs is not of this system's, as on Xen: the machine's is what Xen says then.
    """
    total_mib = next((each.memory_mib for each in drivers if each.memory_mib), None)
    try:
        chosen = choose_accelerator(_ANY, *drivers)
        hypervisor, reason = chosen.name, explain_choice(chosen, *drivers)
    except Unsupported as error:
        hypervisor, reason = None, error.message
    system = os.uname()
    return HostStatus(
        name=socket.gethostname(),
        kernel=system.release,
        architecture=system.machine,
        cpus=len(os.sched_getaffinity(0)),
        cpu_model=_cpu_model(),
        memory_mib=total_mib or total_memory_mib(),
        memory_free_mib=_meminfo("MemAvailable") if free_mib is None else free_mib,
        home=str(home.path),
        storage_free_mib=_free_mib(home.path),
        hypervisor=hypervisor,
        hypervisor_reason=reason,
        capabilities=drivers,
        vms_by_state=vms_by_state,
    )


def _meminfo(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) // 1024 if match else 0


def _cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else "unknown"


def _free_mib(path: Path) -> int | None:
    try:
        status = os.statvfs(path)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize >> 20
