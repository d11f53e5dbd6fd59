"""Packages from a mirror of Debian's archive, without apt and on any host, vouched for by the archive's keys.

    InRelease  --signature-->  SHA-256 of Packages.xz  -->  SHA-256 of each .deb

What was fetched is kept in `<cache>/debian/<sha256>`, so that it is fetched once; a file is checked again each time it
is used. Without network, the last verified InRelease of the same mirror serves.
"""

from __future__ import annotations

import asyncio
import hashlib
import lzma
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, urlsplit

from polyvisor.errors import DownloadFailed, InvalidInput, NotFound
from polyvisor.files import storage_errors, write_atomic
from polyvisor.images.fetch import fetch
from polyvisor.images.release import Release, verified_release
from polyvisor.images.sources import parse_fields
from polyvisor.operation import Progress, Step, silent
from polyvisor.values import dataclass

MAX_INRELEASE = 4 << 20  # bytes
MAX_PACKAGES = 512 << 20  # bytes, uncompressed
_PARALLEL = 4
_SUITE = re.compile(r"[a-z][a-z0-9-]*\Z")


@dataclass(frozen=True, kw_only=True)
class Package:
    """A binary package as the archive's index describes it; `size` in bytes, `path` from the mirror's root."""

    name: str
    version: str
    path: str
    size: int
    sha256: str
    depends: tuple[str, ...] = ()


class Archive:
    """One suite (component main, one architecture) of a mirror, with its verified index. Made by `open_archive`."""

    def __init__(self, mirror: str, cache: Path, release: Release, index: bytes) -> None:
        self.mirror = mirror
        self.release = release
        self._cache = cache
        self._index = b"\n" + index + b"\n\n"

    def package(self, name: str) -> Package:
        """The package of this name; raises NotFound."""
        at = self._index.find(b"\nPackage: %s\n" % name.encode())
        if at < 0:
            raise NotFound(f"Debian {self.release.codename} has no package '{name}'")
        stanza = self._index[at + 1 : self._index.find(b"\n\n", at + 1) + 1]
        return parse_package(stanza.decode(errors="replace"))

    async def fetch(self, packages: Iterable[Package], progress: Progress = silent) -> dict[str, bytes]:
        """The .deb files of `packages`, by package name; reports "download" in bytes. Raises DownloadFailed."""
        wanted = {package.name: package for package in packages}
        done = dict.fromkeys(wanted, 0)
        total = sum(package.size for package in wanted.values())
        slots = asyncio.Semaphore(_PARALLEL)

        async def get(package: Package) -> bytes:
            def received(step: Step) -> None:
                done[package.name] = step.done
                progress(Step("download", sum(done.values()), total, "B"))

            async with slots:
                urls = [f"{self.mirror}/{quote(package.path, safe='/+:~')}"]
                data = await _cached(self._cache, urls, package.sha256, package.size, received)
            received(Step("download", package.size))
            return data

        try:
            async with asyncio.TaskGroup() as group:
                tasks = {name: group.create_task(get(package)) for name, package in wanted.items()}
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return {name: task.result() for name, task in tasks.items()}


