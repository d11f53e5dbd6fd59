"""The verbs of `RemoteHost` about snapshots, clones and VMs in files."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import NoneType
from typing import TYPE_CHECKING, cast

from polyvisor.host.snapshots import Snapshot
from polyvisor.operation import Progress, silent
from polyvisor.status import VMStatus

if TYPE_CHECKING:
    from polyvisor.remote.host import RemoteHost

_CHUNK = 1 << 20


class RemoteSnapshots:
    """A part of `RemoteHost`."""

    @property
    def _there(self) -> RemoteHost:
        return cast("RemoteHost", self)

    async def snapshot_create(
        self,
        name: str,
        progress: Progress = silent,
        *,
        snapshot: str | None = None,
        memory: bool | None = None,
        description: str = "",
    ) -> Snapshot:
        given = {"name": name, "snapshot": snapshot, "memory": memory, "description": description}
        return await self._there._call(Snapshot, "snapshot_create", progress, **given)

    async def snapshot_list(self, name: str) -> list[Snapshot]:
        return await self._there._call(list[Snapshot], "snapshot_list", name=name)

    async def snapshot_show(self, name: str, snapshot: str) -> Snapshot:
        return await self._there._call(Snapshot, "snapshot_show", name=name, snapshot=snapshot)

    async def snapshot_revert(
        self, name: str, snapshot: str, progress: Progress = silent, *, force: bool = False
    ) -> VMStatus:
        return await self._there._call(VMStatus, "snapshot_revert", progress, name=name, snapshot=snapshot, force=force)

    async def snapshot_remove(self, name: str, snapshot: str, progress: Progress = silent) -> None:
        await self._there._call(NoneType, "snapshot_remove", progress, name=name, snapshot=snapshot)

    async def clone(
        self, name: str, new_name: str, progress: Progress = silent, *, snapshot: str | None = None, full: bool = False
    ) -> VMStatus:
        given = {"name": name, "new_name": new_name, "snapshot": snapshot, "full": full}
        return await self._there._call(VMStatus, "clone", progress, **given)

    async def vm_export(self, name: str) -> AsyncGenerator[bytes]:
        async with self._there._stream("vm_export", name=name) as stream:
            while chunk := await stream.reader.read(_CHUNK):
                yield chunk
            await stream.check_end()

    async def vm_import(self, source: str, *, name: str | None = None, progress: Progress = silent) -> VMStatus:
        from polyvisor.host.bundle import check_before_upload

        path = check_before_upload(source, name)
        upload = await self._there._again("vm_import", lambda _: self._there._upload(path, progress), progress)
        return await self._there._call(VMStatus, "vm_import", progress, source=upload, name=name)
