"""The verbs of `Host` about snapshots, clones and VMs in files.

What they do is in `snapshotting.py`, `cloning.py` and `bundle.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, cast

from polyvisor.host.snapshots import Snapshot
from polyvisor.operation import Progress, silent
from polyvisor.status import VMStatus

if TYPE_CHECKING:
    from polyvisor.host.host import Host


class Snapshotter:
    """A part of `Host`."""

    @property
    def _here(self) -> Host:
        return cast("Host", self)

    async def snapshot_create(
        self,
        name: str,
        progress: Progress = silent,
        *,
        snapshot: str | None = None,
        memory: bool | None = None,
        description: str = "",
    ) -> Snapshot:
        from polyvisor.host import snapshotting

        return await snapshotting.create(self._here, name, snapshot, memory, description, progress)

    async def snapshot_list(self, name: str) -> list[Snapshot]:
        from polyvisor.host import snapshotting

        return await snapshotting.listed(self._here, name)

    async def snapshot_show(self, name: str, snapshot: str) -> Snapshot:
        from polyvisor.host import snapshotting

        return await snapshotting.show(self._here, name, snapshot)

    async def snapshot_revert(
        self, name: str, snapshot: str, progress: Progress = silent, *, force: bool = False
    ) -> VMStatus:
        from polyvisor.host import snapshotting

        await snapshotting.revert(self._here, name, snapshot, force, progress)
        return (await self._here.show(name)).status

    async def snapshot_remove(self, name: str, snapshot: str, progress: Progress = silent) -> None:
        from polyvisor.host import snapshotting

        await snapshotting.remove(self._here, name, snapshot, progress)

    async def clone(
        self, name: str, new_name: str, progress: Progress = silent, *, snapshot: str | None = None, full: bool = False
    ) -> VMStatus:
        from polyvisor.host import cloning

        await cloning.clone(self._here, name, new_name, snapshot, full, progress)
        return (await self._here.show(new_name)).status

    async def vm_export(self, name: str) -> AsyncGenerator[bytes]:
        from polyvisor.host import bundle

        async with contextlib.aclosing(bundle.exported(self._here, name)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def vm_import(self, source: str, *, name: str | None = None, progress: Progress = silent) -> VMStatus:
        from polyvisor.host import bundle

        made = await bundle.take_in(self._here, source, name, progress)
        return (await self._here.show(made)).status
