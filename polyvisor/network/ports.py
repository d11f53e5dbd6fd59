"""Ports of the host that lead to guests: which are free, and which a VM gets."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import replace

from polyvisor.errors import InvalidInput
from polyvisor.spec.forward import Forward, parse_forward

SSH_PORT = 22


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
    had = {(f.host_address, f.guest_port, f.protocol): f.host_port for f in last}
    chosen: list[Forward] = []
    for i, forward in enumerate(wanted):
        if forward.host_port:
            _require_free(forward, i, chosen)
            chosen.append(forward)
        else:
            before = had.get((forward.host_address, forward.guest_port, forward.protocol), 0)
            port = _free_port(forward, before) or _free_port(forward, 0)
            chosen.append(replace(forward, host_port=port))
    return tuple(chosen)


def _require_free(forward: Forward, index: int, chosen: list[Forward]) -> None:
    if forward in chosen:
        raise InvalidInput(f"forwards[{index}]", str(forward), "stands twice", hint="remove one")
    if _free_port(forward, forward.host_port):
        return
    hint = f"choose another, or leave it to Polyvisor with :{forward.guest_port}"
    if forward.host_port < 1024:
        hint += "; ports below 1024 need rights"
    problem = f"port {forward.host_port} of {forward.host_address} can't be had: it is taken or not permitted"
    raise InvalidInput(f"forwards[{index}]", str(forward), problem, hint=hint)


def _free_port(forward: Forward, port: int) -> int:
    """`port`, or any free one for 0; 0 where it can't be bound."""
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        # As slirp does it: a port whose last connections are still winding down is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((forward.host_address, port))
            if forward.protocol == "tcp":
                probe.listen(1)
        except OSError:
            return 0
        return int(probe.getsockname()[1])
