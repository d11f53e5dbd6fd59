"""A stopped VM from one host to another, through this machine; both are any `HostApi`.

The order is what keeps it one VM: the source marks it as leaving, the target takes it in and holds it, the source lets go
of it, for good, and then the target releases it. Each step is safe to repeat, and this may end between any two: whoever
repeats the move goes on where it stood. See docs/design/move.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from polyvisor.errors import (
    ConnectionLost,
    InvalidInput,
    NotFound,
    PolyvisorError,
    TimedOut,
    Unavailable,
    WrongState,
)
from polyvisor.host.api import HostApi
from polyvisor.host.moves import Cargo, Move, Parting, Phase
from polyvisor.host.store import no_such_vm
from polyvisor.images.image import Image
from polyvisor.operation import Progress, Step, silent
from polyvisor.remote.host import RECONNECT_S, RemoteHost
from polyvisor.remote.transfer import copy_image
from polyvisor.spec.vm import Hypervisor, Mode
from polyvisor.status import VMStatus
from polyvisor.values import dataclass

_PAUSE_S = 0.3


@dataclass(frozen=True)
class Place:
    """A host, and what the user calls it; this machine is `local`."""

    name: str
    host: HostApi


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What shall be otherwise at the target: the VM's name, and what it runs on."""

    name: str | None = None
    hypervisor: Hypervisor | None = None
    mode: Mode | None = None


async def move_vm(
    source: Place, name: str, target: Place, wish: Wish, progress: Progress = silent
) -> tuple[VMStatus, tuple[str, ...]]:
    """Bring VM `name` from `source` to `target`, or to its end what was begun; returns its status there, and notes for people.

    Where it is there already, that is success. Raises WrongState for a VM that is not stopped, whatever keeps it from running
    at the target, before anything is changed, and ConnectionLost; where the target refuses it, the source keeps it.
    """
    progress(Step("checking"))
    source_id, target_id = await source.host.host_id(), await target.host.host_id()
    if source_id == target_id:
        raise InvalidInput("to", target.name, "is the host that the VM is on", hint="name another: polyvisor host ls")
    parting = await source.host.move_show(name)
    if parting.cargo is None:
        return await target.host.arrival_release(_gone(parting, name, target, target_id, wish)), ()
    move = parting.move or Move(
        token=str(uuid.uuid4()),
        vm_id=parting.cargo.id,
        name=name,
        new_name=wish.name or name,
        source=source.name,
        source_id=source_id,
        target=target.name,
        target_id=target_id,
        hypervisor=wish.hypervisor,
        mode=wish.mode,
    )
    _check_same(move, target_id, wish)
    notes: tuple[str, ...] = ()
    if move.phase is not Phase.LEFT:
        notes = await _bring(source.host, target.host, parting.cargo, move, progress)
    await _let_go(source.host, target.host, move)
    return await target.host.arrival_release(move), notes


async def cancel_move(source: Place, name: str, find_target: Callable[[Move], Place]) -> tuple[VMStatus, str | None]:
    """Let `source` keep VM `name`; returns its status, and what is left to be done by hand, if anything is.

    `find_target` gives the host that the VM was to go to, or raises NotFound. Raises WrongState for a VM that has left.
    """
    parting = await source.host.move_show(name)
    if parting.cargo is None:
        if parting.left:
            last = parting.left[-1]
            raise WrongState(
                f"VM '{name}' has left for {last.target}", hint=f"bring it back from there: --to {source.name}"
            )
        raise no_such_vm(name)
    left = None
    if (move := parting.move) is not None:
        await source.host.move_cancel(name, move.token)
        left = await _clean(find_target, move)
        await source.host.move_cancel(name, move.token, done=True)
    return (await source.host.show(name)).status, left


async def _clean(find_target: Callable[[Move], Place], move: Move) -> str | None:
    """Discard what has arrived; where the target can't be reached, say what stays there: it can never start."""
    try:
        target = find_target(move).host
        if await target.host_id() == move.target_id:
            await target.arrival_cancel(move.new_name, move.token)
            return None
        reason = "that name leads to another host by now"
    except (NotFound, Unavailable, TimedOut) as error:
        reason = error.message
    return f"what has arrived on {move.target} stays there, held, until it is removed (rm --force {move.new_name}): {reason}"


