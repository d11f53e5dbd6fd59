"""A VM on its way from one host to another: the notes that see to it that exactly one of them can start it.

    <vms>/<name>/move.json       at the source: it is leaving, or stays after all; at the target: it has come, and is held
    <home>/moved/<token>.json    at the source, for good: it has let go of the VM, which the target may release
    <home>/arrived/<token>.json  at the target, for good: it has released the VM, and takes it in by this move no second time
    <home>/id                    who this host is, whatever others call it

A target releases what the source has let go of, and nothing else: the second of these files is the proof. Who writes them, and
when, is in `moving.py` and `arrival.py`; why so, in docs/design/move.md.
"""

from __future__ import annotations

import json
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.errors import InvalidInput, PolyvisorError, WrongState
from polyvisor.files import make_directory, read_small, storage_errors, sync_directory, write_atomic
from polyvisor.host.record import FORMAT, checked, new_id
from polyvisor.images.image import Image
from polyvisor.spec.parse import structure, unstructure
from polyvisor.spec.vm import MAX_MEMORY_MIB, MIN_MEMORY_MIB, Hypervisor, Mode, VMSpec, check_name
from polyvisor.values import dataclass

if TYPE_CHECKING:
    from polyvisor.home import Home
    from polyvisor.host.store import VMDirectory

NOTE = "move.json"
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_MAX_HOST = 300
_MAX_SECONDS = 1e11


class Phase(StrEnum):
    """How far a move is: at the source the first three, at the target the last."""

    LEAVING = "leaving"
    CANCELLING = "cancelling"
    LEFT = "left"
    ARRIVING = "arriving"


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move: of VM `name` with the id `vm_id`, to be called `new_name`.

    `source` and `target` are what whoever moves it calls the two hosts, for people alone; the ids tell who they are.
    `hypervisor` and `mode` take the place of the spec's, where they are given.
    """

    token: str
    vm_id: str
    name: str
    new_name: str
    source: str
    source_id: str
    target: str
    target_id: str
    hypervisor: Hypervisor | None = None
    mode: Mode | None = None
    phase: Phase = Phase.LEAVING

    def __post_init__(self) -> None:
        for key in ("token", "vm_id", "source_id", "target_id"):
            check_id(getattr(self, key), key)
        check_name(self.name)
        check_name(self.new_name)
        for host in (self.source, self.target):
            if not host.isprintable() or len(host) > _MAX_HOST:
                raise InvalidInput("host", host, "is not what one calls a host")

    def __str__(self) -> str:
        """The command that makes it."""
        words = [*(["--host", self.source] if self.source != "local" else []), "move", self.name, "--to", self.target]
        words += ["--name", self.new_name] if self.new_name != self.name else []
        words += ["--hypervisor", self.hypervisor] if self.hypervisor else []
        return " ".join(["polyvisor", *words, *(["--mode", self.mode] if self.mode else [])])


@dataclass(frozen=True, kw_only=True)
class Cargo:
    """What a VM is beside the files that are carried: its record, and the image that it stands on.

    `data_bytes` is what the files hold, without holes.
    """

    id: str
    created_at: float
    spec: VMSpec
    memory_mib: int
    image: Image
    data_bytes: int

    def __post_init__(self) -> None:
        check_id(self.id, "id")
        if not 0 <= self.created_at < _MAX_SECONDS:
            raise InvalidInput("created_at", self.created_at, "is no time")
        if not MIN_MEMORY_MIB <= self.memory_mib <= MAX_MEMORY_MIB:
            raise InvalidInput("memory_mib", self.memory_mib, "is out of range")
        if self.data_bytes < 0:
            raise InvalidInput("data_bytes", self.data_bytes, "is no size")


@dataclass(frozen=True, kw_only=True)
class Parting:
    """A VM as its source sees it: what would be carried (None: there is no such VM), and the move that is under way.

    `left` are the moves by which VMs of that name have left this host, the latest last.
    """

    cargo: Cargo | None = None
    move: Move | None = None
    left: tuple[Move, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Landing:
    """What a target has to say: whether the VM has `arrived` already, and the name of the image there that it can stand on.

    `notes` are what a person should know of it.
    """

    arrived: bool = False
    image_id: str | None = None
    notes: tuple[str, ...] = ()


def check_id(text: str, key: str) -> str:
    """`text`, where it is a UUID; raises InvalidInput."""
    if not _ID.match(text):
        raise InvalidInput(key, text, "is not a UUID")
    return text


def host_id(home: Home) -> str:
    """Who this host is: a UUID, made at first use."""
    path = home.path / "id"
    with storage_errors("reading this host's id"):
        try:
            found = read_small(str(path)).decode(errors="replace").strip()
        except FileNotFoundError:
            home.prepare()
            made = path.with_name(f".id.{os.getpid()}")
            write_atomic(made, f"{new_id()}\n")
            try:
                os.link(made, path)  # fails where another command was quicker
            except FileExistsError:
                pass
            finally:
                made.unlink(missing_ok=True)
            sync_directory(home.path)
            found = path.read_text().strip()
    if not _ID.match(found):
        raise PolyvisorError(f"{path} is not the id of a host", hint="remove it, unless VMs are being moved")
    return found


# The note in a VM's directory


def read_note(vm: VMDirectory) -> Move | None:
    """The move that the VM is in, or None; raises PolyvisorError where the note can't be understood."""
    return _read(vm.path / NOTE)


