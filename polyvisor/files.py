"""Small file operations that must not leave halves: atomic writes, synced directories, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from polyvisor.errors import NotPermitted, PolyvisorError, StorageFull
from polyvisor.waiting import pause

_POLL_S = 0.02


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Translate the operating system's storage errors that happen while doing `what`."""
    try:
        yield
    except OSError as error:
        raise translated(error, what) from error


def translated(error: OSError, what: str) -> PolyvisorError:
    """The Polyvisor error that says what the operating system's `error` means for `what`."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{what}: the disk is full{where}", hint="free some space: polyvisor image ls; polyvisor ls")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotPermitted(f"{what}: {error.strerror}{where}", hint="check who owns it, or set POLYVISOR_HOME")
    return PolyvisorError(f"{what}: {error.strerror or error}{where}")


def write_atomic(path: Path, data: bytes | str, *, mode: int = 0o600, durable: bool = True) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old content or the new, never a part.

    Who writes many files makes them durable later, all at once. Raises OSError.
    """
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)  # whatever the umask is, which may be a strict one
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def write_new(path: Path, data: str) -> None:
    """Write a file into a directory that is still being made: nobody reads it yet, and its maker makes it durable.

    Raises OSError.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(data)


def make_directory(path: Path, bits: int) -> None:
    """Make directory `path` unless it is there; it has permissions `bits` from its first moment. Raises OSError.

    The umask could spoil them, and is not ours to set: it belongs to all the threads of a process.
    """
    if path.is_dir():
        return
    from tempfile import mkdtemp  # not needed by most commands

    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        staging.chmod(bits)
        staging.rename(path)  # fails where somebody was quicker and has put something into it
    except OSError:
        staging.rmdir()
        if not path.is_dir():
            raise


def sync_directory(path: Path) -> None:
    """Make renames inside directory `path` durable."""
    _sync(path, os.O_DIRECTORY)


def _sync(path: Path, flags: int = 0) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_files(*paths: Path) -> None:
    """Make what is in files durable, or in everything below directories."""
    for path in paths:
        for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
            if stat.S_IFMT(each.lstat().st_mode) in (stat.S_IFREG, stat.S_IFDIR):
                _sync(each)


def read_small(path: str) -> bytes:
    """The content of a small file, in the fewest steps: a list of many VMs reads a thousand of them. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, os.fstat(fd).st_size + 1)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(fd)


async def take_flock(fd: int, waiting: Callable[[], None] = lambda: None) -> None:
    """Wait for an exclusive flock(2) on an open file; `waiting` is called once where another process has it.

    The kernel drops it when the file is closed, or its holder dies.
    """
    told = False
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                waiting()
                told = True
            await pause(_POLL_S)
        else:
            return


def is_flocked(path: Path | str) -> bool:
    """Whether some process holds an exclusive flock(2) on `path`; a missing file is not locked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)
