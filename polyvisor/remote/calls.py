"""Calls that change something are done once, also when the connection is lost and the call is sent again.

Each such call carries a key, chosen by the caller. Its file `<home>/calls/<key>` is locked while the call is under way and
holds what came of it afterwards, so that the same call sent again waits, and gets the same answer. (The idea is that of
the HTTP header Idempotency-Key: draft-ietf-httpapi-idempotency-key-header.)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from polyvisor.errors import InvalidInput, WrongState
from polyvisor.files import make_directory, storage_errors, take_flock
from polyvisor.home import Home

KEPT_S = 24 * 3600.0
_KEY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")


class Calls:
    """The calls of a home that have been made in the last day."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.directory = home.path / "calls"

    async def once(
        self, key: str, verb: str, work: Callable[[], Awaitable[dict[str, Any]]], *, repeatable: bool
    ) -> dict[str, Any]:
        """The outcome of the call `key`: that of `work`, or of an earlier call with this key.

        Raises WrongState where an earlier one was cut short (its process was killed) and the verb is not `repeatable`.
        """
        if not _KEY.match(key):
            raise InvalidInput("key", key, "is not the key of a call", hint="use a UUID")
        async with self._locked(key) as fd:
            lines = os.pread(fd, 64 << 20, 0).split(b"\n")
            if (
                len(lines) > 2
            ):  # the last one, after a line break, is empty: a line without one was not written to its end
                outcome: dict[str, Any] = json.loads(lines[1])
                return outcome
            if len(lines) == 2 and not repeatable:
                raise WrongState(
                    f"'{verb}' was cut short on the host, and nobody knows how far it came",
                    hint="look at what is there (polyvisor ls), then repeat the command if need be",
                )
            begun = lines[0] if len(lines) == 2 else json.dumps({"verb": verb, "pid": os.getpid()}).encode()
            self._write(fd, begun, 0)
            outcome = await work()
            self._write(fd, json.dumps(outcome).encode(), len(begun) + 1)
            return outcome

    def sweep(self) -> None:
        """Forget calls of which nobody will ask again."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.directory):
                if time.time() - entry.stat().st_mtime > KEPT_S:
                    Path(entry.path).unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def _locked(self, key: str) -> AsyncIterator[int]:
        with storage_errors("noting the call"):
            self.home.prepare()
            make_directory(self.directory, 0o700)
            fd = os.open(self.directory / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await take_flock(fd)
            yield fd
        finally:
            os.close(fd)

    def _write(self, fd: int, line: bytes, offset: int) -> None:
        """Write a line; one that is cut short lacks its line break. Nothing before it is touched."""
        line += b"\n"
        with storage_errors("noting the call"):
            done = 0
            while done < len(line):  # a disk that fills up takes a part first
                done += os.pwrite(fd, line[done:], offset + done)
            os.fdatasync(fd)
