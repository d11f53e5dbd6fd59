"""The process of a VM: how it is started, holding the lock that says that the VM lives, found again and ended.

QEMU inherits the open `alive` file with its lock, and holds it for as long as it lives: whoever looks needs no number of a
process, which a guest's process could write and another one could get. See docs/design/vm-processes.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from polyvisor.drivers.base import Command
from polyvisor.drivers.qemu.agent import has_agent_port, make_pipes
from polyvisor.drivers.qemu.argv import OBSERVE_SOCKET, PID_FILE, QMP_SOCKET
from polyvisor.drivers.qemu.devices import groups_for
from polyvisor.drivers.qemu.qmp import QMPLost, QMPRefused
from polyvisor.errors import CannotStart, TimedOut, WrongState
from polyvisor.files import storage_errors
from polyvisor.host.store import VMDirectory
from polyvisor.process import spawn_detached
from polyvisor.spec.cpus import ALL_CPUS
from polyvisor.waiting import pause

if TYPE_CHECKING:
    from polyvisor.process import Program

_POLL_S = 0.005
_LOG_TAIL = 4096


@contextlib.contextmanager
def started(
    vm: VMDirectory, command: Command, user: int | None, affinity: str = ALL_CPUS, inherit: tuple[int, ...] = ()
) -> Iterator[Program]:
    """The process of a new QEMU, on the CPUs of `affinity` from its first moment, with the open files that it is to inherit.

    Where the block fails it is ended, and CannotStart has its last words.
    """
    with storage_errors(f"starting VM '{vm.name}'"):
        for leftover in (QMP_SOCKET, OBSERVE_SOCKET, PID_FILE):
            (vm.path / leftover).unlink(missing_ok=True)
        if has_agent_port(command.argv):
            make_pipes(vm, user)
        process = _spawn(vm, command.argv, user, affinity, inherit)
    try:
        yield process
    except (QMPLost, QMPRefused, TimedOut) as error:
        _end(process)
        raise CannotStart(last_words(vm) or error.message, hint=_start_hint(vm)) from error
    except BaseException:
        _end(process)
        raise


def _spawn(
    vm: VMDirectory, argv: tuple[str, ...], user: int | None, affinity: str, inherit: tuple[int, ...]
) -> Program:
    """Start QEMU so that it holds the lock on the VM's `alive` file from its first moment to its last."""
    alive = os.open(vm.alive_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock_alive(vm, alive)
        with vm.log.open("wb") as log, contextlib.ExitStack() as stack:
            if affinity != ALL_CPUS:
                from polyvisor.drivers.qemu.affinity import on_cpus

                stack.enter_context(on_cpus(affinity))
            open_files = (alive, *inherit)
            return spawn_detached(argv, cwd=vm.path, output=log, inherit=open_files, user=user, groups=groups_for(argv))
    finally:
        os.close(alive)


def _lock_alive(vm: VMDirectory, fd: int) -> None:
    """Lock the `alive` file; whoever only looks holds it for some microseconds, so try for a while."""
    deadline = time.monotonic() + 1.0
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise WrongState(f"VM '{vm.name}' has a process already", hint=f"polyvisor kill {vm.name}") from error
            time.sleep(0.001)


def _end(process: Program) -> None:
    process.kill()
    process.wait()


def pid_of(vm: VMDirectory) -> int | None:
    try:
        # The VM's process can write in this directory: neither follow a link there, nor wait for a pipe.
        fd = os.open(vm.path / PID_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return int(os.read(fd, 32))
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return None


def last_words(vm: VMDirectory) -> str | None:
    """The last line that QEMU wrote to its log, without its own name."""
    try:
        with vm.log.open("rb") as file:
            file.seek(max(0, vm.log.stat().st_size - _LOG_TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return None
    said = [line.strip() for line in lines if line.strip() and "warning:" not in line]
    return said[-1].removeprefix("qemu-system-x86_64: ") if said else None


def _start_hint(vm: VMDirectory) -> str:
    said = last_words(vm) or ""
    if "Permission denied" in said and os.geteuid() == 0:
        return f"QEMU runs without root's rights: every directory above {vm.path} must let others pass (chmod o+x)"
    return (
        f"polyvisor --debug start {vm.name} shows the exact command; polyvisor logs --hypervisor {vm.name} its output"
    )


async def ended(vm: VMDirectory, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while vm.alive():
        if time.monotonic() > deadline:
            return False
        await pause(_POLL_S)
    return True


def send_signal(vm: VMDirectory, number: signal.Signals) -> None:
    """Send a signal to the VM's process."""
    for pid in lock_holders(vm):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def lock_holders(vm: VMDirectory) -> list[int]:
    """The processes that have the VM's `alive` file open for writing, as QEMU does and whoever only looks does not.

    The pid file is no help: a start that was cut off has not written it yet, and the guest's process may write there.
    """
    identity = vm.alive_file.stat()
    with os.scandir("/proc") as entries:
        return [int(each.name) for each in entries if each.name.isdigit() and _writes(each.path, identity)]


def _writes(process: str, identity: os.stat_result) -> bool:
    """Whether a process has the file open for writing: its link in /proc/PID/fd has the permissions of the descriptor."""
    try:
        with os.scandir(f"{process}/fd") as entries:
            return any(_is_written(entry, identity) for entry in entries)
    except OSError:  # another user's process, or one that has just ended
        return False


def _is_written(entry: os.DirEntry[str], identity: os.stat_result) -> bool:
    try:
        writable = entry.stat(follow_symlinks=False).st_mode & stat.S_IWUSR
        return bool(writable) and os.path.samestat(entry.stat(), identity)
    except OSError:
        return False
