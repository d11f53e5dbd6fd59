"""The verbs of `Host` about images; what they do is in `images.py`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, cast

from polyvisor.errors import NotFound
from polyvisor.host.api import Obtainable, StoredImage
from polyvisor.host.images import Images
from polyvisor.host.store import VMStore
from polyvisor.images.image import Image
from polyvisor.operation import Progress, silent

if TYPE_CHECKING:
    from polyvisor.host.host import Host
    from polyvisor.images.inspection.findings import Inspection


class ImageKeeper:
    """A part of `Host`."""

    store: VMStore
    images: Images

    async def image_list(self) -> list[StoredImage]:
        return [self.images.stored(image) for image in self.images.store.all()]

    async def image_show(self, name: str) -> StoredImage:
        return self.images.stored(self.images.store.get(name))

    async def image_inspect(self, name: str, progress: Progress = silent) -> Inspection:
        return await self.images.inspect(name, progress)

    async def image_catalogue(self) -> list[Obtainable]:
        return self.images.obtainable()

    async def image_pull(self, name: str, progress: Progress = silent) -> Image:
        return await self.images.ensure(name, progress)

    async def image_build(self, kind: str, progress: Progress = silent, **options: Any) -> Image:
        return await self.images.build(kind, progress, **options)

    async def image_import(
        self, source: str, *, name: str | None = None, progress: Progress = silent, **options: Any
    ) -> Image:
        return await self.images.import_(source, progress, name=name, **options)

    async def image_export(self, name: str) -> AsyncGenerator[bytes]:
        with contextlib.closing(self.images.export(name)) as chunks:
            for chunk in chunks:
                yield chunk

    async def image_remove(self, name: str) -> None:
        self.images.remove(name, self._users_of)

    def _users_of(self, image: Image) -> list[str]:
        """Names of the VMs, and templates, that stand on `image`."""
        users = []
        for name in self.store.names():
            with contextlib.suppress(NotFound):  # removed since we looked
                if self.store.directory(name).record.image_id == image.id:
                    users.append(name)
        from polyvisor.host import templates

        every = templates.records(cast("Host", self))
        return users + [f"template {each.name}" for each in every if each.record.image_id == image.id]
