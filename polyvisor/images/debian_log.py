"""What a running Debian build says, as progress; and, where it fails, why."""

from __future__ import annotations

import re
from collections import deque

from polyvisor.operation import Progress, Step

_NEW = re.compile(r"\d+ upgraded, (\d+) newly installed")
_CAUSES = ("E: ", "dpkg: error", "mke2fs: ", "grub-mkimage: error")


class LogReader:
    """Turns lines of apt, dpkg and build.sh into the step that they belong to.

    apt works twice, first on the essential packages, then on the rest; each time it says how many there are. dpkg goes
    to and fro between unpacking and setting up: a package is half done after the first of the two.
    """

    def __init__(self) -> None:
        self._packages = 0
        self._fetched = 0
        self._halves = 0
        self.step = Step("fetching the package lists")

    def read(self, line: str) -> Step:
        """The step that the build is in after `line`."""
        first, _, rest = line.partition(" ")
        if first == "P:":
            self.step = Step(rest)
        elif line.startswith("I: running --customize-hook"):
            self.step = Step("setting the system up")
        elif found := _NEW.match(line):
            self._packages += int(found[1])
        elif first.startswith("Get:") and self._packages:
            self._fetched += 1
            self.step = self._count("fetching packages", self._fetched)
        elif first == "Unpacking" or line.startswith("Setting up "):
            self._halves += 1
            self.step = self._count("installing packages", self._halves // 2)
        return self.step

    def _count(self, phase: str, done: int) -> Step:
        return Step(phase, min(done, self._packages), self._packages, "packages")


class BuildLog:
    """Receives the output of a build, reports the steps in it, and keeps its last lines."""

    def __init__(self, progress: Progress, keep: int = 60) -> None:
        self._progress = progress
        self._reader = LogReader()
        self._rest = b""
        self._lines: deque[str] = deque(maxlen=keep)
        self._cause: str | None = None

    @property
    def step(self) -> Step:
        return self._reader.step

    def feed(self, piece: bytes) -> None:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._read(line.decode(errors="replace").rstrip())

    def _read(self, line: str) -> None:
        self._lines.append(line)
        if self._cause is None and line.startswith(_CAUSES):
            self._cause = line
        before = self._reader.step
        if (step := self._reader.read(line)) != before:
            self._progress(step)

    def last_words(self) -> str:
        """The end of the output; its last line is the first complaint, which is more telling than what followed."""
        return "\n".join([*self._lines, *([self._cause] if self._cause else [])])
