"""Carrying a plan out: files first, each at once or not at all, then commands; afterwards the machine is looked at again.

What a step wants is in the plan alone. A second run finds nothing to do; one that was cut off goes on where it stopped.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from polyvisor.errors import NotPermitted, PolyvisorError, ProcessFailed, Unsupported
from polyvisor.files import storage_errors, sync_directory, take_flock, write_atomic
from polyvisor.host.setup.facts import gather
from polyvisor.host.setup.plan import plan
from polyvisor.host.setup.wish import Wish
from polyvisor.operation import Progress, Step, silent
from polyvisor.process import run
from polyvisor.status import FileChange, Setup, SetupStep, StepState

_LOCK = "run/polyvisor-prepare.lock"
_HOUR_S = 3600.0
_SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"  # not everybody who logs in over SSH has these
_STATUS = re.compile(rb"^(dl|pm)status:[^:]*:(\d+)[.\d]*:(.*)$", re.MULTILINE)


async def prepare(wish: Wish, progress: Progress = silent, *, act: bool = False, root: Path = Path("/")) -> Setup:
    """What makes this machine what `wish` says, and with `act` do it; the result is how things are afterwards.

    Raises InvalidInput; with `act` also Unsupported where a step is out of reach, NotPermitted without root, ProcessFailed.
    """
    setup = plan(await gather(root), wish)
    if not act:
        return setup
    if blocked := setup.in_state(StepState.BLOCKED):
        raise Unsupported(f"nothing was changed: {blocked[0].found}")
    if not setup.in_state(StepState.TODO):
        return setup
    if os.geteuid() != 0:
        hint = "run it as root, with sudo; for another machine, log in there as root: --host root@…"
        raise NotPermitted(f"making a {setup.kind} host of this machine takes root's rights", hint=hint)
    with storage_errors("locking out others that prepare this machine"):
        fd = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await take_flock(fd, lambda: progress(Step("waiting for another that prepares this machine")))
        return await _carried_out(replace(wish, kind=setup.kind), progress, root)
    finally:
        os.close(fd)


async def _carried_out(wish: Wish, progress: Progress, root: Path) -> Setup:
    for step in plan(await gather(root), wish).in_state(StepState.TODO):
        progress(Step(f"step '{step.name}'"))
        await carry_out(step, progress, root)
    after = plan(await gather(root), wish)
    if left := after.in_state(StepState.TODO, StepState.BLOCKED):
        raise PolyvisorError(
            f"all was done, and yet '{left[0].name}' is not as it should be: {left[0].found}",
            hint=f"look into it before the next reboot; to go back: polyvisor host prepare {wish.kind} --undo",
        )
    return after


async def carry_out(step: SetupStep, progress: Progress = silent, root: Path = Path("/")) -> None:
    """Do one step; raises ProcessFailed with the step's name before the program's last words."""
    with storage_errors(f"step '{step.name}'"):
        for change in step.files:
            _change(root / change.path[1:], change)
    environment = {"PATH": os.environ.get("PATH", os.defpath) + _SBIN}
    for command in step.commands:
        try:
            await run(
                _with_status(command),
                env=environment,
                timeout_s=_HOUR_S,
                on_output=_Reader(progress).feed,
                umask=0o022,  # an agent's own is stricter, and would be that of what packages make
            )
        except ProcessFailed as error:
            error.about(f"step '{step.name}'")
            error.hint = "nothing after it was done; mend that, and run the same again"
            raise


def _change(path: Path, change: FileChange) -> None:
    """Write or delete a file of ours; one that is there already is kept beside it, under a name that GRUB does not read."""
    if path.exists():
        write_atomic(path.with_name(f"{path.name}.old"), path.read_bytes())
    if change.content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, change.content)
        path.chmod(0o644)  # whatever the umask of who runs this: GRUB's settings are no secret
    elif path.exists():
        path.unlink()
        sync_directory(path.parent)


def _with_status(command: tuple[str, ...]) -> tuple[str, ...]:
    """apt-get tells how far it is, in lines for programs (apt's README.progress-reporting), where it is asked to."""
    if "apt-get" not in command:
        return command
    at = command.index("apt-get") + 1
    return (*command[:at], "-o", "APT::Status-Fd=1", *command[at:])


class _Reader:
    """Makes progress of what apt-get says on its status lines; other programs' output is of no interest."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._rest = b""

    def feed(self, piece: bytes) -> None:
        whole, _, self._rest = (self._rest + piece).rpartition(b"\n")
        for kind, percent, _ in _STATUS.findall(whole):
            phase = "fetching packages" if kind == b"dl" else "installing packages"
            self._progress(Step(phase, int(percent), 100, "%"))
