"""The network breaks, or goes silent, in the middle of every verb: each is done once, and its caller learns what came of it.

A first, undisturbed call counts the pieces that cross the network. Then the same is done again and again, with the network cut
before each of those pieces, and at moments between them while the host is at work. Most verbs, above all those that need a
guest that has booted, are disturbed at fewer places by default (see `tests.thorough`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polyvisor.errors import PolyvisorError, WrongState
from polyvisor.home import Home
from polyvisor.host.api import HostApi
from polyvisor.host.host import Host
from polyvisor.process import run
from polyvisor.remote import link
from polyvisor.remote.host import RemoteHost
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import VMSpec
from polyvisor.status import VMState
from tests.faults.relay import Relay, relaying
from tests.sshd import Server
from tests.thorough import THOROUGH, usually

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(600)]

SPEC = VMSpec(name="vm", image="still")
FORWARD = Forward(host_port=0, guest_port=80)
# Parts of the time that the host is at work, at which the network is cut too.
MOMENTS = (0.1, 0.4, 0.8)
BOOTING = frozenset() if THOROUGH else frozenset({"stop", "reboot", "reset"})
# Verbs during which the network is cut at every one of those moments; at one of them otherwise.
AT_MOMENTS = frozenset({"run", "start", "save", "remove"})
# Of each kind of verb one: that makes, and may be repeated, or not; that ends; that reads; that takes long; …
USUAL = ("create-new", "run", "run-new", "save", "remove", "add-forward", "show", "image-pull")
READY = "polyvisor: ready"

Work = Callable[[HostApi], Awaitable[Any]]


@dataclass(frozen=True)
class Verb:
    """A verb to disturb: what has to be there before, the call, and what has to be so afterwards."""

    prepare: Work
    call: Work
    check: Callable[[Host, Any], Awaitable[None]]


async def stopped(api: HostApi) -> None:
    """The VM is there and stopped."""
    await api.create(SPEC)
    await api.kill("vm")


async def running(api: HostApi) -> None:
    if "vm" not in await api.names():
        await api.create(SPEC)
    await api.start("vm")
    await api.resume("vm")


async def booting(api: HostApi) -> None:
    """A guest boots, for the first time since the console log was begun."""
    await gone(api)
    await api.run(VMSpec(name="vm", image="tiny"))


async def booted(api: HostApi) -> None:
    await booting(api)
    await api.wait_for_ssh("vm", timeout_s=120)
    while READY not in await console(api):
        await asyncio.sleep(0.1)


async def gone(api: HostApi) -> None:
    for name in await api.names():
        await api.remove(name, force=True)


async def with_forward(api: HostApi) -> None:
    await running(api)
    await api.add_forward("vm", FORWARD)


async def without_forward(api: HostApi) -> None:
    await running(api)
    for forward in (await api.show("vm")).status.forwards:
        if forward.guest_port == 80:
            await api.remove_forward("vm", forward)


async def paused(api: HostApi) -> None:
    await running(api)
    await api.pause("vm")


async def saved(api: HostApi) -> None:
    await running(api)
    await api.save("vm")


async def console(api: HostApi) -> str:
    return b"".join([chunk async for chunk in api.log("vm")]).decode(errors="replace")


def is_(state: VMState) -> Callable[[Host, Any], Awaitable[None]]:
    async def check(host: Host, result: Any) -> None:
        assert result.state is state
        [there] = await host.vms()
        assert (there.name, there.state) == ("vm", state)

    return check


async def is_gone(host: Host, result: Any) -> None:
    assert result is None
    assert await host.vms() == []


async def has_rebooted_once(host: Host, result: Any) -> None:
    assert result.state is VMState.RUNNING
    async with asyncio.timeout(120):
        while (count := (await console(host)).count(READY)) < 2:
            await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)
    assert count == (await console(host)).count(READY) == 2


async def has_one_forward(host: Host, result: Any) -> None:
    [there] = await host.vms()
    assert result == there
    assert [f.guest_port for f in there.forwards] == [22, 80]


async def has_no_forward(host: Host, result: Any) -> None:
    [there] = await host.vms()
    assert [f.guest_port for f in there.forwards] == [22]


async def nothing(host: Host, result: Any) -> None:
    assert result is not None


VERBS = {
    "create": Verb(gone, lambda api: api.create(SPEC), is_(VMState.STOPPED)),
    "create-new": Verb(gone, lambda api: api.create(SPEC, new=True), is_(VMState.STOPPED)),
    "run": Verb(gone, lambda api: api.run(SPEC), is_(VMState.RUNNING)),
    "run-new": Verb(gone, lambda api: api.run(SPEC, new=True), is_(VMState.RUNNING)),
    "start": Verb(stopped, lambda api: api.start("vm"), is_(VMState.RUNNING)),
    "stop": Verb(booted, lambda api: api.stop("vm", timeout_s=60), is_(VMState.STOPPED)),
    "kill": Verb(running, lambda api: api.kill("vm"), is_(VMState.STOPPED)),
    "reboot": Verb(booted, lambda api: api.reboot("vm", timeout_s=60), has_rebooted_once),
    "reset": Verb(booted, lambda api: api.reboot("vm", force=True), has_rebooted_once),
    "pause": Verb(running, lambda api: api.pause("vm"), is_(VMState.PAUSED)),
    "resume": Verb(paused, lambda api: api.resume("vm"), is_(VMState.RUNNING)),
    "save": Verb(running, lambda api: api.save("vm"), is_(VMState.SAVED)),
    "restore": Verb(saved, lambda api: api.start("vm"), is_(VMState.RUNNING)),
    "remove": Verb(running, lambda api: api.remove("vm", force=True), is_gone),
    "add-forward": Verb(without_forward, lambda api: api.add_forward("vm", FORWARD), has_one_forward),
    "remove-forward": Verb(with_forward, lambda api: api.remove_forward("vm", FORWARD), has_no_forward),
    "status": Verb(running, lambda api: api.status(), nothing),
    "check": Verb(running, lambda api: api.check(), nothing),
    "names": Verb(running, lambda api: api.names(), nothing),
    "vms": Verb(running, lambda api: api.vms(), nothing),
    "show": Verb(running, lambda api: api.show("vm"), nothing),
    "wait-for-ssh": Verb(booting, lambda api: api.wait_for_ssh("vm", timeout_s=120), nothing),
    "image-list": Verb(running, lambda api: api.image_list(), nothing),
    "image-pull": Verb(running, lambda api: api.image_pull("tiny"), nothing),
}


@pytest.fixture
async def relay(sshd: Server) -> AsyncIterator[Relay]:
    async with relaying(sshd.port) as relay:
        sshd.know(relay.port)
        yield relay


@pytest.fixture
async def remote(host: Host, sshd: Server, relay: Relay, tmp_path: Path) -> AsyncIterator[RemoteHost]:
    """The host, through a network that can be cut."""
    remote = RemoteHost(sshd.entry(host.home.path, port=relay.port), Home(tmp_path / "client"))
    yield remote
    await remote.close()


async def pieces_of(verb: Verb, host: Host, remote: RemoteHost, relay: Relay) -> tuple[int, float]:
    """How many pieces cross the network in an undisturbed call, and how long it takes, in seconds."""
    count = 0

    def note() -> None:
        nonlocal count
        count += 1

    await verb.prepare(host)
    await remote.connect()
    relay.watch = note
    began = time.monotonic()
    result = await verb.call(remote)
    took = time.monotonic() - began
    relay.watch = lambda: None
    await verb.check(host, result)
    return count, took


def moments(name: str) -> tuple[float, ...]:
    return MOMENTS if THOROUGH or name in AT_MOMENTS else MOMENTS[1:2]


def before_piece(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """A watch that does `act` just before the piece of this number is passed on."""
    left = number

    def watch() -> None:
        nonlocal left
        if left == 0:
            act()
        left -= 1

    return watch


async def disturbed(
    verb: Verb, host: Host, remote: RemoteHost, relay: Relay, *, at_piece: int | None = None, after_s: float = 0.0
) -> None:
    """Do it again, with the network cut once."""
    await verb.prepare(host)
    await remote.connect()
    if at_piece is not None:
        relay.watch = before_piece(at_piece, relay.cut)
    call = asyncio.ensure_future(verb.call(remote))
    if at_piece is None:
        await asyncio.sleep(after_s)
        relay.cut()
    result = await call
    relay.watch = lambda: None
    await verb.check(host, result)


@pytest.mark.parametrize("name", usually(VERBS, USUAL))
async def test_cut(name: str, host: Host, remote: RemoteHost, relay: Relay) -> None:
    verb = VERBS[name]
    count, took = await pieces_of(verb, host, remote, relay)
    assert count >= 2, "a call and its answer"
    # Some verbs report progress all the time: the first and the last pieces are those that tell.
    first = {1} if name in BOOTING else {*range(min(count, 3))}
    for piece in sorted({*first, count - 1}):
        await disturbed(verb, host, remote, relay, at_piece=piece)
    for moment in moments(name):
        await disturbed(verb, host, remote, relay, after_s=took * moment)
    await gone(host)


@pytest.mark.parametrize(
    "name", usually(["run-new", "start", "reset", "remove", "add-forward", "vms"], ["run-new", "remove"])
)
async def test_silence(
    name: str, host: Host, remote: RemoteHost, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands hangs without a word; SSH notices for lack of signs of life."""
    monkeypatch.setattr(link, "KEEPALIVE_S", 1)
    monkeypatch.setattr(link, "KEEPALIVES", 1)
    verb = VERBS[name]
    for piece in (0, 1) if THOROUGH else (1,):
        await verb.prepare(host)
        await remote.connect()
        relay.watch = before_piece(piece, relay.silence)
        result = await verb.call(remote)
        relay.watch = lambda: None
        await verb.check(host, result)
    await gone(host)


