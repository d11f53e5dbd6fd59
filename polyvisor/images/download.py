"""Downloads of large files: resumable, verified, one at a time for each address.

    <cache>/downloads/<hash of the address>/part        what has arrived so far
    <cache>/downloads/<hash of the address>/meta.json   what the server said of the file's version
    <cache>/downloads/<hash of the address>/done        the complete, verified file

Whoever downloads holds a flock(2) on the directory, so that several commands that want one file fetch it once. A part is
continued only where the server vouches (If-Range, RFC 9110 section 13.1.5) that the file is still the same version;
without an entity tag or a date from the server it starts anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

from polyvisor.errors import DownloadFailed, InvalidInput, StorageFull
from polyvisor.files import storage_errors, write_atomic
from polyvisor.images.checksum import Checksum, checksum_of
from polyvisor.images.http import Interrupted, open_url, shown_url
from polyvisor.images.worker import in_thread
from polyvisor.operation import Progress, Step, silent
from polyvisor.values import dataclass

MAX_BYTES = 64 << 30
ATTEMPTS = 5  # without a byte of progress
BACKOFF_S = 0.5  # doubled with each attempt
_MOST_ATTEMPTS = 100
_CHUNK = 1 << 20
_SPARE = 64 << 20  # bytes to leave on the file system
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)\Z")


def is_url(source: str) -> bool:
    """Whether `source` is an address to download from (http or https)."""
    return source.lower().startswith(("http://", "https://"))


async def download(
    url: str,
    target_dir: Path,
    *,
    checksum: Checksum | None = None,
    progress: Progress = silent,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """The complete file at `url`, verified against `checksum`, below `target_dir`.

    Raises InvalidInput, DownloadFailed, StorageFull, NotPermitted. What has arrived stays, to go on from.
    """
    async with held(url, target_dir, progress) as file:
        return await file.fetch(checksum=checksum, progress=progress, max_bytes=max_bytes)


@contextlib.asynccontextmanager
async def held(url: str, target_dir: Path, progress: Progress = silent) -> AsyncIterator[Download]:
    """The download of `url`: nobody else fetches or discards it while the context lasts.

    Waits for another command that has it. Raises InvalidInput, StorageFull, NotPermitted.
    """
    if not is_url(url) or not _host(url):
        raise InvalidInput("url", url, "is not an address to download from", hint="write https://host/path")
    place = _Place(target_dir / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16])
    lock = await _locked(place.directory, progress)
    try:
        yield Download(url, place, lock)
    finally:
        os.close(lock)


class Download:
    """One address, held; see `held`."""

    def __init__(self, url: str, place: _Place, lock: int) -> None:
        self.url = url
        self._place = place
        self._lock = lock

    async def fetch(
        self, *, checksum: Checksum | None = None, progress: Progress = silent, max_bytes: int = MAX_BYTES
    ) -> Path:
        """The complete file; without `checksum`, one that is here already is asked for anew if the server changed it."""
        # The thread has its own hold on the lock: it may outlive a cancelled caller for a moment.
        own = os.dup(self._lock)
        await in_thread(lambda report: _get(self.url, self._place, checksum, max_bytes, report, own), progress)
        return self._place.done

    def discard(self) -> None:
        """Remove what was downloaded, once it is of no more use."""
        shutil.rmtree(self._place.directory, ignore_errors=True)


async def fetch_text(url: str, *, limit: int = 1 << 20, progress: Progress = silent) -> str:
    """A small text file, such as a list of checksums; raises DownloadFailed, also for more than `limit` bytes."""

    def get(report: Progress) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _small(url, limit)
            except Interrupted as error:
                if attempt == ATTEMPTS:
                    raise DownloadFailed(f"{shown_url(url)}: {error}", hint="try again later") from error
                _pause(attempt, report)
        raise AssertionError

    return (await in_thread(get, progress)).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class _Place:
    """The files of one download."""

    directory: Path

    @property
    def part(self) -> Path:
        return self.directory / "part"

    @property
    def done(self) -> Path:
        return self.directory / "done"

    def have(self) -> int:
        """Bytes that have arrived."""
        try:
            return self.part.stat().st_size
        except FileNotFoundError:
            return 0

    def clear(self) -> None:
        for path in (self.part, self.done, self._meta):
            path.unlink(missing_ok=True)

    def version(self) -> dict[str, str]:
        """The validators that the server gave for `part` or `done`; empty where it gave none."""
        try:
            raw = json.loads(self._meta.read_bytes())
            return {key: raw[key] for key in ("ETag", "Last-Modified") if isinstance(raw.get(key), str)}
        except (OSError, ValueError, AttributeError):
            return {}

    def remember(self, response: http.client.HTTPResponse) -> None:
        found = {key: value for key in ("ETag", "Last-Modified") if (value := response.headers.get(key))}
        write_atomic(self._meta, json.dumps(found))

    @property
    def _meta(self) -> Path:
        return self.directory / "meta.json"


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def _locked(directory: Path, progress: Progress) -> int:
    """A file descriptor that holds the lock of `directory`, which exists then."""
    while True:
        with storage_errors("preparing the download"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_ino == directory.stat().st_ino:
                    return fd
                os.close(fd)  # removed meanwhile: lock the new one
                continue
            except BlockingIOError:
                os.close(fd)
            except BaseException:
                os.close(fd)
                raise
        progress(Step("wait for another command that fetches this"))
        await asyncio.sleep(0.2)


def _get(url: str, place: _Place, checksum: Checksum | None, limit: int, report: Progress, lock: int) -> None:
    """Bring `place.done` about; closes `lock` at the end."""
    try:
        if checksum is not None and place.done.exists():
            if _sum(place.done, checksum, report) == checksum:
                return
            place.clear()
        _attempts(url, place, limit, report)
        if checksum is not None:
            _verify(url, place, checksum, report)
    except StorageFull:
        place.clear()  # a full disk is the worse evil
        raise
    finally:
        os.close(lock)


def _attempts(url: str, place: _Place, limit: int, report: Progress) -> None:
    """Receive until the file is complete; attempts without progress are counted, and wait longer each time."""
    vain = 0
    for _ in range(_MOST_ATTEMPTS):
        before = place.have()
        try:
            return _receive(url, place, limit, report)
        except Interrupted as error:
            vain = 1 if place.have() > before else vain + 1
            problem = error
        if vain >= ATTEMPTS:
            break
        _pause(vain, report)
    kept = f"{place.have()} bytes are kept: the same command goes on from there" if place.have() else None
    raise DownloadFailed(f"{shown_url(url)}: {problem}", hint=kept or "check the network, try again later") from problem


def _receive(url: str, place: _Place, limit: int, report: Progress) -> None:
    """One attempt. Raises Interrupted where the connection breaks; what has arrived stays in `place.part`."""
    headers = _conditions(place)
    with open_url(url, headers) as response:
        if response.status == 304:
            return
        have = _start_of(response, place)
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isascii() and length.isdigit() else None
        _check_size(url, place, total, have, limit)
        with storage_errors(f"storing {shown_url(url)}"), place.part.open("r+b" if have else "wb") as file:
            if have == 0:
                place.done.unlink(missing_ok=True)
                place.remember(response)
            file.seek(have)
            while chunk := _piece(response):
                file.write(chunk)
                have += len(chunk)
                if have > (limit if total is None else total):
                    raise DownloadFailed(f"{shown_url(url)}: it is larger than {limit} bytes")
                report(Step("download", have, total, "B"))
            file.flush()
            os.fsync(file.fileno())
        if total is not None and have < total:
            raise Interrupted("the connection broke off")
    with storage_errors(f"storing {shown_url(url)}"):
        place.part.replace(place.done)


def _conditions(place: _Place) -> dict[str, str]:
    """The headers that ask for the rest of the part, or whether the complete file is still current."""
    version = place.version()
    etag = version.get("ETag", "")
    if place.done.exists():
        conditional = {"If-None-Match": etag, "If-Modified-Since": version.get("Last-Modified", "")}
        return {key: value for key, value in conditional.items() if value}
    # A weak tag does not promise equal bytes.
    validator = etag if etag and not etag.startswith("W/") else version.get("Last-Modified", "")
    if (have := place.have()) and validator:
        return {"Range": f"bytes={have}-", "If-Range": validator}
    return {}


def _start_of(response: http.client.HTTPResponse, place: _Place) -> int:
    """From which byte on the server sends: from where the part ends, or 0."""
    if response.status == 206:
        match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
        tag, known = response.headers.get("ETag"), place.version().get("ETag")
        if match and int(match[1]) == place.have() and (tag is None or known is None or tag == known):
            return int(match[1])
    if response.status in (206, 416):
        # The part and the file do not fit together (any more).
        place.clear()
        raise Interrupted("the file has changed on the server")
    return 0


def _check_size(url: str, place: _Place, total: int | None, have: int, limit: int) -> None:
    if total is None:
        return
    if total > limit:
        raise DownloadFailed(f"{shown_url(url)}: it has {total} bytes; at most {limit} are fetched")
    free = shutil.disk_usage(place.directory).free
    if total - have + _SPARE > free:
        raise StorageFull(
            f"{shown_url(url)}: it needs {(total - have) >> 20} MiB, {place.directory} has {free >> 20} MiB left",
            hint="free some space, or set POLYVISOR_HOME to a larger disk",
        )


def _piece(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except TimeoutError as error:
        raise Interrupted("the server stopped sending") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Interrupted("the connection broke off") from error


def _sum(path: Path, checksum: Checksum, report: Progress) -> Checksum:
    with path.open("rb") as file:
        return checksum_of(file, checksum.algorithm, path.stat().st_size, report)


def _verify(url: str, place: _Place, checksum: Checksum, report: Progress) -> None:
    found = _sum(place.done, checksum, report)
    if found != checksum:
        place.clear()
        raise DownloadFailed(
            f"{shown_url(url)}: its {found.algorithm} is {found.hex}, not {checksum.hex}",
            hint="the file was changed on its way, or the checksum belongs to another version; nothing was kept",
        )


def _small(url: str, limit: int) -> bytes:
    with open_url(url, {}) as response:
        data = b""
        while len(data) <= limit and (piece := _piece(response)):
            data += piece
        expected = response.headers.get("Content-Length", "")
        if len(data) > limit:
            raise DownloadFailed(f"{shown_url(url)}: it is larger than {limit} bytes")
        if expected.isascii() and expected.isdigit() and len(data) < int(expected):
            raise Interrupted("the connection broke off")
        return data


def _pause(attempt: int, report: Progress) -> None:
    """Wait before the next attempt; notices when nobody waits for the download any more."""
    end = time.monotonic() + BACKOFF_S * 2 ** (attempt - 1)
    while time.monotonic() < end:
        report(Step("wait to try again"))
        time.sleep(min(0.1, BACKOFF_S))
