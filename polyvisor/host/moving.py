"""The source's side of a move: a stopped VM is marked, given out as a parcel, and let go of.

From `begin` on it can't start here; from `finish` on it is gone, for good, and only that lets the target start it. In between
`cancel` keeps it, in two steps: once the first is done it can't be let go of any more, so what has arrived at the target may be
discarded, and after the second it can start here again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.errors import NotFound, WrongState
from polyvisor.host import moves, parcel
from polyvisor.host.keys import LOGIN, login_key_of
from polyvisor.host.moves import Cargo, Move, Parting, Phase
from polyvisor.host.plan import disk_count, disk_path, mac_of
from polyvisor.host.record import Record
from polyvisor.host.store import VMDirectory, no_such_vm
from polyvisor.spec.vm import VMSpec

if TYPE_CHECKING:
    from polyvisor.host.host import Host


async def show(host: Host, name: str) -> Parting:
    """What would be carried of VM `name`, and how far its moves are; raises WrongState for a VM that can't be moved."""
    vm, left = host.store.directory(name), moves.left(host.home, name)
    if not vm.path.is_dir():
        return Parting(left=left)
    await _require_stopped(host, vm)
    move = moves.read_note(vm)
    if move is not None and move.phase is Phase.ARRIVING:
        moves.require_settled(vm, "move on")
    if move is not None and moves.has_left(host.home, move.token):
        move = replace(move, phase=Phase.LEFT)
    cargo, _ = await loaded(host, vm)
    return Parting(cargo=cargo, move=move, left=left)


async def begin(host: Host, name: str, move: Move) -> None:
    """Mark VM `name` as leaving by `move`; raises WrongState where it is leaving by another, is alive, or is saved."""
    async with host.store.locked(name, "move") as vm:
        if not vm.path.is_dir():
            raise no_such_vm(name)
        there = moves.read_note(vm)
        if there == move:
            return
        moves.require_settled(vm, f"move to {move.target}")
        await _require_stopped(host, vm)
        if vm.record.id != move.vm_id or move.source_id != moves.host_id(host.home):
            raise NotFound(f"VM '{name}' is not the one that was to be moved", hint="try again")
        await host._tidy_devices(vm)
        moves.write_note(vm, replace(move, phase=Phase.LEAVING))


async def give_out(host: Host, name: str, token: str) -> AsyncGenerator[bytes]:
    """The parcel of VM `name`, which is leaving by the move with this `token`."""
    vm = host.store.get(name)
    move = _leaving(vm, token)
    cargo, paths = await loaded(host, vm)
    for chunk in parcel.packed(move, cargo, paths):
        yield chunk


async def finish(host: Host, name: str, token: str) -> None:
    """Let go of VM `name`, which the target has: it is removed here. Raises WrongState where it is not leaving by this move."""
    async with host.store.locked(name, "move") as vm:
        if not moves.has_left(host.home, token):
            if not vm.path.is_dir():
                raise no_such_vm(name)
            moves.let_go(host.home, replace(_leaving(vm, token), phase=Phase.LEFT))
        if vm.path.is_dir() and (move := moves.read_note(vm)) is not None and move.token == token:
            await host.drivers.end(vm)  # what Xen's driver had given it of this host
            host.store.remove(name)


async def cancel(host: Host, name: str, token: str, *, done: bool) -> None:
    """Keep VM `name`: first so that it can't leave by this move any more, then (`done`) so that it can start again."""
    async with host.store.locked(name, "move") as vm:
        if moves.has_left(host.home, token):
            raise WrongState(f"VM '{name}' has left this host", hint="repeat the move: it comes to its end there")
        if not vm.path.is_dir():
            raise no_such_vm(name)
        move = moves.read_note(vm)
        if move is None or move.token != token or move.phase is Phase.ARRIVING:
            return
        if done:
            moves.drop_note(vm)
        elif move.phase is not Phase.CANCELLING:
            moves.write_note(vm, replace(move, phase=Phase.CANCELLING))


def _leaving(vm: VMDirectory, token: str) -> Move:
    move = moves.read_note(vm)
    if move is None or move.token != token or move.phase is not Phase.LEAVING:
        raise WrongState(f"VM '{vm.name}' is not leaving by this move", hint="it was cancelled; begin it again")
    return move


async def _require_stopped(host: Host, vm: VMDirectory) -> None:
    if vm.has_layers():
        from polyvisor.host.snapshotting import require_none

        require_none(vm, "be moved")
    if await host.drivers.lives(vm):
        state = (await host.drivers.of(vm).inspect(vm)).state
        raise WrongState(f"VM '{vm.name}' is {state}: only a stopped VM can be moved", hint=f"polyvisor stop {vm.name}")
    if vm.is_saved():
        hint = f"polyvisor start {vm.name}, then polyvisor stop {vm.name}; start --fresh throws away what is saved"
        raise WrongState(f"VM '{vm.name}' is saved: only a stopped VM can be moved", hint=hint)


def _with_addresses(record: Record) -> VMSpec:
    """The spec as it travels: cards are numbered from 0 there, and keep the addresses that follow from their numbers here."""
    nics = tuple(
        nic if record.nic_number(i) == i else replace(nic, mac=mac_of(record, i))
        for i, nic in enumerate(record.spec.nics)
    )
    return replace(record.spec, nics=nics)


async def loaded(host: Host, vm: VMDirectory, place: Path | None = None) -> tuple[Cargo, list[tuple[str, Path]]]:
    """The cargo of a VM, and its files: what they are called in the parcel, and where they are.

    Its disks are in `place`, where they are not whole in its own directory.
    """
    record = vm.record
    image = host.images.store.by_id(record.image_id)
    must, may = parcel.expected(record.spec, image)
    there = {
        str(disk_path(i)): place / disk_path(number) if place else vm.path / disk_path(number, record.generation)
        for i in range(disk_count(record.spec, image))
        for number in [record.disk_number(i)]
    }
    paths = [(name, there.get(name, vm.path / name)) for name in sorted(must)]
    paths += [(name, vm.path / name) for name in sorted(may - {str(LOGIN)}) if (vm.path / name).exists()]
    if str(LOGIN) in may and image.user is not None:
        paths.append((str(LOGIN), (await login_key_of(vm.path, host.home.keys))[0]))
    cargo = Cargo(
        id=record.id,
        created_at=record.created_at,
        spec=_with_addresses(record),
        memory_mib=record.memory_mib,
        image=image,
        data_bytes=parcel.data_bytes([path for _, path in paths]),
    )
    return cargo, paths