def agents(home: Path) -> list[int]:
    """The agents at work on the VMs in `home`, those that serve calls and those that serve streams."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"agent" in words and f"POLYVISOR_HOME={home}".encode() in environment:
            found.append(int(process.name))
    return found


@pytest.mark.parametrize(
    "name",
    usually(
        ["create", "run", "start", "stop", "kill", "reboot", "pause", "save", "restore", "remove", "add-forward"],
        ["run", "start", "remove"],
    ),
)
async def test_killed_agent(name: str, host: Host, remote: RemoteHost, relay: Relay) -> None:
    """The agent itself is killed: a verb that may be repeated is; of others the caller is told that nobody knows."""
    verb = VERBS[name]
    _, took = await pieces_of(verb, host, remote, relay)
    for moment in moments(name):
        await verb.prepare(host)
        await remote.connect()
        call = asyncio.ensure_future(verb.call(remote))
        await asyncio.sleep(took * moment)
        for pid in agents(host.home.path):
            os.kill(pid, signal.SIGKILL)
        try:
            await verb.check(host, await call)
        except WrongState as error:
            assert "cut short" in error.message
            assert name in ("create", "run", "reboot", "remove")
            assert len(await host.vms()) <= 1
        if name not in ("reboot", "remove"):
            await verb.call(host)  # whatever was left does not stand in the way
    await gone(host)


async def test_no_agent_outlives_its_connection(host: Host, remote: RemoteHost, relay: Relay) -> None:
    await running(remote)
    following = asyncio.ensure_future(anext(aiter(remote.events())))
    async with asyncio.timeout(20):
        while len(agents(host.home.path)) < 2:
            await asyncio.sleep(0.05)
    relay.cut()
    with pytest.raises((PolyvisorError, StopAsyncIteration)):
        await following
    async with asyncio.timeout(10):
        while agents(host.home.path):
            await asyncio.sleep(0.05)
    await remote.vms()
    assert len(agents(host.home.path)) == 1


async def test_a_log_that_breaks_off_is_no_whole_log(host: Host, remote: RemoteHost, relay: Relay) -> None:
    await booting(host)
    with pytest.raises(PolyvisorError, match="lost"):
        async for _ in remote.log("vm", follow=True):
            relay.cut()


async def test_an_import_is_done_once(
    host: Host, remote: RemoteHost, relay: Relay, empty_home: Home, tmp_path: Path
) -> None:
    """The file is sent again where the network was cut, and imported once."""
    empty_home.images.unlink()
    source = tmp_path / "disk.qcow2"
    await run(["qemu-img", "create", "-q", "-f", "qcow2", str(source), "1M"])
    count = 0

    def note() -> None:
        nonlocal count
        count += 1

    await remote.connect()
    relay.watch = note
    await remote.image_import(str(source), name="disk")
    for piece in range(0, min(count, 12), 1 if THOROUGH else 3):
        await host.image_remove("disk")
        await remote.connect()
        relay.watch = before_piece(piece, relay.cut)
        image = await remote.image_import(str(source), name="disk")
        relay.watch = lambda: None
        assert [one.image.id for one in await host.image_list()] == [image.id]
        assert not list((host.home.cache / "uploads").iterdir())
