"""Files that a user of this host has sent, until they are imported: `<home>/cache/uploads/<id>/<name>`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import BinaryIO

from polyvisor.errors import NotFound, PolyvisorError
from polyvisor.files import make_directory, storage_errors
from polyvisor.home import Home

KEPT_S = 24 * 3600.0
_ID = re.compile(r"[0-9a-f]{32}\Z")
_CHUNK = 1 << 20


class Uploads:
    """The uploads of a home."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.directory = home.cache / "uploads"

    def take(self, source: BinaryIO, name: str, size: int) -> str:
        """Keep `size` bytes of `source` as a file that ends in `name`; returns the id that stands for it."""
        upload = uuid.uuid4().hex
        directory = self.directory / upload
        with storage_errors("receiving the upload"):
            self.home.prepare()
            make_directory(directory, 0o700)
            try:
                with (directory / safe_name(name)).open("wb") as file:
                    while (left := size - file.tell()) > 0 and (chunk := source.read(min(left, _CHUNK))):
                        file.write(chunk)
                    if left > 0:
                        raise PolyvisorError(f"the upload broke off, {left} bytes before its end")
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
        return upload

    def find(self, upload: str) -> Path:
        """The file of an upload; raises NotFound."""
        if _ID.match(upload):
            with contextlib.suppress(OSError, StopIteration):
                return next((self.directory / upload).iterdir())
        raise NotFound("there is no such upload", hint="import the file again")

    def forget(self, file: Path) -> None:
        shutil.rmtree(file.parent, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what nobody has imported in a day."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.directory):
                if time.time() - entry.stat().st_mtime > KEPT_S:
                    shutil.rmtree(entry.path, ignore_errors=True)


def safe_name(name: str) -> str:
    """`name` without anything that could lead elsewhere: its end says what is in the file, its beginning is not needed."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-100:].lstrip(".") or "image"
