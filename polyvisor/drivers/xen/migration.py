"""A guest's memory and devices, written by `xl save` and read by `xl restore`, each through a pipe of ours.

The pipe is what makes both safe to be cut off: where our end of it is closed, be it because this process was killed, `xl save`
fails and lets the guest go on by itself, and `xl restore` fails and takes back the domain that it was making. It also tells
how far they are.

The guest takes part in a save (it suspends itself), so one that was paused has its vCPUs run for that moment. To Xen it ends
as with any shutdown: the xl that waits for it would take this for the end of the domain, and leave it. So that one is stopped
(SIGSTOP) until the guest has been written and lives again, paused. A shell sees to it, which goes on when we are killed; what
it could not do, since it was killed too, `settle` does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import IO, TYPE_CHECKING, TypeVar

from polyvisor.drivers.xen import xl
from polyvisor.drivers.xen.listing import Domain, read_errors
from polyvisor.drivers.xen.log import keeper
from polyvisor.errors import PolyvisorError, TimedOut
from polyvisor.files import is_flocked, storage_errors
from polyvisor.host.store import VMDirectory
from polyvisor.operation import Progress, Step
from polyvisor.process import spawn_detached
from polyvisor.waiting import pause

if TYPE_CHECKING:
    from polyvisor.process import Program

# libxl waits a minute for the guest to answer, and another one for it to suspend itself (libxl_dom_suspend.c).
SILENCE_S = 180.0
_POLL_S = 0.002
_PIECE = 1 << 20  # bytes; also of the pipe: what Linux gives everybody is a sixteenth of it
# Whether a save was begun whose end nobody has seen, and what the VM was then. Locked by the shell for as long as it lives.
MARK = "saving"
_PAUSED, _RUNNING = "paused", "running"
_LOG = "save.log"

# $1 is xl, $2 the domain, $3 the xl that waits for it (or nothing), $4 what the guest was. That xl must not see the domain
# suspended when it goes on.
_SAVE = """\
trap '' PIPE
xl=$1 domain=$2 keeper=$3 was=$4
[ -z "$keeper" ] || kill -STOP "$keeper"
{ [ "$was" = running ] || "$xl" unpause "$domain" >&2; } && "$xl" save -p "$domain" /dev/stdout
status=$?
[ "$was" = running ] || [ $status = 0 ] || "$xl" pause "$domain" >&2
exec >&2
set -- $("$xl" list "$domain" | tail -n 1)
case $5 in
    ???ss?) exit 1 ;;