def _gone(parting: Parting, name: str, target: Place, target_id: str, wish: Wish) -> Move:
    """The move by which the VM, which is not at the source any more, has gone to the target; raises NotFound."""
    for move in reversed(parting.left):
        if move.target_id == target_id and wish.name in (None, move.new_name):
            return move
    if parting.left:
        last = parting.left[-1]
        raise NotFound(
            f"VM '{name}' is not there any more: it was moved to {last.target}", hint=f"it is '{last.new_name}' there"
        )
    raise NotFound(f"there is no VM '{name}' to be moved to {target.name}", hint="polyvisor ls shows those that are")


def _check_same(move: Move, target_id: str, wish: Wish) -> None:
    """Raise WrongState where a move is under way that is another than the one asked for."""
    asked = replace(
        move,
        target_id=target_id,
        new_name=wish.name or move.new_name,
        hypervisor=wish.hypervisor or move.hypervisor,
        mode=wish.mode or move.mode,
    )
    back = f"polyvisor move {move.name} --cancel"
    if move.phase is Phase.CANCELLING:
        raise WrongState(f"VM '{move.name}': its move is being cancelled", hint=f"repeat: {back}")
    if asked != move:
        problem = f"VM '{move.name}' is on another way already: it is moving to {move.target}"
        raise WrongState(problem, hint=f"repeat that ({move}), or keep it: {back}")


async def _bring(source: HostApi, target: HostApi, cargo: Cargo, move: Move, progress: Progress) -> tuple[str, ...]:
    """See to it that the target holds the VM."""
    landing = await target.arrival_check(cargo, move)
    if not landing.arrived:
        if landing.image_id is None:
            await _send_image(source, target, cargo.image, progress)
        await source.move_begin(move.name, move)
        try:
            await _carry(source, target, cargo, move, progress)
        except (ConnectionLost, TimedOut):
            raise  # what was begun can be brought to its end
        except (PolyvisorError, asyncio.CancelledError):
            await _give_back(source, target, move)
            raise
    return landing.notes


async def _send_image(source: HostApi, target: HostApi, image: Image, progress: Progress) -> None:
    """Copy the image that the VM stands on; a name that leads to another image there stays with that."""
    name = image.name
    with contextlib.suppress(NotFound):
        await target.image_show(name)
        name = f"{image.name[:50]}-{image.id}"
    await copy_image(source, image.id, target, progress, new_name=name)


async def _carry(source: HostApi, target: HostApi, cargo: Cargo, move: Move, progress: Progress) -> None:
    """Carry the parcel; begun again where a connection is lost."""

    async def chunks() -> AsyncGenerator[bytes]:
        done = 0
        try:
            async with contextlib.aclosing(source.parcel(move.name, move.token)) as parcel:
                async for chunk in parcel:
                    yield chunk
                    done += len(chunk)
                    progress(Step("moving", min(done, cargo.data_bytes), cargo.data_bytes, "B"))
        except (Unavailable, TimedOut) as error:  # it was there when this was begun
            raise ConnectionLost(error.message, hint=error.hint) from error

    lost_at: float | None = None
    while True:
        try:
            await target.arrive(chunks)
            return progress(Step("moving", cargo.data_bytes, cargo.data_bytes, "B"))  # it was no more than that
        except ConnectionLost:
            lost_at = lost_at or time.monotonic()
            # A host by SSH has tried for long enough by itself.
            if isinstance(target, RemoteHost) or time.monotonic() - lost_at > RECONNECT_S:
                raise
            progress(Step("reconnecting", int(time.monotonic() - lost_at), int(RECONNECT_S), "s"))
            await asyncio.sleep(_PAUSE_S)


async def _let_go(source: HostApi, target: HostApi, move: Move) -> None:
    """Have the source let go; where the move was cancelled meanwhile, what has arrived is discarded."""
    try:
        await source.move_finish(move.name, move.token)
    except WrongState:
        with contextlib.suppress(PolyvisorError):
            await target.arrival_cancel(move.new_name, move.token)
        raise


async def _give_back(source: HostApi, target: HostApi, move: Move) -> None:
    """Undo what was begun, as far as the hosts can be reached; the rest is said by whoever tries to start the VM."""
    with contextlib.suppress(PolyvisorError):
        await source.move_cancel(move.name, move.token)
        with contextlib.suppress(PolyvisorError):  # what it holds then can never start
            await target.arrival_cancel(move.new_name, move.token)
        await source.move_cancel(move.name, move.token, done=True)
