"""The real command line, disturbed at its N-th step.

Without arguments it serves: each line of its stdin is a JSON object with `fault`, `step`, `home`, `words` (the command
line), `env`, `umask`, and the files `out` and `err`; it forks, runs the command there, and answers with a line that holds the
exit status (negative: the signal). So hundreds of commands are spared the start of Python.

A step is an audit event (PEP 578) that touches the world: files under HOME, locks, processes, sockets, signals; and each
command to QEMU, for which there is an event of our own. Hooks are called before the event happens, so a fault at step N
comes between steps N-1 and N. The faults:

    kill       SIGKILL to itself, as `kill -9` or the kernel for want of memory would send it
    interrupt  SIGINT to itself, as Ctrl-C sends it
    ENOSPC, …  from step N on, every attempt to make or write a file fails with this errno; steps that write alone count

A command that comes to its end before its N-th step ends as always, and leaves `FINISHED` as the last line of its stderr.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections import Counter
from typing import Any, NoReturn

FINISHED = "launcher: finished"

_QMP = "launcher.qmp"
_CHANGES = {
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate"),
    *("shutil.rmtree", "shutil.copyfile", "tempfile.mkdtemp"),
}
_ALWAYS = {
    "subprocess.Popen",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "os.kill",
    "os.killpg",
    "fcntl.flock",
    _QMP,
}
_MAKES = {"os.mkdir", "os.link", "os.symlink", "tempfile.mkdtemp"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Polls repeat the same step for as long as they wait; only the first ones of a kind count.
_REPEATS = 2


class Fault:
    """An audit hook that counts steps and disturbs at the `number`-th."""

    def __init__(self, fault: str, number: int, home: str) -> None:
        self.fault, self.number, self.home = fault, number, home
        self.pid, self.steps, self.over = os.getpid(), 0, False
        self.seen: Counter[tuple[str, ...]] = Counter()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.over or os.getpid() != self.pid:
            return
        step = self._step(event, arguments)
        if step is None:
            return
        self.seen[step] += 1
        if self.seen[step] > _REPEATS and not self._failing():
            return
        self.steps += 1
        if os.environ.get("LAUNCHER_TRACE"):
            os.write(2, f"{self.steps} {step}\n".encode())
        if self.steps >= self.number:
            self._disturb(arguments)

    def _failing(self) -> bool:
        return self.fault.startswith("E")

    def _disturb(self, arguments: tuple[Any, ...]) -> None:
        if self._failing():
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number), str(arguments[0]))
        self.over = True
        os.kill(self.pid, signal.SIGKILL if self.fault == "kill" else signal.SIGINT)

    def _step(self, event: str, arguments: tuple[Any, ...]) -> tuple[str, ...] | None:
        """What the event is about, without numbers; None for those that don't count."""
        if event == "open":
            path, _, flags = arguments
            if not self._inside(path, relative=False) or (self._failing() and not flags & _WRITING):
                return None
            return event, _shape(path), str(flags & _WRITING)
        if self._failing():
            return (event, _shape(arguments[0])) if event in _MAKES and self._inside(arguments[0]) else None
        if event in _CHANGES:
            return (event, _shape(arguments[0])) if self._inside(arguments[0]) else None
        if event in _ALWAYS:
            if event == _QMP:
                return event, arguments[0]
            about = str(arguments[1]) if event == "fcntl.flock" else _shape(arguments[-1 if "socket" in event else 0])
            return event, about
        return None

    def _inside(self, path: object, *, relative: bool = True) -> bool:
        """Whether `path` is under the home; one without a directory may be (rmtree works relative to descriptors)."""
        text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
        return text.startswith(self.home) or (relative and not text.startswith("/"))


def _shape(value: object) -> str:
    """An argument of an event, so that it is the same each time: the last part of a path, numbers as #."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "#"
    text = os.fsdecode(value) if isinstance(value, (str, bytes, os.PathLike)) else type(value).__name__
    return re.sub(r"\d+", "#", os.path.basename(text))  # noqa: PTH119


def main() -> None:
    import asyncio  # noqa: F401 (what every command needs is imported once)
    import json

    import polyvisor.cli.lifecycle
    import polyvisor.cli.vm
    import polyvisor.drivers.qemu.qmp
    import polyvisor.host.host
    import polyvisor.images.qemu_img

    _announce_commands(polyvisor.drivers.qemu.qmp.Monitor)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _command(**request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _announce_commands(monitor: Any) -> None:
    """Let an audit event precede each command to QEMU."""
    execute = monitor.execute

    async def announced(self: Any, command: str, **arguments: Any) -> Any:
        sys.audit(_QMP, command)
        return await execute(self, command, **arguments)

    monitor.execute = announced


def _command(
    *, fault: str, step: int, home: str, words: list[str], env: dict[str, str], umask: int, out: str, err: str
) -> NoReturn:
    """Run one command in this process, and leave it."""
    from polyvisor.cli.main import run

    for path, number in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.environ |= {"POLYVISOR_HOME": home, **env}
    if umask >= 0:
        os.umask(umask)
    hook = Fault(fault, step, home)
    sys.addaudithook(hook)
    status = 1
    try:
        status = run(words)
    except BaseException:
        traceback.print_exc()
    finally:
        hook.over = True
        if hook.steps < hook.number:
            print(FINISHED, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
