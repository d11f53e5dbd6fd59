"""Ways into a VM: its serial console, its logs, its SSH server."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from polyvisor.errors import Busy, NotFound, TimedOut, WrongState
from polyvisor.host.api import SSHTarget
from polyvisor.host.keys import KNOWN_HOSTS, login_key_of
from polyvisor.host.store import VMDirectory
from polyvisor.images.image import Image
from polyvisor.network.ports import SSH_PORT
from polyvisor.operation import Progress, Step
from polyvisor.status import VMStatus

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_CHUNK = 64 << 10
_POLL_S = 0.1


async def open_console(
    vm: VMDirectory, connect: Callable[[VMDirectory], Awaitable[Streams]]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The serial console, to which the driver's `connect` leads; raises Busy where another client has it.

    QEMU serves one client and lets others wait in silence, so clients exclude each other by a lock that lives as long as
    their connection.
    """
    lock = os.open(vm.path / "console.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        reader, writer = await connect(vm)
    except BlockingIOError as error:
        os.close(lock)
        hint = f"watch it with: polyvisor logs --follow {vm.name}"
        raise Busy(f"the console of VM '{vm.name}' is in use", hint=hint) from error
    except OSError as error:
        os.close(lock)
        raise WrongState(f"the console of VM '{vm.name}' does not answer: {error.strerror}") from error
    _close_with(writer, lock)
    return reader, writer


def _close_with(writer: asyncio.StreamWriter, fd: int) -> None:
    """Close `fd` when the connection of `writer` is closed."""

    async def wait() -> None:
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        os.close(fd)

    task = asyncio.get_running_loop().create_task(wait())
    _closing.add(task)
    task.add_done_callback(_closing.discard)


_closing: set[asyncio.Task[None]] = set()


async def read_log(vm: VMDirectory, path: Path, follow: bool) -> AsyncIterator[bytes]:
    """The content of a log, in pieces; with `follow`, what is added to it until the VM ends."""
    try:
        # The guest's process can write in this directory: never follow a link that it may have put there.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if path.parent.is_dir() and not path.exists():
            return
        raise NotFound(f"VM '{vm.name}' has no log {path.name}: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        while True:
            ended = not vm.alive()
            while chunk := file.read(_CHUNK):
                yield chunk
            if not follow or ended:
                return
            await asyncio.sleep(_POLL_S)


async def ssh_target(vm: VMDirectory, status: VMStatus, image: Image, keys: Path) -> SSHTarget:
    """How to log in to the VM; raises WrongState where it does not run or has no port that leads to its SSH server."""
    if not status.state.alive:
        raise WrongState(f"VM '{vm.name}' is {status.state}", hint=f"polyvisor start {vm.name}")
    if image.user is None:
        raise WrongState(f"image '{image.name}' names no user to log in as", hint="polyvisor image import has --user")
    for forward in status.forwards:
        if forward.guest_port == SSH_PORT and forward.protocol == "tcp":
            return SSHTarget(
                address="127.0.0.1" if forward.host_address == "0.0.0.0" else forward.host_address,  # noqa: S104
                port=forward.host_port,
                user=image.user,
                identity=(await login_key_of(vm.path, keys))[0],
                known_hosts=vm.path / KNOWN_HOSTS,
                alias=vm.name,
            )
    raise WrongState(
        f"no port of this host leads to SSH of VM '{vm.name}'", hint=f"polyvisor forward add {vm.name} :22"
    )


def patience(waited_s: float) -> float:
    """How long to wait for a greeting, after so many seconds without one.

    At first the guest has no network yet, and another try finds it soonest. Later it is rather that a server takes
    long to answer: OpenSSH loads a process of its own for each connection, which takes seconds in an emulated guest
    with much to do, and starting over would only add to that.
    """
    return min(1.0 + waited_s / 4, 20.0)


async def until_ssh_answers(vm: VMDirectory, target: SSHTarget, timeout_s: float, progress: Progress) -> None:
    """Wait for the guest's SSH server; raises WrongState as soon as the VM ends, TimedOut."""
    began, waited = time.monotonic(), 0.0
    while not await ssh_answers(target, patience(waited)):
        waited = time.monotonic() - began
        if not vm.alive():
            raise WrongState(f"VM '{vm.name}' ended while it was booting", hint=f"polyvisor logs {vm.name}")
        if waited > timeout_s:
            problem = f"SSH of VM '{vm.name}' does not answer after {timeout_s:.0f} s"
            raise TimedOut(problem, hint=f"polyvisor logs {vm.name}")
        progress(Step("waiting for SSH", int(waited), int(timeout_s), "s"))
        await asyncio.sleep(_POLL_S)


async def ssh_answers(target: SSHTarget, timeout_s: float) -> bool:
    """Whether an SSH server sends its greeting (RFC 4253, 4.2) within `timeout_s` seconds.

    A mere connection proves nothing: user networking accepts it before the guest does.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(target.address, target.port)
            try:
                return (await reader.read(4)).startswith(b"SSH-")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
