"""VM directories and their locks: the truth about the VMs of a host.

    <vms>/<name>/vm.json       the record
    <vms>/<name>/launch.json   the launch record of the last start
    <vms>/<name>/alive         locked by the hypervisor's process for as long as that lives
    <vms>/<name>/qemu.log      what the hypervisor's process said
    <vms>/<name>/move.json     that the VM is on its way to another host, or from one (moves.py)
    <vms>/<name>/forking       its memory is being copied for forks, and it goes on afterwards
    <vms>/<name>/unborn        it is a fork, and has not got all of its memory so far
    <vms>/<name>/renewing      it is a fork, and its guest has not taken on its own identity so far (identity.py)
    <vms>/<name>/saved/        memory and devices of a VM that was saved
    <vms>/<name>/snapshots/    what it was at some moments (snapshots.py)
    <vms>/<name>/disks/        disks and UEFI variables
    <vms>/<name>/run/          sockets, pid and console log: the one place where the hypervisor's process may write

A VM is made in `.new-<name>` and renamed into place; it is renamed to `.gone-<name>` before it is removed. What is ready to
begin from a template lies in `.warm-<name>`. Whoever changes a VM holds its lock; the kernel drops the lock of a process that
dies, so there are no stale ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from functools import cached_property
from pathlib import Path

from polyvisor.errors import AlreadyExists, Busy, InvalidInput, NotFound, PolyvisorError
from polyvisor.files import is_flocked, read_small, storage_errors, sync_directory, sync_files, translated, write_atomic
from polyvisor.home import Home
from polyvisor.host.record import Launch, Record, launch_from_json, launch_to_json, record_from_json, record_to_json
from polyvisor.spec.vm import check_name
from polyvisor.values import dataclass
from polyvisor.waiting import pause

ALIVE = "alive"
SAVED = "saved"
FORKING = "forking"
UNBORN = "unborn"
RENEWING = "renewing"
WARM = ".warm-"
LOCK_PATIENCE_S = 30.0
_POLL_S = 0.02


def no_such_vm(name: str) -> NotFound:
    return NotFound(f"there is no VM '{name}'", hint="polyvisor ls shows those that are")


@dataclass(frozen=True)
class VMDirectory:
    """The directory of one VM. Reading raises PolyvisorError where a file in it can't be understood."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def disks(self) -> Path:
        return self.path / "disks"

    @property
    def log(self) -> Path:
        return self.path / "qemu.log"

    @property
    def console_log(self) -> Path:
        return self.run / "console.log"

    @property
    def alive_file(self) -> Path:
        return self.path / ALIVE

    @cached_property
    def record(self) -> Record:
        """What the VM is; raises NotFound, PolyvisorError."""
        try:
            return record_from_json(read_small(f"{self.path}/vm.json"))
        except FileNotFoundError as error:
            raise no_such_vm(self.name) from error
        except OSError as error:
            raise translated(error, f"reading VM '{self.name}'") from error
        except (ValueError, InvalidInput) as error:
            raise self.unreadable("vm.json", error) from error

    def launch(self) -> Launch | None:
        """How it was last started, or None before the first start."""
        try:
            return launch_from_json(read_small(f"{self.path}/launch.json"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise translated(error, f"reading VM '{self.name}'") from error
        except (ValueError, InvalidInput) as error:
            raise self.unreadable("launch.json", error) from error

    def write_record(self, record: Record) -> None:
        with storage_errors("writing the VM's record"):
            write_atomic(self.path / "vm.json", record_to_json(record))

    def write_launch(self, launch: Launch, *, durable: bool = True) -> None:
        with storage_errors("writing the VM's launch record"):
            write_atomic(self.path / "launch.json", launch_to_json(launch), durable=durable)

    def alive(self) -> bool:
        """Whether the VM's hypervisor process lives.

        That process has inherited the lock on `alive_file` and can't lose it before it ends: no pid is compared, and
        a start that was cut off after the process was made is seen too.
        """
        return is_flocked(f"{self.path}/{ALIVE}")

    @property
    def saved(self) -> Path:
        """Where a saved VM's memory lies; also while that is written or read. See `saved.py`."""
        return self.path / SAVED

    def is_saved(self) -> bool:
        """Whether memory and devices lie there whole. This counts for a VM that is not alive."""
        return os.path.exists(f"{self.path}/{SAVED}/memory")  # noqa: PTH110 - quicker, for long lists

    def is_restoring(self) -> bool:
        """Whether its process, if it is alive, was started to read what was saved, and may not have all of it yet."""
        return os.path.exists(f"{self.path}/{SAVED}/restoring")  # noqa: PTH110

    def is_saving(self) -> bool:
        """Whether a command is writing its memory, if it is alive, or was cut off in that."""
        try:
            return any(self.saved.iterdir())
        except FileNotFoundError:
            return False

    def is_forking(self) -> bool:
        """Whether a command is copying its memory, or was cut off in that; if it is paused, it is to go on."""
        return os.path.exists(f"{self.path}/{FORKING}")  # noqa: PTH110

    def is_unborn(self) -> bool:
        """Whether it is a fork that has no memory yet, and never will where its making was cut off."""
        return os.path.exists(f"{self.path}/{UNBORN}")  # noqa: PTH110

    def is_renewing(self) -> bool:
        """Whether it is a fork whose guest has been told who it is, and has not answered yet."""
        return os.path.exists(f"{self.path}/{RENEWING}")  # noqa: PTH110

    def is_being_kept(self) -> bool:
        """Whether a snapshot of it is being made, for which its guest stands still, or that was cut off."""
        return os.path.exists(f"{self.path}/snapshots/was-running")  # noqa: PTH110

    def has_layers(self) -> bool:
        """Whether there may be snapshots of it, or its disks stand on layers that others may share."""
        try:
            return os.path.exists(f"{self.path}/snapshots") or bool(self.record.layers)  # noqa: PTH110
        except PolyvisorError:
            return True

    def is_moving(self) -> bool:
        """Whether it is on its way to another host, or from one; see `moves.py`."""
        return os.path.exists(f"{self.path}/move.json")  # noqa: PTH110

    def unreadable(self, file: str, error: Exception) -> PolyvisorError:
        """The error for a file of this directory that makes no sense."""
        return PolyvisorError(
            f"VM '{self.name}': {self.path / file} can't be understood: {error}",
            hint=f"mend the file, or remove the VM: polyvisor rm --force {self.name}",
        )


class VMStore:
    """The VM directories under `home`."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def directory(self, name: str) -> VMDirectory:
        return VMDirectory(self.home.vms / check_name(name))

    def warm(self, name: str) -> VMDirectory:
        """Where the VM `name` lies that is ready to begin from a template, and no VM yet; see `templates.py`."""
        return VMDirectory(self.home.vms / f"{WARM}{check_name(name)}")

    def all_warm(self) -> list[VMDirectory]:
        """All that lie there, by name."""
        with contextlib.suppress(FileNotFoundError):
            return [VMDirectory(path) for path in sorted(self.home.vms.glob(f"{WARM}*")) if path.is_dir()]
        return []

    def names(self) -> list[str]:
        try:
            with os.scandir(self.home.vms) as entries:
                return sorted(entry.name for entry in entries if _is_vm(entry))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise translated(error, "listing the VMs") from error

    def get(self, name: str) -> VMDirectory:
        """The directory of VM `name`; raises NotFound, InvalidInput."""
        directory = self.directory(name)
        if not directory.path.is_dir():
            raise no_such_vm(name)
        return directory

    @contextlib.asynccontextmanager
    async def locked(self, name: str, verb: str, *, patience_s: float | None = None) -> AsyncIterator[VMDirectory]:
        """Hold the lock of VM `name`, which need not exist, for `verb`.

        Waits up to `patience_s` seconds (30 by default); then raises Busy, naming who holds it.
        """
        directory = self.directory(name)
        self.home.prepare()
        path = self.home.locks / f"{name}.lock"
        deadline = time.monotonic() + (LOCK_PATIENCE_S if patience_s is None else patience_s)
        while (fd := _try_lock(path)) is None:
            if time.monotonic() >= deadline:
                raise Busy(f"VM '{name}' is busy: {_holder(path)}", hint="try again when that has ended")
            await pause(_POLL_S)
        try:
            with contextlib.suppress(OSError):  # it is only for whoever wonders who holds the lock
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps({"pid": os.getpid(), "verb": verb}).encode(), 0)
            yield directory
        finally:
            if not directory.path.exists():
                path.unlink(missing_ok=True)
            os.close(fd)

    @contextlib.contextmanager
    def creating(self, name: str, *, durable: bool = True, warm: bool = False) -> Iterator[VMDirectory]:
        """Make VM `name` (whose lock the caller holds): the directory that the block fills appears whole or not at all.

        That is so after a power cut too, unless the caller makes it `durable` later. Raises AlreadyExists.
        """
        final = self.warm(name) if warm else self.directory(name)
        if final.path.exists():
            raise AlreadyExists(f"there is a VM '{name}' already", hint=f"choose another name, or: polyvisor rm {name}")
        staging = VMDirectory(self.home.vms / f".new-{name}")
        with storage_errors(f"creating VM '{name}'"):
            self._sweep(name)
        try:
            with storage_errors(f"creating VM '{name}'"):
                for directory in (staging.path, staging.disks, staging.run):
                    directory.mkdir(mode=0o700)
                yield staging
                if durable:
                    sync_files(staging.path, *(path for path in [self.home.next_user] if path.exists()))
                staging.path.rename(final.path)
                if durable:
                    sync_directory(self.home.vms)
        except BaseException:
            shutil.rmtree(staging.path, ignore_errors=True)
            raise

    def remove(self, name: str) -> bool:
        """Remove the directory of VM `name` (whose lock the caller holds), or finish a removal that was cut off.

        Returns whether there was anything to remove.
        """
        path, gone = self.home.vms / name, self.home.vms / f".gone-{name}"
        with storage_errors(f"removing VM '{name}'"):
            found = self._sweep(name)
            if path.is_dir():
                path.rename(gone)
                sync_directory(self.home.vms)
                shutil.rmtree(gone)
                found = True
        return found

    def sweep(self, name: str) -> None:
        """Remove what a command that was killed left of the making of VM `name`, whose lock the caller holds."""
        with storage_errors(f"removing what is left of VM '{name}'"):
            self._sweep(name)

    def _sweep(self, name: str) -> bool:
        """Remove what commands that were killed left of VM `name`; returns whether there was anything."""
        left = [p for p in (self.home.vms / f".new-{name}", self.home.vms / f".gone-{name}") if p.is_dir()]
        for path in left:
            shutil.rmtree(path)
        return bool(left)


def _is_vm(entry: os.DirEntry[str]) -> bool:
    """Whether it is a VM's directory, or leads to one; whatever else lies about is no reason to fail."""
    try:
        check_name(entry.name)
    except InvalidInput:
        return False
    return entry.is_dir(follow_symlinks=False) or Path(entry.path).is_dir()


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock on `path`, or None where another holds it.

    The last holder may unlink the file between our open and our lock: then it is another file by now, try again.
    """
    with storage_errors(f"locking {path}"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _holder(path: Path) -> str:
    """Who holds the lock on `path`, in words."""
    try:
        holder = json.loads(path.read_bytes())
        return f"'{holder['verb']}' is at work on it (process {holder['pid']})"
    except (OSError, ValueError, TypeError, KeyError):
        return "another command is at work on it"
