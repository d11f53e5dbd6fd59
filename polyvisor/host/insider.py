"""The verbs of `Host` that lead into a VM, or look closely; what they do is in `inside.py`, `identity.py`, `memory.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, cast

from polyvisor.host.api import SSHTarget
from polyvisor.operation import Progress, silent
from polyvisor.status import MemoryUse
from polyvisor.waiting import event_loop

if TYPE_CHECKING:
    from polyvisor.host.host import Host


class Insider:
    """A part of `Host`."""

    @property
    def _inside(self) -> Host:
        return cast("Host", self)

    async def console(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        from polyvisor.host.inside import open_console

        vm = self._inside.store.get(name)
        await self._inside._require_alive(vm, "give a console")
        return await open_console(vm, self._inside.drivers.of(vm).console)

    async def log(self, name: str, *, hypervisor: bool = False, follow: bool = False) -> AsyncIterator[bytes]:
        from polyvisor.host.inside import read_log

        vm = self._inside.store.get(name)
        async for chunk in read_log(vm, vm.log if hypervisor else vm.console_log, follow):
            yield chunk

    async def ssh_target(self, name: str) -> SSHTarget:
        from polyvisor.host.inside import ssh_target

        vm = self._inside.store.get(name)
        status = await self._inside._status(vm)
        return await ssh_target(vm, status, self._inside.images.store.by_id(vm.record.image_id), self._inside.home.keys)

    async def wait_for_ssh(self, name: str, *, timeout_s: float, progress: Progress = silent) -> SSHTarget:
        from polyvisor.host.inside import until_ssh_answers

        await event_loop()
        target, vm = await self.ssh_target(name), self._inside.store.get(name)
        if vm.is_renewing():
            from polyvisor.host.identity import until_renewed

            began = time.monotonic()
            await until_renewed(vm, timeout_s, progress)
            timeout_s -= time.monotonic() - began
        await until_ssh_answers(vm, target, timeout_s, progress)
        return target

    async def memory_use(self, names: Sequence[str] = ()) -> dict[str, MemoryUse]:
        from polyvisor.host.memory import memory_use

        return await memory_use(self._inside, names)
