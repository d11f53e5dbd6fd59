"""The port by which host and guest tell each other a few words: two named pipes here, a serial port in the guest."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from polyvisor.drivers.qemu.argv import AGENT_PIPE
from polyvisor.files import storage_errors
from polyvisor.host.store import VMDirectory

_LONGEST = 4096


def has_agent_port(argv: Sequence[str]) -> bool:
    """Whether a QEMU of these arguments has such a port; those that an older Polyvisor started have none."""
    return "chardev:agent" in argv


def make_pipes(vm: VMDirectory, user: int | None) -> None:
    """The pipes, empty and new, for the QEMU that is about to start. Raises OSError."""
    for end in ("in", "out"):
        path = vm.path / f"{AGENT_PIPE}.{end}"
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        if user is not None:
            os.chown(path, user, user, follow_symlinks=False)


def tell(vm: VMDirectory, told: bytes) -> None:
    """Put a message into the pipe that leads to the guest, whose QEMU has opened it. Raises PolyvisorError."""
    if not told:
        return
    with storage_errors(f"telling the guest of VM '{vm.name}' who it is"):
        fd = _open(vm, "in", os.O_WRONLY)
        try:
            os.write(fd, told)
        finally:
            os.close(fd)


def heard(vm: VMDirectory) -> bytes:
    """What the guest has said since somebody listened last; nothing where there is no port."""
    try:
        fd = _open(vm, "out", os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(fd, _LONGEST)
    except BlockingIOError:
        return b""
    finally:
        os.close(fd)


def _open(vm: VMDirectory, end: str, mode: int) -> int:
    """One of the pipes. The VM's process can write in this directory: neither follow a link there, nor wait."""
    fd = os.open(vm.path / f"{AGENT_PIPE}.{end}", mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(f"{AGENT_PIPE}.{end} is no pipe")
    return fd
