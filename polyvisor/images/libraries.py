"""Programs out of Debian packages, together with the shared libraries that they need."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from polyvisor.errors import ImageRefused, NotFound
from polyvisor.images.deb import DebFile, read_deb, resolve
from polyvisor.images.elf import needed_libraries
from polyvisor.images.mirror import Archive, Package
from polyvisor.operation import Progress, silent
from polyvisor.values import dataclass

LIBRARIES = "lib/x86_64-linux-gnu"
LOADER = "lib64/ld-linux-x86-64.so.2"
_LOADER_NAME = "ld-linux-x86-64.so.2"


@dataclass(frozen=True)
class Programs:
    """`files`: programs and libraries by their path in the root; `packages`: those that were fetched for libraries."""

    files: dict[str, bytes]
    packages: list[Package]


async def complete(
    archive: Archive, debs: dict[str, bytes], paths: Iterable[str], progress: Progress = silent
) -> Programs:
    """The programs at `paths` in packages `debs` (by package name), with all libraries that they need.

    A library is looked for in the packages that the needing package depends on. Raises NotFound, ImageRefused.
    """
    contents = {name: await asyncio.to_thread(read_deb, deb, _anything, name) for name, deb in debs.items()}
    found = _Libraries(archive, contents, progress)
    files: dict[str, bytes] = {}
    for path in paths:
        owner, program = _find_program(contents, path)
        files[path] = program.data
        await found.add_needs(program.data, owner)
    return Programs({**files, **found.files}, sorted(found.packages.values(), key=lambda package: package.name))


def _find_program(contents: dict[str, dict[str, DebFile]], path: str) -> tuple[str, DebFile]:
    """The package that has the program at `path`, and its file; since Debian 13 all of /bin is in /usr/bin."""
    for name, entries in contents.items():
        if program := resolve(entries, path) or resolve(entries, f"usr/{path}"):
            return name, program
    raise ImageRefused(f"none of the packages {', '.join(contents)} has {path}")


def _anything(path: str) -> bool:
    return not path.startswith("usr/share/")


def _is_library(path: str) -> bool:
    return ".so" in path and "/gconv/" not in path


class _Libraries:
    """Libraries found so far, and the packages opened for them."""

    def __init__(self, archive: Archive, opened: dict[str, dict[str, DebFile]], progress: Progress) -> None:
        self.files: dict[str, bytes] = {}
        self.packages: dict[str, Package] = {}
        self._archive = archive
        self._progress = progress
        self._opened = dict(opened)

    async def add_needs(self, elf: bytes, owner: str) -> None:
        """Add what `elf`, of package `owner`, needs, and what that needs."""
        try:
            names = needed_libraries(elf)
        except ValueError as error:
            raise ImageRefused(f"a program or library of {owner} can't be read: {error}") from error
        for name in names:
            path = LOADER if name == _LOADER_NAME else f"{LIBRARIES}/{name}"
            if path not in self.files:
                package, library = await self._find(name, owner)
                self.files[path] = library.data
                await self.add_needs(library.data, package)
        if names:
            await self._add_loader()

    async def _add_loader(self) -> None:
        """Dynamic programs name the loader by its path, not as a library that they need."""
        if LOADER not in self.files:
            _, loader = await self._find(_LOADER_NAME, "libc6")
            self.files[LOADER] = loader.data

    async def _find(self, name: str, owner: str) -> tuple[str, DebFile]:
        """The package and file of library `name`, which package `owner` needs; raises ImageRefused."""
        for package in self._candidates(name, owner):
            if package not in self._opened:
                await self._open(package)
            for path in self._opened.get(package, {}):
                file = resolve(self._opened[package], path) if path.endswith("/" + name) else None
                if file is not None:
                    return package, file
        raise ImageRefused(f"no package that {owner} depends on has the library {name}")

    def _candidates(self, name: str, owner: str) -> list[str]:
        """Packages to look in: those already open, then the owner's dependencies, the ones named alike first."""
        stem = name.partition(".so")[0].lower()
        depends = self._archive.package(owner).depends
        return [*self._opened, *sorted(depends, key=lambda each: not each.startswith(stem))]

    async def _open(self, name: str) -> None:
        try:
            package = self._archive.package(name)
        except NotFound:
            return  # a virtual package: another one provides it
        debs = await self._archive.fetch([package], self._progress)
        self.packages[name] = package
        self._opened[name] = await asyncio.to_thread(read_deb, debs[name], _is_library, name)
