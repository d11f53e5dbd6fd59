"""Polyvisor's bridge on this host, with firewall, NAT and address server: made when the first guest needs it.

Nothing runs that could keep it in order, so whoever changes it brings all of it to what it has to be: the bridge, the rules
(replaced in one step) and the server's table, by the state that is kept beside them. Cards of guests that have ended are
dropped at that opportunity. One bridge serves all Polyvisor homes of the host.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from polyvisor.errors import CannotStart, TimedOut, Unavailable
from polyvisor.files import is_flocked, make_directory, storage_errors, take_flock, write_atomic
from polyvisor.network.nat import (
    BRIDGE,
    BRIDGE_MAC,
    Card,
    Forwards,
    State,
    build_hosts,
    build_rules,
    dnsmasq_arguments,
    free_subnet,
    from_json,
    to_json,
    with_cards,
    with_forwards,
)
from polyvisor.network.networkd import leave_guests_alone
from polyvisor.process import find_program, run, spawn_detached, which
from polyvisor.spec.forward import Forward
from polyvisor.waiting import pause

NEEDS = {"ip": "iproute2", "nft": "nftables", "dnsmasq": "dnsmasq-base"}
DIRECTORY = Path("/run/polyvisor/network")
_DEVICES = Path("/sys/class/net")
_TOOL_S = 30.0
_BEGIN_S = 10.0
_POLL_S = 0.01


def missing_programs() -> str | None:
    """Why this host can't have the network, or None: the packages to install."""
    packages = [package for name, package in NEEDS.items() if not (which(name) or which(name, ("/usr/sbin", "/sbin")))]
    return f"it takes {', '.join(packages)}: apt-get install {' '.join(packages)}" if packages else None