esac
[ -z "$keeper" ] || kill -CONT "$keeper"
exit $status
"""

T = TypeVar("T")
Find = Callable[[], Awaitable[Domain | None]]


async def write_memory(vm: VMDirectory, domain: Domain, file: int, progress: Progress) -> None:
    """Write all that the guest of `domain` is to `file`; it is paused afterwards, or as it was where that fails.

    Raises OSError where `file` can't be written, PolyvisorError with what xl said.
    """
    reading, writing = open_pipe()
    with reading:
        with writing:
            process = _saver(vm, domain, writing)
        os.set_blocking(reading.fileno(), False)
        try:
            await _pour(reading.fileno(), file, domain.memory_mib << 20, "saving", progress)
        finally:
            reading.close()
            await _ended(process)
    if process.returncode:
        raise PolyvisorError(
            f"xl could not write its memory: {_said(vm)}", hint="its guest has to be up, and to answer"
        )


async def read_memory(process: Program, stream: IO[bytes], file: int, progress: Progress) -> None:
    """Hand what `write_memory` wrote to an `xl restore` that reads `stream`; one that ends before its end says why itself."""
    os.set_blocking(stream.fileno(), False)
    total, ended = os.fstat(file).st_size, lambda: process.poll() is not None
    with stream, contextlib.suppress(BrokenPipeError):
        await _pour(file, stream.fileno(), total, "restoring", progress, ended)


def _saver(vm: VMDirectory, domain: Domain, stream: IO[bytes]) -> Program:
    """Start the shell that writes the guest to `stream`, and holds the lock of MARK meanwhile."""
    was = _PAUSED if domain.paused else _RUNNING
    with storage_errors(f"saving VM '{vm.name}'"):
        mark = os.open(vm.path / MARK, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(mark, was.encode())
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            words = ("/bin/sh", "-c", _SAVE, "save", xl.program(), str(domain.id), str(keeper(vm) or ""), was)
            with (vm.path / _LOG).open("wb") as log:
                return spawn_detached(words, cwd=vm.path, output=stream, errors=log, inherit=[mark])
        finally:
            os.close(mark)


def _said(vm: VMDirectory) -> str:
    try:
        return read_errors((vm.path / _LOG).read_text(errors="replace")) or "it ended without a word"
    except OSError:
        return "it ended without a word"


async def _ended(process: Program) -> None:
    """Wait for it, also where the caller is cancelled: the guest goes on, or stands still, when it has ended."""
    deadline = time.monotonic() + SILENCE_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise TimedOut("xl save does not end", hint=f"look for it with: ps -g {process.pid}")
        await pause(_POLL_S)


def was_paused(vm: VMDirectory) -> bool:
    """Whether a save is under way, or was cut off, of a VM that its user had paused."""
    try:
        return (vm.path / MARK).read_text() == _PAUSED
    except OSError:
        return False


async def settle(vm: VMDirectory, find: Find) -> None:
    """Let nothing be left of a save that was cut off: its guest is as it was, or written and paused, and is waited for.

    Whoever changes the VM calls it before. Raises TimedOut while xl still is at it.
    """
    mark = vm.path / MARK
    if not mark.exists():
        return
    deadline = time.monotonic() + SILENCE_S
    while is_flocked(mark):
        if time.monotonic() > deadline:
            raise TimedOut(f"xl is still saving VM '{vm.name}'", hint="look for it with: ps -C xl -o pid,args")
        await pause(_POLL_S)
    if (domain := await find()) is not None:
        if was_paused(vm) and not domain.paused:
            await xl.xl("pause", str(domain.id))
        if domain.suspended:
            await _revive(domain)
    wake_keeper(vm)
    mark.unlink(missing_ok=True)


async def _revive(domain: Domain) -> None:
    """Let a domain live whose guest has suspended itself, and was told by nobody to go on (`xl resume` is of 4.20)."""
    from polyvisor.drivers.xen.xenctrl import resume

    with contextlib.suppress(PolyvisorError):  # in modes pv and pvh without disks it has no QEMU
        await xl.xl("qemu-monitor-command", str(domain.id), "cont")
    resume(domain.id)


def wake_keeper(vm: VMDirectory) -> None:
    """Let the xl go on that waits for the VM's domain; it does nothing to one that was not stopped."""
    if (pid := keeper(vm)) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def flush_disks(domain: Domain) -> None:
    """Let the domain's QEMU write what it keeps of the disks to their files, which it does where it is told to stop.

    A save leaves that out in modes pv and pvh; written when that QEMU ends, it would look like a change by somebody else.
    """
    for command in ("stop", "cont"):
        await xl.xl("qemu-monitor-command", str(domain.id), command)


def open_pipe() -> tuple[IO[bytes], IO[bytes]]:
    """The ends of a pipe, to read from and to write to."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # there is a limit on how many may be so large
        fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, _PIECE)
    return os.fdopen(reading, "rb", buffering=0), os.fdopen(writing, "wb", buffering=0)


async def _pour(
    source: int, target: int, total: int, phase: str, progress: Progress, ended: Callable[[], bool] = lambda: False
) -> None:
    """Copy what comes from `source` to `target`, to its end; the one that is a pipe does not block."""
    done = 0
    while piece := await _ready(partial(os.read, source, _PIECE), ended):
        rest = piece
        while rest:
            rest = rest[await _ready(partial(os.write, target, rest), ended) :]
        done += len(piece)
        progress(Step(phase, min(done, total), total, "B"))


async def _ready(act: Callable[[], T], ended: Callable[[], bool]) -> T:
    """What `act` returns once it need not wait for the other end of a pipe; raises BrokenPipeError where that has ended."""
    deadline = time.monotonic() + SILENCE_S
    while True:
        try:
            return act()
        except BlockingIOError:
            if ended():
                raise BrokenPipeError from None
            if time.monotonic() > deadline:
                raise TimedOut(f"xl has neither read nor written anything for {SILENCE_S:.0f} s") from None
        await pause(_POLL_S)
