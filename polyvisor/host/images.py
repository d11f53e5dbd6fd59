"""Images as a host offers them: those in its store, those that it can build, and those of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from polyvisor.errors import InvalidInput, NotFound
from polyvisor.home import Home
from polyvisor.host.api import Obtainable, StoredImage
from polyvisor.images.image import Image, Seed
from polyvisor.images.store import ImageStore, check_image_name
from polyvisor.operation import Progress, silent
from polyvisor.waiting import event_loop

if TYPE_CHECKING:
    from polyvisor.images.inspection.findings import Inspection

# What can be built, and the image's name where nobody chooses one (`flavours` knows more, and is imported late).
BUILDABLE = {"tiny": "tiny", "debian": "debian-12", "bench": "bench", "lab-kvm": "lab-kvm", "lab-xen": "lab-xen"}


class Images:
    """The images of a home."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.store = ImageStore(home.images)

    def stored(self, image: Image) -> StoredImage:
        """`image` with what the store knows of it."""
        directory = str(self.store.directory(image))
        return StoredImage(image=image, directory=directory, current=self.store.is_current(image))

    async def inspect(self, name: str, progress: Progress = silent) -> Inspection:
        """What image `name` of the store can boot in; see `inspector.inspect_stored`."""
        from polyvisor.images.inspection.inspector import inspect_stored

        return await inspect_stored(self.store, self.store.get(BUILDABLE.get(name, name)), progress)

    async def inspect_file(self, path: str, progress: Progress = silent, *, format: str | None = None) -> Inspection:  # noqa: A002
        """What the image in a file of this machine can boot in; see `inspector.inspect_file`."""
        from polyvisor.images.inspection.inspector import inspect_file

        self.home.prepare()
        return await inspect_file(self.store, path, progress, format=format)

    def obtainable(self) -> list[Obtainable]:
        """What can be built, and what the catalogue has beside that."""
        from polyvisor.images import catalogue

        built = sorted({"tiny", *BUILDABLE.values()})
        fetched = [entry for entry in catalogue.entries(self.home.path) if entry.name not in built]
        return [
            *(Obtainable(name=name, about="built here from Debian's packages") for name in built),
            *(Obtainable(name=entry.name, about="fetched from its makers") for entry in fetched),
        ]

    async def ensure(self, name: str, progress: Progress = silent) -> Image:
        """The image `name`, built or fetched where the store lacks it; raises NotFound with the nearest names."""
        if image := self.store.find(BUILDABLE.get(check_image_name(name), name)):
            return image
        await event_loop()
        if name in BUILDABLE:
            return await self.build(name, progress)
        from polyvisor.images import catalogue

        self.home.prepare()
        entry = catalogue.find(name, self.home.path)
        if entry is None:
            near = ", ".join(catalogue.suggestions(name, self.home.path))
            hint = (
                f"did you mean {near}?" if near else "polyvisor image ls --all shows those here and those it can fetch"
            )
            raise NotFound(f"there is no image '{name}', neither here nor in the catalogue", hint=hint)
        return await catalogue.fetch(entry, self.store, self.home.cache, progress)

    async def build(
        self,
        kind: str,
        progress: Progress = silent,
        *,
        name: str | None = None,
        suite: str | None = None,
        mirror: str | None = None,
        size_gib: int | None = None,
    ) -> Image:
        """Build image `kind` under `name`; raises InvalidInput for a kind that can't be built."""
        self.home.prepare()
        if kind == "tiny":
            from polyvisor.images.tiny import build_tiny

            if size_gib is not None:
                raise InvalidInput("size", size_gib, "image 'tiny' has no disk", hint="leave --size out")
            options = {"name": name or "tiny", "suite": suite or "bookworm", "mirror": mirror}
            return await build_tiny(self.store, self.home.cache, progress=progress, **options)  # type: ignore[arg-type]
        if kind in BUILDABLE:
            from polyvisor.images.debian import build_debian
            from polyvisor.images.flavours import FLAVOURS

            return await build_debian(
                self.store,
                self.home.cache,
                flavour=FLAVOURS[kind],
                suite=suite or "bookworm",
                name=name,
                size_gib=size_gib,
                mirror=mirror,
                progress=progress,
            )
        raise InvalidInput("image", kind, "is not an image that can be built", hint=f"use {' or '.join(BUILDABLE)}")

    async def import_(
        self,
        source: str,
        progress: Progress = silent,
        *,
        name: str | None = None,
        checksum: str | None = None,
        format: str | None = None,  # noqa: A002
        user: str | None = None,
        seed: str | None = None,
        memory_mib: int | None = None,
    ) -> Image:
        """Take in a disk image, or an exported one; see `importer.import_image`."""
        from polyvisor.images.importer import import_image

        self.home.prepare()
        return await import_image(
            self.store,
            self.home.cache,
            source,
            name=name,
            checksum=checksum,
            format=format,
            user=user,
            seed=None if seed is None else Seed(seed),
            memory_mib=memory_mib,
            progress=progress,
        )

    def export(self, name: str) -> Generator[bytes]:
        """Image `name` as one file, in chunks; see `portable.exported`."""
        from polyvisor.images.portable import exported

        return exported(self.store, self.store.get(name))

    def packing(self, image: Image) -> str | None:
        """How the image's kernel is packed, as `bzimage.packing` names it; None where it has none, or that can't be told."""
        if image.kernel is None:
            return None
        from polyvisor.images.bzimage import packing

        return packing(self.store.file(image, image.kernel))

    def remove(self, name: str, users: Callable[[Image], list[str]]) -> None:
        self.store.remove(name, users)
