"""Polyvisor as one file: a zip application that any Python of a host can run.

It holds this package and the pure-Python packages that it depends on, named by the hash of its content. A host keeps it,
unpacked, under that name: Python compiles modules of a directory once, those of a zip file at every start. Whoever carries a
changed Polyvisor carries it under another name, so the two sides of a connection are always of the same version.

Format: https://docs.python.org/3/library/zipapp.html
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from polyvisor.errors import Unavailable
from polyvisor.files import make_directory, storage_errors, write_atomic

PACKAGES = ("polyvisor", "qemu", "yaml", "pycdlib")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SUFFIXES_LEFT_OUT = (".pyc", ".so", ".pyi")


def archive(cache: Path) -> Path:
    """The zip application of this Polyvisor, named by its content; made in directory `cache` where it is not there.

    Raises Unavailable where a package that belongs to it is not installed.
    """
    files = {"__main__.py": Path(__file__).with_name("data") / "main", **dict(_files())}
    # Sizes and times tell whether anything has changed since, without reading it.
    stats = "".join(f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}\n" for name, path in sorted(files.items()))
    link = cache / f"{hashlib.sha256(stats.encode()).hexdigest()[:32]}.name"
    with storage_errors("making the application for hosts"):
        make_directory(cache, 0o700)
        if link.exists() and (path := cache / link.read_text()).exists():
            return path
        content = build(files)
        path = cache / f"polyvisor-{hashlib.sha256(content).hexdigest()[:32]}.pyz"
        write_atomic(path, content, mode=0o644)
        for old in cache.glob("*.name"):
            old.unlink(missing_ok=True)
        write_atomic(link, path.name)
        return path


def build(files: dict[str, Path]) -> bytes:
    """A zip application of `files`: the same bytes for the same content, wherever and whenever it is made."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        for name, path in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            made.writestr(entry, path.read_bytes())
    return buffer.getvalue()


def _files() -> Iterator[tuple[str, Path]]:
    """Every file of the packages, by its path in the archive."""
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise Unavailable(f"the Python package '{package}' is not installed", hint="install Polyvisor anew")
        for location in map(Path, spec.submodule_search_locations):
            for path in location.rglob("*"):
                if path.is_file() and path.suffix not in _SUFFIXES_LEFT_OUT:
                    yield str(Path(package, path.relative_to(location))), path
