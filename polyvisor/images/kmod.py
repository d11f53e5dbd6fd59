"""Choosing kernel modules with what they depend on, and the index files that modprobe(8) reads.

A Debian kernel package holds no `modules.dep`: depmod makes it when the package is installed. Here it is made from what
the modules say of themselves (section .modinfo), for the few that a small initramfs carries.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable, Mapping

from polyvisor.errors import ImageRefused
from polyvisor.images.deb import MAX_FILE
from polyvisor.images.elf import modinfo
from polyvisor.values import dataclass

SUFFIXES = (".ko", ".ko.xz", ".ko.gz")


@dataclass(frozen=True)
class Module:
    """A kernel module, uncompressed, with the modules that it needs directly and the device aliases that it serves."""

    name: str
    data: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.ko"


def module_name(path: str) -> str | None:
    """The name of the module in file `path`, as the kernel spells it (with underscores); None where it is no module."""
    base = path.rpartition("/")[2]
    stem, dot, suffix = base.partition(".")
    return stem.replace("-", "_") if dot and dot + suffix in SUFFIXES else None


def choose(files: Mapping[str, bytes], wanted: Iterable[str], builtin: frozenset[str]) -> list[Module]:
    """The `wanted` modules out of `files` (by path) and all that they depend on, each after what it depends on.

    Modules built into the kernel (`builtin`) are left out. Raises ImageRefused for one that the kernel lacks.
    """
    paths = {name: path for path in files if (name := module_name(path))}
    chosen: dict[str, Module] = {}
    opened: set[str] = set()

    def add(name: str, needed_by: str) -> None:
        name = name.replace("-", "_")
        if name in chosen or name in builtin:
            return
        if name not in paths:
            raise ImageRefused(f"the kernel has no module '{name}', which {needed_by} needs")
        if name in opened:
            raise ImageRefused(f"the kernel's modules need each other in a circle: '{name}'")
        opened.add(name)
        module = load(name, files[paths[name]])
        for dependency in module.depends:
            add(dependency, name)
        chosen[name] = module

    for name in wanted:
        add(name, "the image")
    return list(chosen.values())


def load(name: str, content: bytes) -> Module:
    """The module in `content`, which may be compressed; raises ImageRefused."""
    try:
        data = _uncompressed(content)
        info = modinfo(data)
    except (ValueError, OSError, EOFError, lzma.LZMAError) as error:
        raise ImageRefused(f"kernel module '{name}' can't be read: {error}") from error
    depends = next((value for key, value in info if key == "depends"), "")
    aliases = tuple(value for key, value in info if key == "alias")
    return Module(name, data, tuple(filter(None, depends.split(","))), aliases)


def _uncompressed(content: bytes) -> bytes:
    if content.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(content, MAX_FILE)
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def dep_index(modules: Iterable[Module]) -> str:
    """`modules.dep`: each module's file and all that it needs, to be loaded from the last to the first."""
    modules = list(modules)
    by_name = {module.name: module for module in modules}
    needs: dict[str, list[str]] = {}
    for module in modules:  # `choose` puts what a module needs before it
        direct = [name for dependency in module.depends if (name := dependency.replace("-", "_")) in by_name]
        closure = {name for each in direct for name in (each, *needs[each])}
        needs[module.name] = [other.name for other in reversed(modules) if other.name in closure]
    return "".join(
        f"{module.file}: {' '.join(by_name[name].file for name in needs[module.name])}".rstrip() + "\n"
        for module in modules
    )


def alias_index(modules: Iterable[Module]) -> str:
    """`modules.alias`: the patterns of devices that each module serves."""
    return "".join(f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases)