class Bridge:
    """The bridge, whose state is in `directory`, which a boot of the host must empty. Takes root's rights."""

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self.directory = directory

    async def join(self, owner: Path, cards: Sequence[Card]) -> None:
        """Prepare the host for `cards` of `owner`, a VM's locked file, in place of those that it had.

        Raises InvalidInput where a MAC or a port is another VM's, Unavailable, NotPermitted, ProcessFailed.
        """
        async with self._locked():
            before = await self._load()
            await leave_guests_alone()
            await self._become(with_cards(self._living(before, but=owner), cards), before)

    async def leave(self, owner: Path) -> None:
        """Take back what `owner` has; nothing happens where that is nothing."""
        if not (self.directory / "state.json").exists():
            return
        async with self._locked():
            before = await self._load()
            if any(card.owner == str(owner) for card in before.cards):
                await self._become(self._living(before, but=owner), before)

    async def add_forward(self, owner: Path, position: int, forward: Forward) -> None:
        """Let a port lead to one of the cards of `owner`; raises as `join` does."""
        await self._forward(owner, position, lambda forwards: (*(f for f in forwards if f != forward), forward))

    async def remove_forward(self, owner: Path, position: int, forward: Forward) -> None:
        await self._forward(owner, position, lambda forwards: tuple(f for f in forwards if f != forward))

    async def _forward(self, owner: Path, position: int, change: Callable[[Forwards], Forwards]) -> None:
        async with self._locked():
            state = await self._load()
            await self._become(with_forwards(state, str(owner), position, change), state)

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        with storage_errors("preparing the network of guests"):
            for directory in (self.directory.parent, self.directory):  # the server, no longer root, reads a file there
                make_directory(directory, 0o755)
            lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await take_flock(lock)
            yield
        finally:
            os.close(lock)

    async def _load(self) -> State:
        try:
            return from_json((self.directory / "state.json").read_bytes())
        except FileNotFoundError:
            routes = await run([_program("ip"), "-4", "-o", "route", "show", "table", "all"], timeout_s=_TOOL_S)
            return State(subnet=free_subnet(_destinations(routes.stdout)))
        except (ValueError, KeyError, TypeError) as error:
            hint = f"stop the VMs that have cards on {BRIDGE}, then remove that file"
            raise Unavailable(f"{self.directory}/state.json can't be understood: {error}", hint=hint) from error

    def _living(self, state: State, but: Path) -> State:
        """`state` without the cards of VMs that have ended; a device that is there still counts as alive."""
        return replace(
            state,
            cards=tuple(
                card
                for card in state.cards
                if card.owner != str(but) and (is_flocked(card.owner) or (_DEVICES / card.interface).exists())
            ),
        )

    async def _become(self, state: State, before: State) -> None:
        """Make the host what `state` says, whatever it is; repeating it changes nothing."""
        for bridge in sorted(state.bridges):
            await _bring_up(bridge, f"{state.gateway}/{state.subnet.prefixlen}" if bridge == BRIDGE else None)
        for bridge in before.bridges - state.bridges:
            await run([_program("ip"), "link", "delete", bridge], timeout_s=_TOOL_S, check=False)
        with storage_errors("noting the network of guests"):
            write_atomic(self.directory / "state.json", to_json(state))
            write_atomic(self.directory / "hosts", build_hosts(state.cards))
            (self.directory / "hosts").chmod(0o644)
        await run([_program("nft"), "-f", "-"], stdin=build_rules(state).encode(), timeout_s=_TOOL_S)
        if (pid := self._server()) is not None:
            os.kill(pid, signal.SIGHUP)  # it reads the table of hosts again
        else:
            await self._begin_server(state)

    def _server(self) -> int | None:
        """The pid of our address server, if it lives: what is written down may be another process by now."""
        try:
            pid = int((self.directory / "dnsmasq.pid").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):
            return None
        return pid if f"--dhcp-hostsfile={self.directory / 'hosts'}" in words else None

    async def _begin_server(self, state: State) -> None:
        """Start dnsmasq and wait until it says that it has; it gives up root's rights itself."""
        log = self.directory / "dnsmasq.log"
        argv = (_program("dnsmasq"), *dnsmasq_arguments(state, self.directory / "hosts"))
        with log.open("wb") as file:
            process = spawn_detached(argv, cwd=self.directory, output=file)
        write_atomic(self.directory / "dnsmasq.pid", str(process.pid))
        deadline = time.monotonic() + _BEGIN_S
        while "started" not in (said := log.read_text(errors="replace")):
            if process.poll() is not None:
                words = said.strip().splitlines()
                raise CannotStart(f"dnsmasq: {words[-1] if words else 'ended without a word'}", hint=f"see {log}")
            if time.monotonic() > deadline:
                process.kill()
                raise TimedOut(f"dnsmasq was not ready within {_BEGIN_S:.0f} s", hint=f"see {log}")
            await pause(_POLL_S)


async def _bring_up(bridge: str, address: str | None) -> None:
    """Make a bridge unless it is there; with `address`, the host is a router on it."""
    if not (_DEVICES / bridge).exists():
        fixed = f"address {BRIDGE_MAC} " if address else ""
        await _ip(f"link add {bridge} {fixed}type bridge")
    with storage_errors("setting up the network of guests"):
        _set(f"ipv6/conf/{bridge}/disable_ipv6", "1")
        if address:
            _set(f"ipv4/conf/{bridge}/route_localnet", "1")
            _set("ipv4/ip_forward", "1")
    await _ip(*([f"address replace {address} dev {bridge}"] if address else []), f"link set {bridge} up")


async def _ip(*commands: str) -> None:
    """Let one ip(8) carry out `commands`, in this order; raises ProcessFailed."""
    text = "".join(f"{command}\n" for command in commands)
    await run([_program("ip"), "-batch", "-"], stdin=text.encode(), timeout_s=_TOOL_S)


def _destinations(text: str) -> list[str]:
    """The networks to which `ip -o route` knows the way, our own left out; words such as `local` may stand before them."""
    lines = (line.split() for line in text.splitlines() if f"dev {BRIDGE} " not in f"{line} ")
    return [word for words in lines for word in words[:2] if word[0].isdigit()]


def _program(name: str) -> str:
    return find_program(name, package=NEEDS[name])


def _set(name: str, value: str) -> None:
    """Write a setting of the kernel's network unless it is so already; a kernel without IPv6 lacks some, and needs none."""
    path = Path("/proc/sys/net") / name
    with contextlib.suppress(FileNotFoundError):
        if path.read_text().strip() != value:
            path.write_text(value)
