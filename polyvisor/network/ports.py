"""Ports of the host that lead to guests: which are free, and which a VM gets."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from polyvisor.errors import InvalidInput, PolyvisorError
from polyvisor.spec.forward import Forward, parse_forward

SSH_PORT = 22
_EVERYWHERE = "0.0.0.0"  # noqa: S104 - compared, not bound
_TRIES = 20
_TRIES_TO_START = 3
T = TypeVar("T")


def wanted_forwards(texts: Sequence[str], *, ssh: bool) -> list[Forward]:
    """The forwards that a network card's spec asks for and, with `ssh`, one to the guest's SSH where none leads there."""
    asked = [parse_forward(text) for text in texts]
    if not ssh or any(forward.guest_port == SSH_PORT and forward.protocol == "tcp" for forward in asked):
        return asked
    return [*asked, Forward(host_port=0, guest_port=SSH_PORT)]


def chosen_forwards(wanted: Iterable[Forward], last: Iterable[Forward] = ()) -> tuple[Forward, ...]:
    """`wanted` with a free host port wherever any will do, the one that the VM had at its last start where that is free.

    Raises InvalidInput where a port that was asked for by number is taken. A port can still be taken between this
    look and its use; then the start fails, and says so.
    """
    wanted = list(wanted)
    had = [forward for forward in last if forward.host_port]
    numbered = [forward for forward in wanted if forward.host_port]
    chosen: list[Forward] = []
    for i, forward in enumerate(wanted):
        if forward.host_port:
            _require_free(forward, i, [f for f in wanted[:i] if f.host_port])
            chosen.append(forward)
        else:
            chosen.append(_with_port(forward, i, had, [*numbered, *chosen]))
    return tuple(chosen)


async def with_free_ports(launch: Callable[[], Awaitable[T]]) -> T:
    """What `launch` returns, which starts a VM with the ports that it chooses; again where one was taken in between."""
    for attempt in range(1, _TRIES_TO_START + 1):
        try:
            return await launch()
        except PolyvisorError as error:
            if attempt == _TRIES_TO_START or "host forwarding" not in error.message:
                raise
    raise AssertionError("the last attempt returns or raises")


def _with_port(forward: Forward, index: int, had: list[Forward], taken: list[Forward]) -> Forward:
    """`forward` with one of the ports that it `had`, or any free one, but none of those `taken`."""
    before = [replace(forward, host_port=f.host_port) for f in had if replace(f, host_port=0) == forward]
    for candidate in before:
        if not any(_clash(candidate, other) for other in taken) and _free_port(candidate, candidate.host_port):
            return candidate
    for _ in range(_TRIES):
        candidate = replace(forward, host_port=_free_port(forward, 0))
        if candidate.host_port and not any(_clash(candidate, other) for other in taken):
            return candidate
    problem = f"{forward.host_address} has no free port, or is no address of this host"
    raise InvalidInput(f"forwards[{index}]", str(forward), problem, hint="leave the address out, for 127.0.0.1")


def _clash(one: Forward, other: Forward) -> bool:
    """Whether two forwards can't be had at the same time."""
    if (one.protocol, one.host_port) != (other.protocol, other.host_port):
        return False
    return one.host_address == other.host_address or _EVERYWHERE in (one.host_address, other.host_address)


def _require_free(forward: Forward, index: int, taken: list[Forward]) -> None:
    if forward in taken:
        raise InvalidInput(f"forwards[{index}]", str(forward), "stands twice", hint="remove one")
    where = f"port {forward.host_port} of {forward.host_address}"
    if any(_clash(forward, other) for other in taken):
        hint = f"choose another, or leave it to Polyvisor with :{forward.guest_port}"
        raise InvalidInput(f"forwards[{index}]", str(forward), f"{where} is asked for twice", hint=hint)
    if _free_port(forward, forward.host_port):
        return
    hint = f"choose another, or leave it to Polyvisor with :{forward.guest_port}"
    if forward.host_port < 1024:
        hint += "; ports below 1024 need rights"
    problem = f"{where} can't be had: it is taken or not permitted"
    raise InvalidInput(f"forwards[{index}]", str(forward), problem, hint=hint)


def hold_port(forward: Forward) -> socket.socket:
    """A socket that has the host's port of `forward`, and listens to nobody: for ports that the kernel leads to a guest.

    Nobody else on this host gets the port while a process has the socket open. Raises InvalidInput where it is taken.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM)
    try:
        held.bind((forward.host_address, forward.host_port))
    except OSError as error:
        held.close()
        problem = f"host forwarding: the port can't be had: {error.strerror}"
        raise InvalidInput("forwards", str(forward), problem, hint=f"use :{forward.guest_port}") from error
    return held


def _free_port(forward: Forward, port: int) -> int:
    """`port`, or any free one for 0; 0 where it can't be bound."""
    tcp = forward.protocol == "tcp"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as probe:
        if tcp:
            # As slirp does it: a port whose last connections are still winding down is free. Not for UDP, where this
            # would share a port with whoever has it.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((forward.host_address, port))
            if tcp:
                probe.listen(1)
        except OSError:
            return 0
        return int(probe.getsockname()[1])
