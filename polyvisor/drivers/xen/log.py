"""The log of a VM of Xen: what `xl` writes there (listing.py reads it), and what we add."""

from __future__ import annotations

import contextlib
import os

from polyvisor.drivers.xen.listing import Told, read_log
from polyvisor.host.store import VMDirectory

_TAIL = 64 << 10


def log_text(vm: VMDirectory) -> str:
    """The end of the VM's log; a guest that reboots without end makes it long."""
    try:
        with vm.log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def told(vm: VMDirectory) -> Told:
    return read_log(log_text(vm))


def note(vm: VMDirectory, line: str) -> None:
    with contextlib.suppress(OSError), vm.log.open("ab") as log:
        log.write(f"{line}\n".encode())


def is_xl(pid: int) -> bool:
    """Whether process `pid`, which the log names, is an xl still, and not another program by now."""
    try:
        with open(f"/proc/{pid}/comm") as file:  # noqa: PTH123
            return file.read().strip() == "xl"
    except OSError:
        return False


def keeper(vm: VMDirectory) -> int | None:
    """The process id of the xl that waits for the VM's domain, where that lives."""
    pid = told(vm).pid
    return pid if pid is not None and is_xl(pid) else None