async def open_archive(
    mirror: str,
    suite: str,
    cache: Path,
    *,
    architecture: str = "amd64",
    keyring: Path | None = None,
    progress: Progress = silent,
) -> Archive:
    """The main component of `suite` ("bookworm", "stable") on `mirror` ("http://host/debian").

    Raises InvalidInput for a mirror or suite that can't be one, DownloadFailed, Unavailable (no gpgv), StorageFull.
    """
    mirror = check_mirror(mirror)
    if not _SUITE.match(suite):
        raise InvalidInput("suite", suite, "is not a suite of Debian", hint="use bookworm, for example")
    directory = cache / "debian"
    with storage_errors(f"preparing {directory}"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    base = f"{mirror}/dists/{suite}"
    progress(Step("index"))
    release = await _release(base, suite, directory, keyring)
    path = f"main/binary-{architecture}/Packages.xz"
    if path not in release.files:
        raise DownloadFailed(f"the index of '{suite}' has no {path}", hint="use another suite or mirror")
    digest, size = release.files[path]
    urls = [f"{base}/{path}"]
    if release.by_hash:  # does not change while the mirror is being updated
        urls.insert(0, f"{base}/main/binary-{architecture}/by-hash/SHA256/{digest}")
    data = await _cached(directory, urls, digest, size, lambda step: progress(Step("index", step.done, size, "B")))
    return Archive(mirror, directory, release, await asyncio.to_thread(unpacked, data, path))


def check_mirror(mirror: str) -> str:
    """`mirror` without a slash at its end; raises InvalidInput where it is not an http(s) URL."""
    url = urlsplit(mirror)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        hint = "give a URL such as http://mirror.example.org/debian"
        raise InvalidInput("mirror", mirror, "is not the URL of a mirror", hint=hint)
    return mirror.rstrip("/")


def unpacked(data: bytes, what: str) -> bytes:
    """The text of an xz-compressed index, at most MAX_PACKAGES bytes; raises DownloadFailed."""
    decompressor = lzma.LZMADecompressor(format=lzma.FORMAT_XZ)
    try:
        text = decompressor.decompress(data, MAX_PACKAGES)
    except lzma.LZMAError as error:
        raise DownloadFailed(f"{what} can't be unpacked: {error}", hint="use another mirror") from error
    if not decompressor.eof:
        raise DownloadFailed(f"{what} is truncated or unpacks to too much", hint="use another mirror")
    return text


def parse_package(stanza: str) -> Package:
    """A package from its stanza in Packages; raises DownloadFailed where a field is missing or makes no sense."""
    fields = parse_fields(stanza)
    try:
        package = Package(
            name=fields["Package"],
            version=fields["Version"],
            path=fields["Filename"],
            size=int(fields["Size"]),
            sha256=fields["SHA256"],
            depends=tuple(parse_depends(fields.get("Depends", ""))),
        )
        if not re.fullmatch(r"[0-9a-f]{64}", package.sha256) or ".." in package.path.split("/") or package.size < 0:
            raise ValueError("a field is malformed")
    except (KeyError, ValueError) as error:
        name = fields.get("Package", "?")
        raise DownloadFailed(f"the index entry of '{name}' can't be understood: {error}") from error
    return package


def parse_depends(field: str) -> list[str]:
    """Names in a Depends field, the first of alternatives, without versions and architectures."""
    firsts = (relation.partition("|")[0] for relation in field.split(","))
    return [words[0].partition(":")[0] for first in firsts if (words := first.replace("(", " (").split())]


async def _release(base: str, suite: str, cache: Path, keyring: Path | None) -> Release:
    """The verified InRelease at `base`: fetched, or the last one where the mirror can't be reached."""
    kept = cache / f"InRelease-{hashlib.sha256(base.encode()).hexdigest()[:16]}"
    try:
        signed = await fetch(f"{base}/InRelease", limit=MAX_INRELEASE)
    except NotFound as error:
        hint = "check suite and mirror: old suites move to an archive server"
        raise DownloadFailed(f"{base}: there is no such suite", hint=hint) from error
    except DownloadFailed:
        if not kept.is_file():
            raise
        return await verified_release(kept.read_bytes(), suite, keyring=keyring)
    release = await verified_release(signed, suite, keyring=keyring)
    with storage_errors("caching the archive's index"):
        write_atomic(kept, signed)
    return release


async def _cached(cache: Path, urls: list[str], sha256: str, size: int, progress: Progress) -> bytes:
    """The file with this checksum, from `cache`, else from the first of `urls` that has it."""
    path = cache / sha256
    if path.is_file() and _matches(data := await asyncio.to_thread(path.read_bytes), sha256, size):
        return data
    for url in urls:
        try:
            data = await fetch(url, limit=size, progress=progress)
        except NotFound:
            continue
        if not _matches(data, sha256, size):
            hint = "use another mirror, or mind a proxy in between"
            raise DownloadFailed(f"{url}: it is not what the archive's index promises (SHA-256)", hint=hint)
        with storage_errors(f"caching {url.rpartition('/')[2]}"):
            await asyncio.to_thread(write_atomic, path, data)
        return data
    raise DownloadFailed(
        f"{urls[-1]}: the mirror has no such file", hint="the mirror is being updated: try again later"
    )


def _matches(data: bytes, sha256: str, size: int) -> bool:
    return len(data) == size and hashlib.sha256(data).hexdigest() == sha256
