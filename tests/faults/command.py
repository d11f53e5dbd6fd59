"""The real command line in processes of its own, and what it leaves in the world: files, locks, processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyvisor.home import Home
from polyvisor.host.host import Host
from tests.faults.launcher import FINISHED

PATIENCE_S = 60.0
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """A command that has ended; a negative `status` is the signal that ended it."""

    words: tuple[str, ...]
    status: int
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.status == 0

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def finished(self) -> bool:
        """Whether the launcher's command came to its end before the step that it was to be disturbed at."""
        return self.err.rstrip().endswith(FINISHED)

    def json(self) -> Any:
        assert self.ok, self
        return json.loads(self.out)

    def error_line(self) -> str:
        """The one line that says what failed; asserts that it is one, printable, and not too long to be read."""
        assert self.status not in (0, -signal.SIGKILL), f"it should have failed: {self}"
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if not line.rstrip().endswith("…") and line != FINISHED]
        assert len(lines) == 1, f"not one line: {self}"
        assert lines[0].startswith(("polyvisor: ", '{"error":')), self.err
        assert lines[0].isprintable(), repr(lines[0])
        assert len(lines[0]) < 700, f"{len(lines[0])} characters: {lines[0][:2000]}"
        return lines[0]


@dataclass(frozen=True)
class Polyvisor:
    """The command line at work in `home`; `prefix` stands before each command (setpriv …), `env` is added."""

    home: Path
    env: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    python: str = sys.executable

    def __call__(self, *words: str, stdin: bytes | None = None, env: Mapping[str, str] | None = None) -> Done:
        return finish(words, self.start(*words, stdin=stdin, env=env), stdin)

    def start(
        self, *words: str, stdin: bytes | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Begin a command and leave it to itself; `finish` waits for it."""
        environment = {
            **os.environ,
            "POLYVISOR_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            **self.env,
            **(env or {}),
        }
        return subprocess.Popen(
            [*self.prefix, self.python, "-m", "polyvisor", *words],
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )

    def good(self, *words: str, **options: Any) -> Done:
        """A command that must succeed."""
        done = self(*words, **options)
        assert done.ok, done
        return done

    def states(self) -> dict[str, str]:
        """Name → state, as `ls` shows them."""
        return {vm["name"]: vm["state"] for vm in self.good("ls", "--json").json()}

    def host(self) -> Host:
        """The same home by the Python API, which spares a test the start of a command."""
        return Host(Home(self.home))

    def pid(self, name: str) -> int:
        """The process of a VM, as `show` tells it."""
        return int(self.good("show", name, "--json").json()["status"]["pid"])


class Launcher:
    """A launcher at work (see `launcher`): commands in `home` that are disturbed at a step, or not at all."""

    def __init__(self, home: Path, *, umask: int = -1) -> None:
        self.home, self.umask = home, umask
        self._words = tempfile.TemporaryDirectory(prefix="polyvisor-launcher-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.launcher"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __call__(self, *words: str, fault: str = "none", step: int = 1 << 30) -> Done:
        """Run a command that meets `fault` at `step`."""
        out, err = Path(self._words.name, "out"), Path(self._words.name, "err")
        out.unlink(missing_ok=True)
        err.unlink(missing_ok=True)
        request = {"fault": fault, "step": step, "home": str(self.home), "words": words}
        rest = {"env": {}, "umask": self.umask, "out": str(out), "err": str(err)}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({**request, **rest}), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        return Done(words, status, out.read_text(), err.read_text())

    def good(self, *words: str) -> Done:
        """A command that must succeed."""
        done = self(*words)
        assert done.ok, done
        return done

    def host(self) -> Host:
        """The same home by the Python API."""
        return Host(Home(self.home))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._words.cleanup()


def finish(words: Sequence[str], process: subprocess.Popen[bytes], stdin: bytes | None = None) -> Done:
    """Wait for a command; one that does not end in time fails the test, and is ended."""
    try:
        out, err = process.communicate(stdin, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{words} did not end within {PATIENCE_S} s: {err.decode()}") from None
    return Done(tuple(words), process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


def processes(home: Path) -> dict[int, str]:
    """Processes that have to do with `home`, by their directory, open files or arguments: pid → command."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _touches(entry, str(home)):
            found[int(entry.name)] = _command(entry)
    return found


def qemus(home: Path) -> list[int]:
    """The processes of VMs in `home`: those that work in a VM's directory."""
    return [pid for pid in processes(home) if _link(Path(f"/proc/{pid}/cwd")).startswith(f"{home}/vms/")]


def end_all(home: Path) -> None:
    """Kill what a test that failed has left running in `home`."""
    for pid in qemus(home):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _touches(process: Path, home: str) -> bool:
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        descriptors = []
    links = [_link(process / "cwd"), *map(_link, descriptors)]
    return any(link.startswith(f"{home}/") for link in links) or f"{home}/" in _command(process)


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def listing(home: Path) -> dict[str, str]:
    """What is in a home: path → kind and permissions. Its cache may change at any time, and is left out."""
    found = {}
    for path in sorted(home.rglob("*")):
        name = str(path.relative_to(home))
        if not name.startswith("cache") and not path.is_socket():
            status = path.lstat()
            sized = path.is_file() and not name.startswith("locks/")  # which say who held them last
            found[name] = f"{status.st_mode:o}" + (f" {status.st_size}" if sized else "")
    found.pop("next-user", None)  # a number that was given out is not given again
    return found


def assert_nothing_left(home: Home | Path) -> None:
    """No process of the home, nothing of any VM in it, no lock file; a helper that is just ending has a moment."""
    path = home.path if isinstance(home, Home) else home
    deadline = time.monotonic() + 5
    while (left := processes(path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"processes left: {left}"
    assert sorted(p.name for p in (path / "vms").iterdir()) == []
    assert sorted(p.name for p in (path / "locks").iterdir()) == []
