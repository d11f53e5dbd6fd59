"""The one place that starts programs.

`run` is for tools that end (qemu-img, ssh-keygen, mmdebstrap): it waits, and turns a failure into a `ProcessFailed`
that carries the command and its stderr. `spawn_detached` is for hypervisors: they outlive the command that starts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from _thread import start_new_thread
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from polyvisor.errors import ProcessFailed, TimedOut, Unavailable
from polyvisor.values import dataclass
from polyvisor.waiting import event_loop, pause

if TYPE_CHECKING:
    Program = subprocess.Popen[bytes]
_POLL_S = 0.002


@dataclass(frozen=True)
class Completed:
    """What a program that has ended wrote, and its exit status."""

    stdout: str
    stderr: str
    status: int = 0


def find_program(name: str, *, package: str, also: Sequence[str] = ("/usr/sbin", "/sbin")) -> str:
    """The path of program `name`, from PATH or `also`; raises Unavailable with the package to install."""
    path = which(name) or which(name, also)
    if path is None:
        raise Unavailable(f"the program '{name}' is not installed", hint=f"install it: {install_command(package)}")
    return path


def which(name: str, directories: Sequence[str] = ()) -> str | None:
    """The path of program `name`: itself where it is a path, else where it lies in `directories` (by default in PATH).

    As shutil's, whose import would take longer than all programs that a start needs to be found.
    """
    places = [""] if os.sep in name else directories or os.get_exec_path()
    found = (os.path.join(place, name) for place in places)  # noqa: PTH118
    return next((path for path in found if os.access(path, os.X_OK) and not os.path.isdir(path)), None)  # noqa: PTH112


def install_command(package: str) -> str:
    """The command that installs Debian package `package`, fit for the person who reads it."""
    return f"{'' if os.geteuid() == 0 else 'sudo '}apt-get install {package}"


async def run(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    timeout_s: float | None = None,
    check: bool = True,
    on_output: Callable[[bytes], None] | None = None,
    umask: int = -1,
) -> Completed:
    """Run `argv` to its end in the C locale; `on_output` gets each piece of its stdout as it is written.

    Files that it makes have the permissions that `umask` leaves them, or by default our own.
    Raises ProcessFailed where it fails (unless `check` is false) or is not there, TimedOut after `timeout_s` seconds.
    Whoever cancels the caller ends the program too.
    """
    await event_loop()
    try:
        process = await _started(
            asyncio.create_subprocess_exec(
                *argv,
                cwd=cwd,
                env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
                stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                umask=umask,
            )
        )
    except OSError as error:
        raise ProcessFailed(argv, 127, str(error)) from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await (process.communicate(stdin) if on_output is None else _watch(process, on_output))
    except TimeoutError as error:
        raise TimedOut(f"{argv[0]} did not end within {timeout_s} s") from error
    finally:
        await _end(process)
    completed = Completed(out.decode(errors="replace"), err.decode(errors="replace"), process.returncode or 0)
    if check and completed.status:
        raise ProcessFailed(argv, completed.status, completed.stderr or completed.stdout)
    return completed


async def _watch(process: asyncio.subprocess.Process, on_output: Callable[[bytes], None]) -> tuple[bytes, bytes]:
    """Hand what `process` writes to `on_output` until it ends; returns nothing of it, and the end of its stderr."""
    assert process.stdout is not None and process.stderr is not None  # noqa: S101 (both are pipes)
    errors = asyncio.ensure_future(_tail(process.stderr))
    try:
        while piece := await process.stdout.read(4096):
            on_output(piece)
        await process.wait()
        return b"", await errors
    finally:
        errors.cancel()


async def _tail(stream: asyncio.StreamReader, limit: int = 64 << 10) -> bytes:
    """The last `limit` bytes of a stream, so that no program can fill the memory."""
    kept = b""
    while piece := await stream.read(limit):
        kept = (kept + piece)[-limit:]
    return kept


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a program, and whatever it started, that is still there."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()


async def _started(starting: Coroutine[None, None, asyncio.subprocess.Process]) -> asyncio.subprocess.Process:
    """The process that `starting` starts. asyncio hangs where it is cancelled in the middle, so that waits for its end."""
    task = asyncio.ensure_future(starting)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _end(await task)
        raise


async def converse(argv: Sequence[str], *, errors: IO[bytes], limit: int) -> asyncio.subprocess.Process:
    """Start `argv` to talk with over its stdin and stdout; its stderr goes to `errors`, lines have at most `limit` bytes.

    It is in a session of its own: Ctrl-C on the terminal is for the caller, who decides what becomes of it.
    Raises ProcessFailed.
    """
    try:
        return await _started(
            asyncio.create_subprocess_exec(
                *argv,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                limit=limit,
            )
        )
    except OSError as error:
        raise ProcessFailed(argv, 127, str(error)) from error


def begin(argv: Sequence[str]) -> Program:
    """Start a tool that says nothing of interest, to be waited for by `ended`; raises ProcessFailed."""
    try:
        return subprocess.Popen(
            argv,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise ProcessFailed(argv, 127, str(error)) from error


async def ended(process: Program, *, timeout_s: float) -> int:
    """Wait for a tool that `begin` has started, and return its exit status; it is killed after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            await pause(_POLL_S)
    finally:
        process.kill()
        process.wait()
    return process.returncode


def ending_with_us(argv: Sequence[str]) -> tuple[str, ...]:
    """The command `argv`, for `spawn_detached`: it is killed when the thread that starts it ends, however that comes.

    It does not begin where this process has been killed before the kernel was told so (prctl(2), PR_SET_PDEATHSIG): then it
    has another parent. Raises Unavailable.
    """
    setpriv = find_program("setpriv", package="util-linux")
    shell = (find_program("sh", package="dash"), "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid()))
    return (setpriv, "--pdeathsig", "KILL", *shell, *argv)


def spawn_detached(
    argv: Sequence[str],
    *,
    cwd: Path,
    output: IO[bytes],
    inherit: Sequence[int] = (),
    user: int | None = None,
    groups: Sequence[int] = (),
    stdin: int | None = None,
    errors: IO[bytes] | None = None,
) -> Program:
    """Start `argv` in a session of its own, to live on after this process.

    Its stdin is `stdin`, by default empty, its stdout goes to `output`, its stderr to `errors` (`output` by default); file
    descriptors in `inherit` stay open in it.
    With `user`, it runs as that numeric user and group, with the supplementary `groups` alone (the caller must be root).
    """
    if user is not None and not groups and (words := _as_user(argv, user)):
        argv, user = words, None
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=output,
        stderr=errors or output,
        start_new_session=True,
        pass_fds=inherit,
        user=user,
        group=user,
        extra_groups=groups if user is not None else None,
        umask=0o077,
    )
    # Whoever starts VMs and stays (a server, a test) must also bury them.
    start_new_thread(process.wait, ())  # threading's would wait for it to be begun
    return process


def _as_user(argv: Sequence[str], user: int) -> Sequence[str] | None:
    """The command `argv`, run as a numeric user and group without any other, or None where nothing here does that.

    Python can do it, but copies itself for that (fork(2)), where it lends its memory otherwise (vfork(2)); that takes longer
    than this program does. nsenter(1), told of no namespace, does nothing but setgroups, setgid and setuid. setpriv(1), which
    knows of groups, looks up each number as a name first, wherever this host has the names of its users from.
    """
    nsenter = which("nsenter") or which("nsenter", ("/usr/bin",))
    return None if nsenter is None else (nsenter, f"--setuid={user}", f"--setgid={user}", "--", *argv)
