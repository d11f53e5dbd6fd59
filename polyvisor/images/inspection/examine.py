"""From an opened image to findings: everything in one place, in the order in which a machine would meet it.

Raises ImageRefused alone, besides what reading the file itself raises: whatever an image has made up ends here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from polyvisor.errors import ImageRefused
from polyvisor.images.inspection.bootconfig import consoles_of, root_of
from polyvisor.images.inspection.budget import Budget, Spent, Unreadable
from polyvisor.images.inspection.disk import Area
from polyvisor.images.inspection.files import Files
from polyvisor.images.inspection.filesystems import Found, look
from polyvisor.images.inspection.findings import Findings, KernelFound, PartitionFound
from polyvisor.images.inspection.firmware import firmware_found
from polyvisor.images.inspection.kernels import Beside, describe_kernel, with_drivers
from polyvisor.images.inspection.system import System
from polyvisor.images.inspection.table import BIOS, ESP, Entry, Table, read_table
from polyvisor.values import dataclass

Read = Callable[[int, int], bytes]


@dataclass(frozen=True, kw_only=True)
class Direct:
    """The kernel beside a disk, its initramfs, and the command line that it gets."""

    name: str
    kernel: bytes
    cmdline: str
    initrd_name: str | None = None
    initrd: bytes | None = None


def examine(name: str, read: Read | None, size: int, direct: Direct | None, budget: Budget | None = None) -> Findings:
    """What is found on the disk of `size` bytes that `read` reads (None: there is none), and in `direct`.

    `name` is the image's, for errors. Raises ImageRefused.
    """
    budget = budget or Budget()
    try:
        disk = Area(read, 0, size, budget) if read else None
        return _examined(disk, direct, budget)
    except Spent as error:
        raise ImageRefused(f"{name}: {error}", hint="it may have been made to do so") from error
    except (Unreadable, struct.error, ValueError, IndexError, OverflowError, RecursionError, MemoryError) as error:
        raise ImageRefused(
            f"{name}: it can't be read: {type(error).__name__}: {str(error)[:80]}", hint="is it damaged?"
        ) from error


def _examined(disk: Area | None, direct: Direct | None, budget: Budget) -> Findings:
    if disk is None:
        beside = Beside()
        kernel = _direct_kernel(direct, beside, budget) if direct else None
        return _with_direct(Findings(disk=False, direct=kernel), direct)
    table = read_table(disk)
    parts = _parts(disk, table)
    system = System([found.files for _, found in parts if found.files], budget)
    beside = Beside()
    described = None
    if direct:
        described = describe_kernel(direct.name, direct.kernel, budget)
        beside = system.beside(described.version)
    findings = Findings(
        disk=True,
        direct=_drivers_of(direct, described, beside, budget) if direct and described else None,
        firmware=firmware_found(disk, table, _esps(parts)),
        partitions=tuple(_described(entry, found) for entry, found in parts),
        kernels=system.kernels(),
        system=system.found(_unread(table, parts)),
    )
    return _with_direct(findings, direct)


def _direct_kernel(direct: Direct, beside: Beside, budget: Budget) -> KernelFound:
    return _drivers_of(direct, describe_kernel(direct.name, direct.kernel, budget), beside, budget)


def _drivers_of(direct: Direct, kernel: KernelFound, beside: Beside, budget: Budget) -> KernelFound:
    return with_drivers(kernel, direct.initrd_name, direct.initrd, beside, budget)


def _with_direct(findings: Findings, direct: Direct | None) -> Findings:
    if direct is None:
        return findings
    return replace(findings, direct_root=root_of(direct.cmdline), direct_consoles=consoles_of(direct.cmdline))


def _parts(disk: Area, table: Table) -> list[tuple[Entry, Found]]:
    """The partitions and what is in them; the whole disk as number 0 where it has none."""
    if not table.entries:
        if table.problem:
            return []
        return [(Entry(number=0, start=0, size=disk.size, kind="the whole disk", partuuid=""), look(disk))]
    return [(entry, _looked(disk, entry)) for entry in table.entries]


def _looked(disk: Area, entry: Entry) -> Found:
    try:
        return look(disk.part(entry.start, entry.size))
    except Unreadable as error:
        return Found(problem=str(error))


def _described(entry: Entry, found: Found) -> PartitionFound:
    return PartitionFound(
        number=entry.number,
        start=entry.start,
        size=entry.size,
        kind=entry.kind,
        partuuid=entry.partuuid or None,
        name=entry.name,
        filesystem=found.kind,
        label=found.label,
        uuid=found.uuid,
        problem=found.problem,
    )


def _esps(parts: list[tuple[Entry, Found]]) -> list[Files | str]:
    return [
        found.files or found.problem or "its EFI system partition holds no file system that is known here"
        for entry, found in parts
        if entry.kind == ESP
    ]


def _unread(table: Table, parts: list[tuple[Entry, Found]]) -> str | None:
    """Why the root file system may not have been found."""
    if table.problem:
        return table.problem
    problems = [f"partition {entry.number}: {found.problem}" for entry, found in parts if found.problem]
    unknown = [
        f"partition {entry.number} holds nothing that is known here"
        for entry, found in parts
        if found.kind is None and found.problem is None and entry.kind != BIOS
    ]
    return next(iter([*problems, *unknown]), None)