def write_note(vm: VMDirectory, move: Move) -> None:
    with storage_errors(f"noting the move of VM '{vm.name}'"):
        write_atomic(vm.path / NOTE, _to_json(move))


def drop_note(vm: VMDirectory) -> None:
    with storage_errors(f"ending the move of VM '{vm.name}'"):
        (vm.path / NOTE).unlink(missing_ok=True)
        sync_directory(vm.path)


def require_settled(vm: VMDirectory, verb: str) -> None:
    """Raise WrongState for a VM that is being moved: nobody may `verb` it here before that has come to its end."""
    if not vm.is_moving() or (move := read_note(vm)) is None:
        return
    if move.phase is Phase.ARRIVING:
        problem = f"VM '{vm.name}' is arriving from {move.source}, which may have it still: it can't {verb}"
        raise WrongState(problem, hint=f"let that come to its end where it was begun: {move}")
    back = f"polyvisor move {vm.name} --cancel"
    if move.phase is Phase.CANCELLING:
        raise WrongState(f"VM '{vm.name}': its move is being cancelled: it can't {verb}", hint=f"repeat: {back}")
    problem = f"VM '{vm.name}' is moving to {move.target}: it can't {verb}"
    raise WrongState(problem, hint=f"repeat the move ({move}), or keep it: {back}")


def describe(vm: VMDirectory) -> str | None:
    """What a list of VMs says of a move, in a few words."""
    try:
        move = read_note(vm)
    except PolyvisorError as error:
        return error.message
    if move is None:
        return None
    if move.phase is Phase.ARRIVING:
        return f"arriving from {move.source}"
    return f"moving to {move.target}" + (", which is being cancelled" if move.phase is Phase.CANCELLING else "")


# What this host has let go of


def let_go(home: Home, move: Move) -> None:
    """Note, for good, that this host will not start the VM of `move` again."""
    _keep(home.path / "moved", move)


def _keep(directory: Path, move: Move) -> None:
    with storage_errors(f"noting how far the move of VM '{move.name}' is"):
        make_directory(directory, 0o700)
        sync_directory(directory.parent)
        write_atomic(directory / f"{move.token}.json", _to_json(move))


def has_left(home: Home, token: str) -> bool:
    return (home.path / "moved" / f"{check_id(token, 'token')}.json").exists()


def left(home: Home, name: str) -> tuple[Move, ...]:
    """The moves by which VMs called `name` have left this host, the latest last."""
    directory = home.path / "moved"
    with storage_errors("reading which VMs have left"):
        if not directory.is_dir():
            return ()
        paths = sorted(directory.glob("[0-9a-f]*.json"), key=lambda path: path.stat().st_mtime)
    moves = [_read(path) for path in paths]
    return tuple(move for move in moves if move is not None and move.name == name)


# What this host has released


def note_arrival(home: Home, move: Move) -> None:
    """Note, for good, that the VM of `move` has come: the same parcel, late, is not taken in again."""
    _keep(home.path / "arrived", move)


def has_arrived(home: Home, token: str) -> bool:
    return (home.path / "arrived" / f"{check_id(token, 'token')}.json").exists()


def _to_json(move: Move) -> str:
    return json.dumps({"format": FORMAT, **unstructure(move)}, indent=2) + "\n"


def _read(path: Path) -> Move | None:
    try:
        return structure(checked(read_small(str(path))), Move)
    except FileNotFoundError:
        return None
    except (ValueError, InvalidInput) as error:
        raise PolyvisorError(
            f"{path} can't be understood: {error}", hint="it was written by another program"
        ) from error
