"""Polyvisor as a user meets it: the installed command, in a home of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from bench.harness import Failed, call

COMMAND = str(Path(sys.executable).with_name("polyvisor"))
READY = b"polyvisor: ready"  # what the image `tiny` prints on its console when SSH listens


class Polyvisor:
    """Polyvisor with its home at `home`, using the QEMU at `qemu` (default: its own choice)."""

    def __init__(self, home: Path, qemu: Path | None = None) -> None:
        self.home = home
        self.environment = {**os.environ, "POLYVISOR_HOME": str(home)}
        if qemu:
            self.environment["POLYVISOR_QEMU"] = str(qemu)

    def argv(self, *words: str) -> list[str]:
        return [COMMAND, *words]

    def __call__(self, *words: str, timeout_s: float = 120) -> str:
        """Run a verb and return what it prints; raises Failed."""
        return call(self.argv(*words), env=self.environment, timeout_s=timeout_s)

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))

    def prepare(self) -> None:
        """Have the image `tiny` and all caches, so that what is measured is not the first time."""
        try:
            self("image", "show", "tiny")
        except Failed:
            self("image", "build", "tiny", timeout_s=600)
        self("host")

    def directory(self, name: str) -> Path:
        return self.home / "vms" / name

    def launch_argv(self, name: str) -> list[str]:
        """The exact QEMU command that VM `name` was last started with."""
        launch = json.loads((self.directory(name) / "launch.json").read_text())
        return [str(word) for word in launch["argv"]]
