"""The drivers of this host, and which of them a VM belongs to.

A VM that was started belongs to the driver that its launch record names; a start chooses by the spec and by what the drivers
say of themselves. Where this is no control domain of a Xen, there is QEMU's driver alone, and no look costs anything.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.drivers.base import Driver
from polyvisor.drivers.qemu.driver import QemuDriver
from polyvisor.errors import PolyvisorError
from polyvisor.host.store import VMDirectory
from polyvisor.status import Capabilities

if TYPE_CHECKING:
    from polyvisor.drivers.xen.driver import XenDriver

XEN = "xen"


class Drivers:
    """QEMU's driver, and Xen's where this system is the control domain of a Xen; `cache` keeps results of probes."""

    def __init__(self, cache: Path) -> None:
        self.qemu: Driver = QemuDriver(cache)
        self._capabilities: tuple[Capabilities, ...] | None = None

    @cached_property
    def xen(self) -> XenDriver | None:
        from polyvisor.drivers.xen.dom0 import is_dom0

        if not is_dom0():
            return None
        from polyvisor.drivers.xen.driver import XenDriver

        return XenDriver()

    def of(self, vm: VMDirectory) -> Driver:
        """The driver that VM's last start was by; QEMU's for one that never was started. Raises what reading it raises."""
        if self.xen is None or (launch := vm.launch()) is None or launch.hypervisor != XEN:
            return self.qemu
        return self.xen

    def running(self, accelerator: str) -> Driver:
        """The driver that runs guests on `accelerator`."""
        return self.xen if accelerator == XEN and self.xen else self.qemu

    def may_live(self, vm: VMDirectory) -> bool:
        """Whether it takes a closer look to say that the VM is not alive. Never raises: that look does."""
        if self.xen is None or vm.alive():
            return vm.alive()
        try:
            return self.of(vm) is self.xen and not self.xen.settled(vm)
        except PolyvisorError:
            return False

    async def lives(self, vm: VMDirectory) -> bool:
        """Whether the VM is alive, also where every process that held its lock was killed and its domain was not."""
        driver = self.of(vm)
        return vm.alive() or (driver is self.xen and await self.xen.lives(vm))

    async def end(self, vm: VMDirectory) -> None:
        """End a VM that is alive; of one that has ended by itself, take back what Xen's driver had given it of this host."""
        driver = self.of(vm)
        if vm.alive() or driver is self.xen:
            await driver.kill(vm)

    async def free_memory_mib(self) -> int | None:
        """Memory that guests can have beside this system's own; None where theirs is of this system's."""
        return await self.xen.free_memory_mib() if self.xen else None

    async def capabilities(self) -> tuple[Capabilities, ...]:
        """What the drivers can do here, the one to be preferred first; probed once."""
        if self._capabilities is None:
            drivers = filter(None, (self.xen, self.qemu))
            self._capabilities = tuple([await driver.probe() for driver in drivers])
        return self._capabilities
