"""A web server on loopback that serves files, and misbehaves as it is told."""

from __future__ import annotations

import contextlib
import functools
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import trustme


@functools.cache
def authority() -> trustme.CA:
    """A certificate authority that nobody trusts unless told to."""
    return trustme.CA()


@dataclass
class Page:
    """What one path answers.

    `drop_after`: for each request in turn, close the connection after that many bytes of the body. `pause_s`: wait before
    each block. Without `ranges`, a Range header is ignored; without `length`, the end of the connection ends the body.
    """

    body: bytes = b""
    etag: str | None = '"v1"'
    modified: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    length: bool = True
    drop_after: list[int] = field(default_factory=list)
    fail_first: list[int] = field(default_factory=list)
    pause_s: float = 0.0
    wrong_range: bool = False


@dataclass(frozen=True)
class Request:
    path: str
    range: str | None
    if_range: str | None
    headers: dict[str, str]


class Site:
    """The pages of a server by path, and what was asked of it."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: list[Request] = []
        self.address = ""
        self.open_now = 0
        self.most_open = 0
        self.lock = threading.Lock()

    def add(self, path: str, body: bytes = b"", **options: Any) -> str:
        """Serve `body` at `path`; returns the address."""
        self.pages[path] = Page(body, **options)
        return self.address + path


@contextlib.contextmanager
def serving(*, tls: bool = False) -> Iterator[Site]:
    """A site on a free port of 127.0.0.1."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with site.lock:
                site.requests.append(
                    Request(self.path, self.headers["Range"], self.headers["If-Range"], dict(self.headers.items()))
                )
                site.open_now += 1
                site.most_open = max(site.most_open, site.open_now)
            try:
                _answer(self, site.pages.get(self.path.partition("?")[0]))
            except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
                self.close_connection = True
            finally:
                with site.lock:
                    site.open_now -= 1

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Clients that hang up are part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority().issue_cert("127.0.0.1").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    site.address = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(handler: BaseHTTPRequestHandler, page: Page | None) -> None:
    if page is None or page.fail_first:
        _headers(handler, page.fail_first.pop(0) if page else 404, {"Content-Length": "0"})
        return
    if page.status != 200:
        _headers(handler, page.status, {"Content-Length": "0", **page.headers})
        return
    validators = {"ETag": page.etag, "Last-Modified": page.modified}
    headers = {**page.headers, **{key: value for key, value in validators.items() if value}}
    if page.etag and handler.headers["If-None-Match"] == page.etag:
        _headers(handler, 304, headers)
        return
    start = _start(handler, page)
    body = page.body[start:]
    if start:
        first = start + 1 if page.wrong_range else start
        headers["Content-Range"] = f"bytes {first}-{len(page.body) - 1}/{len(page.body)}"
    if page.length:
        headers["Content-Length"] = str(len(body))
    else:
        handler.close_connection = True
    _headers(handler, 206 if start else 200, headers)
    drop = page.drop_after.pop(0) if page.drop_after else None
    for position in range(0, len(body) if drop is None else min(drop, len(body)), 16384):
        if page.pause_s:
            time.sleep(page.pause_s)
        handler.wfile.write(body[position : position + 16384][: None if drop is None else drop - position])
        handler.wfile.flush()
    if drop is not None:
        handler.close_connection = True


def _start(handler: BaseHTTPRequestHandler, page: Page) -> int:
    """From which byte on to send: If-Range decides whether Range counts (RFC 9110)."""
    wanted = handler.headers["Range"]
    if not wanted or not page.ranges:
        return 0
    condition = handler.headers["If-Range"]
    if condition is not None and condition not in (page.etag, page.modified):
        return 0
    return int(wanted.removeprefix("bytes=").removesuffix("-"))


def _headers(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for key, value in headers.items():
        handler.send_header(key, value)
    handler.end_headers()
