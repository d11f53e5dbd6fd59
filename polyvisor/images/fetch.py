"""A file of bounded size over HTTP, into memory: retried, and resumed where the transfer broke off."""

from __future__ import annotations

import http.client
import time
import urllib.error

from polyvisor.errors import DownloadFailed, NotFound
from polyvisor.images.http import Interrupted, open_url, shown_url
from polyvisor.images.worker import in_thread
from polyvisor.operation import Progress, Step, silent

ATTEMPTS = 4
BACKOFF_S = 0.5  # doubled with each attempt
_CHUNK = 256 << 10


async def fetch(url: str, *, limit: int, progress: Progress = silent) -> bytes:
    """The content at `url`, at most `limit` bytes; reports "download" in bytes.

    Raises NotFound where the server has no such file; DownloadFailed after ATTEMPTS attempts, or for a larger file.
    """
    return await in_thread(lambda report: _fetch(url, limit, report), progress)


def _fetch(url: str, limit: int, report: Progress) -> bytes:
    body = bytearray()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _receive(url, body, limit, report)
            return bytes(body)
        except DownloadFailed as error:
            if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code in (404, 410):
                raise NotFound(f"{shown_url(url)}: the server has no such file") from error
            raise
        except (Interrupted, OSError, http.client.HTTPException) as error:
            if attempt == ATTEMPTS:
                hint = "check the network (and http_proxy), or use another mirror"
                raise DownloadFailed(f"{shown_url(url)}: {str(error) or type(error).__name__}", hint=hint) from error
        _pause(BACKOFF_S * 2 ** (attempt - 1), len(body), report)
    raise AssertionError("unreachable")


def _pause(seconds: float, received: int, report: Progress) -> None:
    """Wait, reporting meanwhile: a report is where a caller's cancellation is noticed."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        report(Step("download", received, None, "B"))
        time.sleep(min(left, 0.2))


def _receive(url: str, body: bytearray, limit: int, report: Progress) -> None:
    """Append to `body` what is missing of the file; where the server can't resume, it starts over."""
    with open_url(url, {"Range": f"bytes={len(body)}-"} if body else {}) as response:
        if not _continues(response, len(body)):
            body.clear()
        if response.status not in (200, 206):
            raise Interrupted(f"the server says {response.status}")
        expected = int(response.headers.get("Content-Length") or -1)
        begin = len(body)
        while chunk := response.read(_CHUNK):
            body += chunk
            if len(body) > limit:
                hint = "use another mirror, or mind a proxy in between"
                raise DownloadFailed(f"{shown_url(url)}: it is larger than the {limit} bytes expected", hint=hint)
            report(Step("download", len(body), expected + begin if expected >= 0 else None, "B"))
        if expected >= 0 and len(body) - begin != expected:
            raise Interrupted("the connection broke off")


def _continues(response: http.client.HTTPResponse, at: int) -> bool:
    """Whether the server sends the file from byte `at` (206), rather than from its beginning or not at all."""
    return response.status == 206 and (response.headers.get("Content-Range") or "").startswith(f"bytes {at}-")
