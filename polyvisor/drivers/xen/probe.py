"""What a Xen host offers, by what its own toolstack says."""

from __future__ import annotations

from polyvisor.drivers.xen import xl
from polyvisor.drivers.xen.dom0 import is_dom0
from polyvisor.drivers.xen.loaders import missing_loaders
from polyvisor.errors import PolyvisorError
from polyvisor.network.bridge import missing_programs
from polyvisor.status import Accelerator, Capabilities

_AT_A_START = "VMs that run on Xen can't get or lose {what} yet"
_NO_DISK_LIMITS = "xl can't limit what Xen's QEMU does for a guest's disks"
MISSING = {
    "fork": "Xen can't start a guest from another one's memory by way of its tools",
    "snapshot-live": "disks of VMs that run on Xen can't be frozen: stop the VM first",
    "snapshot-memory": "snapshots with memory are not there yet for VMs of Xen",
    "uefi": "UEFI firmware for guests of Xen is not there yet",
    "disk-add": _AT_A_START.format(what="disks"),
    "disk-remove": _AT_A_START.format(what="disks"),
    "disk-grow": "disks of VMs that run on Xen can't grow yet",
    "disk-iops-limit": _NO_DISK_LIMITS,
    "disk-rate-limit-mib": _NO_DISK_LIMITS,
    "nic-add": _AT_A_START.format(what="network cards"),
    "nic-remove": _AT_A_START.format(what="network cards"),
    "nested": "guests of Xen can't run VMs",
    "vcpus-remove-hvm": "Xen's QEMU plugs vCPUs in and does not pull them out of an HVM guest",
}


async def probe() -> Capabilities | None:
    """The capabilities of the Xen below this system; None where it is no dom0."""
    if not is_dom0():
        return None
    try:
        info = await xl.info()
    except PolyvisorError as error:
        reason = f"Xen runs here, but does not answer: {error.message}" + (f" ({error.hint})" if error.hint else "")
        absent = Accelerator(name="xen", available=False, reason=reason)
        return Capabilities(driver="xen", version=None, accelerators=(absent,), modes=(), missing={"start": reason})
    return Capabilities(
        driver="xen",
        version=info.version,
        accelerators=(
            Accelerator(name="xen", available=True, reason=f"virt_caps: {' '.join(info.virt_caps) or 'none'}"),
        ),
        modes=info.modes,
        missing={**MISSING, **xl.missing_modes(info.modes), **missing_loaders(), **_networks()},
        memory_mib=info.total_memory_mib,
        cpus=f"0-{info.cpus - 1}",
    )


def _networks() -> dict[str, str]:
    reason = missing_programs()
    return {"user": reason, "private": reason} if reason else {}
