"""The verbs of `Host` about disks and network cards. What they do is in `devices.py`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast

from polyvisor.errors import PolyvisorError
from polyvisor.host.store import VMDirectory
from polyvisor.status import DiskStatus, NicStatus

if TYPE_CHECKING:
    from polyvisor.host.host import Host


class DeviceKeeper:
    """A part of `Host`."""

    @property
    def _here(self) -> Host:
        return cast("Host", self)

    async def _tidy_devices(self, vm: VMDirectory) -> None:
        """What a start finds to be done of what has changed while a VM was alive; nothing for most."""
        if vm.record.slots is not None:
            from polyvisor.host.plugging import tidy

            await tidy(self._here, vm)

    async def _settle_devices(self, vm: VMDirectory) -> None:
        """Note what a command did of a VM that is alive, and was killed before it could say so; another verb may do it, too."""
        if vm.record.slots is not None:
            from polyvisor.host.plugging import settle

            with contextlib.suppress(PolyvisorError):
                await settle(self._here, vm)

    async def _require_devices_in_force(self, vm: VMDirectory, verb: str) -> None:
        """Raise WrongState for a VM that is alive with other disks and cards than it is to have."""
        if vm.record.slots is not None and await self._here.drivers.lives(vm):
            from polyvisor.host.plugging import require_in_force

            await require_in_force(self._here, vm, verb)

    async def disk_list(self, name: str) -> list[DiskStatus]:
        from polyvisor.host import devices

        return await devices.list_disks(self._here, self._here.store.get(name))

    async def disk_add(self, name: str, size_gib: int = 1, *, disk: str | None = None) -> list[DiskStatus]:
        from polyvisor.host import devices

        async with self._here._locked(name, "disk") as vm:
            await devices.add_disk(self._here, vm, size_gib, disk)
        return await self.disk_list(name)

    async def disk_grow(self, name: str, disk: str, size_gib: int) -> list[DiskStatus]:
        from polyvisor.host import devices

        async with self._here._locked(name, "disk") as vm:
            await devices.grow_disk(self._here, vm, disk, size_gib)
        return await self.disk_list(name)

    async def disk_remove(self, name: str, disk: str, *, force: bool = False) -> list[DiskStatus]:
        from polyvisor.host import devices

        async with self._here._locked(name, "disk") as vm:
            await devices.remove_disk(self._here, vm, disk, force=force)
        return await self.disk_list(name)

    async def nic_list(self, name: str) -> list[NicStatus]:
        from polyvisor.host import devices

        return await devices.list_nics(self._here, self._here.store.get(name))

    async def nic_add(
        self, name: str, network: str = "user", *, mac: str | None = None, nic: str | None = None
    ) -> list[NicStatus]:
        from polyvisor.host import devices
        from polyvisor.spec.vm import Nic

        async with self._here._locked(name, "nic") as vm:
            await devices.add_nic(self._here, vm, Nic(network=network, mac=mac), nic)
        return await self.nic_list(name)

    async def nic_remove(self, name: str, nic: str) -> list[NicStatus]:
        from polyvisor.host import devices

        async with self._here._locked(name, "nic") as vm:
            await devices.remove_nic(self._here, vm, nic)
        return await self.nic_list(name)
