"""The one place that calls qemu-img.

Every node that qemu-img opens is named with its driver, for the format and for the file below it: nothing is ever
probed, because the content of a raw disk belongs to the guest, which could write another format's header into it.
Disks that strangers made are read under limits on memory, CPU time and output; by then `formats.inspect` has refused
whatever names another file. See docs/design/untrusted-images.md.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyvisor.errors import ImageRefused, PolyvisorError, ProcessFailed, Unavailable
from polyvisor.files import storage_errors, translated
from polyvisor.operation import Progress, Step, silent
from polyvisor.process import Completed, find_program, run
from polyvisor.values import dataclass
from polyvisor.wheel import from_wheel

if TYPE_CHECKING:
    from polyvisor.images.formats import Disk

MIB = 1 << 20

_MEMORY = 2 << 30  # address space; 600 MiB suffice for the images tried
_READ_CPU_S = 300
_MIN_RATE = 10 * MIB  # bytes a second that a conversion makes at least, even of compressed data
_SMALL_OUTPUT = 1 * MIB
_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# Formats by their names: `run` needs this module too, and must not wait for all the parsers to be loaded.
_DRIVERS = {"vhd": "vpc"}
_CHECKABLE = ("qcow2", "vdi", "vhdx", "vmdk")
_LEAKS_ONLY = 3  # qemu-img check: space is wasted, nothing is wrong
_PROGRESS = re.compile(rb"\((\d+\.\d+)/100%\)")


@dataclass(frozen=True)
class Measured:
    """What a disk needs as qcow2, in bytes: as it is, and with every cluster written."""

    required: int
    fully_allocated: int


def program() -> str:
    """The path of qemu-img, the system's or the wheel's; raises Unavailable with the package to install."""
    try:
        return find_program("qemu-img", package="qemu-utils")
    except Unavailable:
        if path := from_wheel("qemu-img"):
            return path
        raise


async def create_overlay(path: Path, backing: Path, size_mib: int | None) -> None:
    """Make `path` a qcow2 disk that reads what it lacks from the qcow2 file `backing`, and keeps what a VM writes.

    `size_mib` is the disk's size; None: as large as `backing`. An existing `path` is replaced.
    Raises StorageFull, NotPermitted, Unavailable (no qemu-img), PolyvisorError, ProcessFailed.
    """
    absolute = _existing(backing, f"making the disk {path}")
    await _create(path, size_mib * MIB if size_mib is not None else None, "-b", str(absolute), "-F", "qcow2")


async def create_on_layer(path: Path, layer: Path, size: int) -> None:
    """Make `path` an empty qcow2 disk of `size` bytes above the qcow2 file `layer`, which is not even opened.

    A running VM may still have it, and what it says of files below it was once in the reach of a VM's process.
    Raises as `create_overlay`.
    """
    await _create(path, size, "-u", "-b", str(layer.absolute()), "-F", "qcow2")


async def create_blank(path: Path, size_mib: int) -> None:
    """Make `path` an empty qcow2 disk of `size_mib`; an existing one is replaced. Raises as `create_overlay`."""
    await _create(path, size_mib * MIB)


def node(disk: Disk, filename: str) -> str:
    """`disk` in the file `filename` as qemu-img's argument, with every driver named and no backing file."""
    file: dict[str, Any] = {"driver": "file", "filename": filename, "read-only": True}
    if disk.member is not None:
        # qemu wants whole sectors; the archive pads its members to them.
        file = {"driver": "raw", "offset": disk.offset, "size": -(-disk.size // 512) * 512, "file": file}
        file["read-only"] = True
    top: dict[str, Any] = {"driver": _DRIVERS.get(disk.format, str(disk.format)), "read-only": True, "file": file}
    if disk.format in ("qcow2", "vmdk"):
        top["backing"] = None
    return "json:" + json.dumps(top)


async def check(disk: Disk, filename: str, name: str) -> None:
    """Refuse a disk whose metadata contradict each other or lead past the file's end; `name` is for the error.

    Raises ImageRefused. VHD and raw disks have nothing that qemu-img could check.
    """
    if disk.format not in _CHECKABLE:
        return
    argv = ["check", "-q", node(disk, filename)]
    try:
        await _limited(argv, cpu_s=_READ_CPU_S, output=_SMALL_OUTPUT, on_output=lambda piece: None)
    except ProcessFailed as error:
        if error.status != _LEAKS_ONLY:
            raise _unreadable(error, name) from error


async def measure(disk: Disk, filename: str, name: str) -> Measured:
    """How much space `disk` needs as qcow2; raises ImageRefused where it can't be read."""
    argv = ["measure", "--output=json", "-O", "qcow2", node(disk, filename)]
    try:
        raw = json.loads((await _limited(argv, cpu_s=_READ_CPU_S, output=_SMALL_OUTPUT)).stdout)
    except ProcessFailed as error:
        raise _unreadable(error, name) from error
    return Measured(required=raw["required"], fully_allocated=raw["fully-allocated"])


async def convert(
    disk: Disk, filename: str, target: Path, measured: Measured, name: str, progress: Progress = silent
) -> None:
    """Copy `disk` into the new qcow2 file `target`, reporting the guest's bytes.

    Raises StorageFull, NotPermitted, ImageRefused where `disk` can't be read to its end.
    """

    def report(piece: bytes) -> None:
        for percent in _PROGRESS.findall(piece)[-1:]:
            progress(Step("convert", int(disk.virtual_size * float(percent) / 100), disk.virtual_size, "B"))

    argv = ["convert", "-p", "-O", "qcow2", node(disk, filename), str(target)]
    try:
        await _limited(
            argv,
            cpu_s=_READ_CPU_S + measured.required // _MIN_RATE,
            output=measured.fully_allocated + 16 * MIB,
            on_output=report,
        )
    except ProcessFailed as error:
        found = _failure(error, f"converting {name}")
        raise (_unreadable(error, name) if found is error else found) from error


async def pack(raw: Path, target: Path, size: int, progress: Progress = silent) -> None:
    """Write the raw disk `raw` of `size` bytes, one of ours, as the new qcow2 file `target`, compressed.

    By zlib, which every QEMU reads: Debian's for guests of Xen is built without zstd, which would take a fifth of the time.
    Raises StorageFull, NotPermitted, ProcessFailed.
    """

    def report(piece: bytes) -> None:
        for percent in _PROGRESS.findall(piece)[-1:]:
            progress(Step("writing the disk", int(size * float(percent) / 100), size, "B"))

    options = ["-c", "-o", "compression_type=zlib"]
    argv = [program(), "convert", "-p", "-f", "raw", "-O", "qcow2", *options, str(raw), str(target)]
    try:
        await run(argv, on_output=report)
    except ProcessFailed as error:
        raise _failure(error, f"writing {target}") from error


async def resize(path: Path, size: int) -> None:
    """Make the qcow2 disk `path`, one of ours, `size` bytes large."""
    try:
        await run([program(), "resize", "-q", "-f", "qcow2", str(path), str(size)], timeout_s=60)
    except ProcessFailed as error:
        raise _failure(error, f"resizing {path}") from error


async def grow(path: Path, size: int) -> None:
    """Make the qcow2 disk `path` of a VM `size` bytes large, which is more than it has; what is below it is not even opened.

    Raises StorageFull, NotPermitted, ImageRefused, ProcessFailed.
    """
    _require_own(path)
    try:
        await run([program(), "resize", "-q", _chain([path], written=1), str(size)], timeout_s=60)
    except ProcessFailed as error:
        raise _failure(error, f"growing {path}") from error


async def rebase(path: Path, backing: Path) -> None:
    """Write into the qcow2 disk `path` that `backing` is below it; neither is read for that.

    Raises StorageFull, NotPermitted, ProcessFailed.
    """
    argv = [program(), "rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(backing.absolute()), str(path)]
    try:
        await run(argv, timeout_s=60)
    except ProcessFailed as error:
        raise _failure(error, f"giving {path} its image") from error


async def flatten(
    files: Sequence[Path], base: Path | None, target: Path, size: int, progress: Progress = silent
) -> None:
    """Make `target` one qcow2 disk of `size` bytes, alone above the qcow2 file `base`, that holds what all of `files` do.

    These are qcow2 files of ours, each above the next, the last above `base`; where there is none, nothing is below `target`.
    What is in `base` is not copied. Raises StorageFull, NotPermitted, ImageRefused, ProcessFailed.
    """
    for path in files:
        _require_own(path)
    what = f"writing {target}"
    if base is None:
        await _copy(_chain(files), target, size, what, progress)
        return
    await create_on_layer(target, base, size)
    for i in reversed(range(len(files))):  # each holds what differs from the one below it
        await _copy(
            _chain([*files[i:], base]), target, size, what, progress, "-n", "-B", str(base.absolute()), "-F", "qcow2"
        )


async def commit(files: Sequence[Path]) -> None:
    """Write what the first of `files` holds into the second; both are qcow2 files of ours, each of `files` above the next.

    The first stays as it is, so it may be done again. Raises as `flatten`.
    """
    for path in files[:2]:
        _require_own(path)
    try:
        await run([program(), "commit", "-q", "-d", _chain(files, written=2)])
    except ProcessFailed as error:
        raise _failure(error, f"writing {files[1]}") from error


async def _copy(source: str, target: Path, size: int, what: str, progress: Progress, *options: str) -> None:
    def report(piece: bytes) -> None:
        for percent in _PROGRESS.findall(piece)[-1:]:
            progress(Step("copying the disk", int(size * float(percent) / 100), size, "B"))

    try:
        await run([program(), "convert", "-p", "-O", "qcow2", *options, source, str(target)], on_output=report)
        target.chmod(0o600)
    except ProcessFailed as error:
        raise _failure(error, what) from error


def _chain(files: Sequence[Path], *, written: int = 0) -> str:
    """The qcow2 files, each above the next, as qemu-img's argument: what they say of files below them counts for nothing.

    All but the first, so many, that are `written` to are read-only.
    """
    below: dict[str, Any] | None = None
    for i, path in reversed(list(enumerate(files))):
        access = {} if i < written else {"read-only": True}
        file = {"driver": "file", "filename": str(path.absolute()), **access}
        below = {"driver": "qcow2", **access, "file": file, "backing": below}
    return "json:" + json.dumps(below)


def _require_own(path: Path) -> None:
    """Refuse a disk of a VM that names an external data file, which its process may have put there, or is unsound."""
    from polyvisor.images.formats import Reader, qcow2

    with storage_errors(f"reading {path}"):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            qcow2.inspect(Reader(file, path.name), backed=True)


async def info(path: Path) -> dict[str, Any]:
    """What qemu-img says of the qcow2 disk `path`, one of ours."""
    top = {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": str(path), "read-only": True}}
    done = await run([program(), "info", "--output=json", "json:" + json.dumps(top)], timeout_s=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _existing(path: Path, what: str) -> Path:
    with storage_errors(what):
        path.stat()
    return path.absolute()


async def _create(path: Path, size_bytes: int | None, *options: str) -> None:
    """Run `qemu-img create` into a temporary file, which then takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    absolute = os.path.abspath(temporary)  # noqa: PTH100 (nothing blocks)
    size = [] if size_bytes is None else [str(size_bytes)]
    try:
        await run([program(), "create", "-q", "-f", "qcow2", *options, absolute, *size], timeout_s=60)
        _put_in_place(temporary, path)
    except ProcessFailed as error:
        raise _failure(error, f"making the disk {path}") from error
    finally:
        _remove(temporary)


def _put_in_place(temporary: Path, path: Path) -> None:
    with storage_errors(f"making the disk {path}"):
        temporary.chmod(0o600)
        temporary.replace(path)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


async def _limited(
    argv: Sequence[str], *, cpu_s: int, output: int, on_output: Callable[[bytes], None] | None = None
) -> Completed:
    """Run qemu-img on a stranger's disk: bounded memory, `cpu_s` seconds of CPU, files of `output` bytes at most."""
    limits = [f"--as={_MEMORY}", f"--cpu={cpu_s}", f"--fsize={output}", "--core=0"]
    prlimit = find_program("prlimit", package="util-linux")
    return await run([prlimit, *limits, program(), *argv], timeout_s=20 * cpu_s, on_output=on_output)


def _failure(error: ProcessFailed, what: str) -> PolyvisorError:
    """Why qemu-img failed while doing `what`: a full disk and missing rights by their own types."""
    for number in _STORAGE_ERRNOS:
        if os.strerror(number) in error.stderr:
            return translated(OSError(number, os.strerror(number)), what)
    return error


def _unreadable(error: ProcessFailed, name: str) -> ImageRefused:
    """The refusal of a disk that qemu-img could not read."""
    if error.status in (-signal.SIGABRT, -signal.SIGXCPU, -signal.SIGKILL, -signal.SIGXFSZ):
        return ImageRefused(
            f"{name}: reading it takes too much memory, time or space",
            hint="it may have been made to do so; convert it where it was made",
        )
    if '"write" lock' in error.stderr:
        return ImageRefused(
            f"{name}: another program is writing to it", hint="stop the VM that uses it, then try again"
        )
    words = [line for line in error.stderr.strip().splitlines() if line.strip()]
    last = re.sub(r"json:\{.*\}|/proc/\S+", "it", words[-1].removeprefix("qemu-img: ")) if words else "no reason given"
    return ImageRefused(f"{name}: it can't be read: {last[:200]}", hint="it is truncated or corrupt: get it again")
