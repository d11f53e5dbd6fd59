"""How much work an inspection may take, and how it says that something can't be read."""

from __future__ import annotations

import time
from collections.abc import Callable

MIB = 1 << 20
_MAX_READ = 4 << 30  # bytes of the disk; a Debian takes 60 MiB
_MAX_UNPACKED = 2 << 30  # bytes that come out of decompressors
_MAX_STEPS = 2_000_000  # reads: a structure that leads round in circles costs these rather than bytes
_MAX_SECONDS = 120.0
_TELL_S = 0.2


class Unreadable(Exception):
    """Something in the image can't be read; the text says what and why, in one line. Never leaves the inspection."""


class Missing(Unreadable):
    """There is no file of that name."""


class Spent(Exception):
    """The image takes more work than an honest one: no `Unreadable`, since the whole inspection ends."""


class Budget:
    """What is left of the work that one inspection may take; whoever reads or unpacks says so.

    `alive` is called now and then, and may raise to end the work.
    """

    def __init__(
        self,
        *,
        seconds: float = _MAX_SECONDS,
        read: int = _MAX_READ,
        unpacked: int = _MAX_UNPACKED,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._until = time.monotonic() + seconds
        self._alive = alive
        self._tell_at = 0.0
        self._seconds = seconds
        self._read = read
        self._unpacked = unpacked
        self._steps = _MAX_STEPS

    def read(self, size: int) -> None:
        """Charge a read of `size` bytes; raises Spent."""
        self._read -= size
        self._steps -= 1
        if self._read < 0 or self._steps < 0:
            raise Spent("it makes whoever reads it read far more than a system needs")
        self.check_time()

    def unpack(self, size: int) -> None:
        """Charge `size` bytes that were unpacked; raises Spent."""
        self._unpacked -= size
        if self._unpacked < 0:
            raise Spent("it unpacks to far more than a system needs")
        self.check_time()

    def check_time(self) -> None:
        now = time.monotonic()
        if now > self._tell_at:
            self._tell_at = now + _TELL_S
            self._alive()
        if now > self._until:
            raise Spent(f"reading it takes longer than {self._seconds:.0f} s")
