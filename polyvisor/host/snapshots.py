"""Snapshots of a VM as they lie in its directory.

    <vm>/snapshots/<name>/snapshot.json   what it is: the layers that its disks were, and the snapshot before it
                         /disks/          UEFI variables; with memory also the seed that the guest was started with
                         /memory          memory and devices, where they belong to it (see `saved.py`)
                         /saved.json      what that memory is, and what has to be as it was
    <vm>/snapshots/.new-<name>/           being made
    <vm>/snapshots/.gone-<name>/          being removed
    <vm>/snapshots/reverting              the name of the one that the VM is being brought back to

They are a tree: `parent` is the snapshot that the VM's disks had begun with. Verbs are in `snapshotting.py`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from polyvisor.errors import InvalidInput, NotFound, PolyvisorError
from polyvisor.files import read_small, translated
from polyvisor.host.record import FORMAT, checked
from polyvisor.host.store import VMDirectory
from polyvisor.spec.parse import structure, unstructure
from polyvisor.values import dataclass

NOTE = "snapshot.json"
MAX_DESCRIPTION = 1000
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}\Z")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A snapshot, as it is kept: `layers` are its disks, in their order; `memory_bytes` is None for one without memory.

    `disks` are the numbers of its disks, where they are not 0, 1, and so on.

    `running` says that the guest ran when it was made: without memory its disks are as after a power cut.
    """

    name: str
    created_at: float
    layers: tuple[str, ...] = ()
    parent: str | None = None
    description: str = ""
    running: bool = False
    memory_bytes: int | None = None
    disks: tuple[int, ...] = ()

    @property
    def disk_numbers(self) -> tuple[int, ...]:
        return self.disks or tuple(range(len(self.layers)))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot as it is shown; times in seconds since the epoch.

    `parent` is the snapshot before it; `current` the one that the VM goes on from. `memory_bytes` is the size of its memory,
    None for one without; `disk_bytes` what is on the host of the disks as they were from its parent until it. `running` says
    that the guest ran when it was made: without memory, its disks are as after a power cut.
    """

    name: str
    created_at: float
    parent: str | None = None
    current: bool = False
    description: str = ""
    running: bool = False
    memory_bytes: int | None = None
    disk_bytes: int = 0


def check_snapshot_name(name: str) -> str:
    """`name`, where it may name a snapshot; raises InvalidInput."""
    if not _NAME.match(name) or ".." in name:
        hint = "use 1 to 63 of A-Z a-z 0-9 . _ -, beginning with a letter or a digit"
        raise InvalidInput("snapshot", name, "is not a name for a snapshot", hint=hint)
    return name


def directory(vm: VMDirectory, name: str) -> Path:
    return vm.path / "snapshots" / check_snapshot_name(name)


def read_all(vm: VMDirectory) -> list[Kept]:
    """The snapshots of a VM, the oldest first; raises PolyvisorError where one can't be understood."""
    try:
        with os.scandir(f"{vm.path}/snapshots") as entries:
            names = [entry.name for entry in entries if _NAME.match(entry.name) and entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise translated(error, f"listing the snapshots of VM '{vm.name}'") from error
    return sorted((read(vm, name) for name in names), key=lambda each: (each.created_at, each.name))


def read(vm: VMDirectory, name: str) -> Kept:
    """Snapshot `name` of a VM; raises NotFound with the nearest names, PolyvisorError where it can't be understood."""
    path = directory(vm, name) / NOTE
    try:
        return structure(checked(read_small(str(path))), Kept)
    except FileNotFoundError as error:
        raise _no_such(vm, name) from error
    except OSError as error:
        raise translated(error, f"reading snapshot '{name}' of VM '{vm.name}'") from error
    except (ValueError, InvalidInput) as error:
        hint = f"remove it: polyvisor snapshot rm {vm.name} {name}"
        raise PolyvisorError(f"{path} can't be understood: {error}", hint=hint) from error


def to_json(kept: Kept) -> str:
    return json.dumps({"format": FORMAT, **unstructure(kept)}, indent=2) + "\n"


def layers_of(vm: VMDirectory) -> set[str]:
    """The layers that a VM's snapshots stand on."""
    return {layer for kept in read_all(vm) for layer in kept.layers}


def _no_such(vm: VMDirectory, name: str) -> NotFound:
    from difflib import get_close_matches

    path = vm.path / "snapshots"
    names = [each.name for each in path.iterdir() if _NAME.match(each.name)] if path.is_dir() else []
    near = get_close_matches(name, names, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"polyvisor snapshot ls {vm.name} shows those that are"
    return NotFound(f"VM '{vm.name}' has no snapshot '{name}'", hint=hint)
