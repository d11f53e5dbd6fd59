"""What the readers of file systems offer: files by path, as the system on the disk sees them."""

from __future__ import annotations

from typing import Protocol

from polyvisor.images.inspection.budget import Missing, Unreadable

MAX_TEXT = 1 << 20
MAX_LINKS = 40  # symbolic links followed for one path, as Linux does
MAX_PARTS = 512
MAX_DIRECTORY = 8 << 20
MAX_NAMES = 100_000


class Files(Protocol):
    """A file system. Its methods raise Missing and Unreadable; paths are absolute."""

    kind: str
    label: str | None
    uuid: str | None
    note: str | None

    def names(self, path: str) -> list[str]:
        """The names in a directory."""

    def read(self, path: str, limit: int = MAX_TEXT) -> bytes:
        """A file's content; Unreadable where it is more than `limit` bytes."""

    def exists(self, path: str) -> bool:
        """Whether the path leads to anything."""

    def canonical(self, path: str) -> str:
        """The path without symbolic links."""


def text(files: Files, path: str) -> str | None:
    """A file as text; None where it is not there or can't be read."""
    try:
        return files.read(path).decode(errors="replace")
    except Unreadable:
        return None


def listing(files: Files, path: str) -> list[str]:
    """The names in a directory, in order; none where it is not there or can't be read."""
    try:
        return sorted(files.names(path))
    except Unreadable:
        return []


def too_large(what: str, size: int, limit: int) -> Unreadable:
    return Unreadable(f"{what} has {size} bytes, more than the {limit} that are read")


def missing(path: str) -> Missing:
    return Missing(f"there is no {path}")
