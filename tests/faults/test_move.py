"""`kill -9` of a move at every step: no VM is lost, none is there twice, and the same again, or `--cancel`, ends it.

The command is walked as in `test_crash_points`: once with the source in its own process (the target is a host by SSH over
loopback), once with the target in it. The marks that were written on the VM's disk must be on that of the one VM in the end.
A step takes seconds, so each walk takes every ninth one, beginning with another one; with POLYVISOR_TEST_ALL=1 all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from polyvisor.errors import PolyvisorError, WrongState
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.remote import link
from polyvisor.remote.address import Hosts
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.move import Place, Wish, cancel_move, move_vm
from polyvisor.spec.vm import Disk, VMSpec
from polyvisor.status import VMState
from tests.conftest import temporary_home, with_images
from tests.faults.command import Done, Launcher, end_all
from tests.faults.relay import Relay, relaying
from tests.faults.test_crash_points import WORKERS, Walk, walked
from tests.faults.test_lost_connection import agents, before_piece
from tests.sshd import Server
from tests.thorough import EVERY, THOROUGH, usually

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(1200)]

SPEC = VMSpec(name="vm", image="still", disks=(Disk(size_gib=1),))
MARK = "0x5a"


def create(home: Path) -> None:
    """A VM that is stopped, with something on its disk."""
    asyncio.run(Host(home).create(SPEC))
    qemu_io(home, f"write -q -P {MARK} 1M 3M", f"write -q -P {MARK} 900M 64k", "flush")


def qemu_io(home: Path, *commands: str) -> None:
    disk = home / "vms/vm/disks/disk0.qcow2"
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, disk], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "verification failed" not in done.stdout, done


def assert_whole(home: Path) -> None:
    """The VM is there, with all that was on its disk."""
    qemu_io(home, f"read -P {MARK} 1M 3M", f"read -P {MARK} 900M 64k")
    disk = home / "vms/vm/disks/disk0.qcow2"
    assert subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", disk], check=False).returncode == 0


def starts(home: Path) -> bool:
    """Whether the VM can be started there; where not, an error says why, and what to do."""
    host = Host(home)
    if not host.store.names():
        return False
    try:
        asyncio.run(host.start("vm"))
    except WrongState as error:
        assert error.hint is not None
        assert "move vm" in error.hint
        return False
    asyncio.run(host.kill("vm"))
    return True


def remove(*homes: Path) -> None:
    for home in homes:
        with contextlib.suppress(PolyvisorError):
            asyncio.run(Host(home).remove("vm", force=True))
        assert [path.name for path in (home / "vms").iterdir()] == [], "nothing is left"
        shutil.rmtree(home / "moved", ignore_errors=True)


@pytest.fixture
def launchers(home: Home, sshd: Server) -> Iterator[list[Launcher]]:
    """Launchers in homes of their own; the host `far` of each is another home, by SSH."""
    found = []
    for i in range(WORKERS):
        near, far = (home.path.with_name(f"{which}{i}") for which in ("near", "far"))
        for path in (near, far):
            Home(path).prepare()
            with_images(path, home.images.readlink())
        entry = sshd.entry(far)
        Hosts(near / "hosts").add(type(entry)(**{**entry.__dict__, "name": "far"}))
        found.append(Launcher(near))
    yield found
    for launcher in found:
        launcher.close()
        end_all(launcher.home)
        end_all(far_of(launcher))


def far_of(launcher: Launcher) -> Path:
    return launcher.home.with_name(launcher.home.name.replace("near", "far"))


@pytest.mark.parametrize(("then", "first"), usually([("again", 1), ("cancel", 2)], [("again", 1)]))
@pytest.mark.parametrize("way", ["out", "in"])
def test_killed_at_every_step(launchers: list[Launcher], way: str, then: str, first: int) -> None:
    words = ("move", "vm", "--to", "far") if way == "out" else ("--host", "far", "move", "vm", "--to", "local")

    def step(launcher: Launcher, number: int) -> Done:
        near, far = launcher.home, far_of(launcher)
        source, target = (near, far) if way == "out" else (far, near)
        create(source)
        done = launcher(*words, fault="kill", step=number)
        assert done.killed or done.finished, done
        can = [home for home in (source, target) if starts(home)]
        assert len(can) <= 1, f"both can start it: {done}"
        if then == "cancel" and not done.finished:
            cancelled = launcher(*words, "--cancel")
            if cancelled.ok:
                assert starts(source)
                assert not starts(target)
                assert_whole(source)
                assert not (target / "vms/vm").exists(), "what had arrived is discarded"
                remove(source, target)
                return done
            assert "has left" in cancelled.error_line()
        launcher.good(*words)
        assert not (source / "vms/vm").exists()
        assert starts(target)
        assert_whole(target)
        launcher.good(*words)  # it is there already
        remove(source, target)
        return done

    first = min(first, EVERY)
    walked(f"move {way}, then {then}", Walk(launchers, step, first=first, every=EVERY).walk(), at_least=20 // EVERY)


def test_cancel_killed_at_every_step(launchers: list[Launcher]) -> None:
    def step(launcher: Launcher, number: int) -> Done:
        near, far = launcher.home, far_of(launcher)
        create(near)
        held(near, far, launcher)
        done = launcher("move", "vm", "--cancel", fault="kill", step=number)
        assert done.killed or done.finished, done
        assert not starts(far)
        launcher.good("move", "vm", "--cancel")
        assert starts(near)
        assert_whole(near)
        remove(near, far)
        return done

    walked("cancel", Walk(launchers, step, every=EVERY).walk(), at_least=10 // EVERY)


def held(near: Path, far: Path, launcher: Launcher) -> None:
    """Carry the VM so far that the target holds it, and the source has it still."""

    class Stuck(Host):
        async def move_finish(self, name: str, token: str) -> None:
            raise PolyvisorError("stuck")

    async def work() -> None:
        entry = Hosts(near / "hosts").get("far")
        remote = RemoteHost(entry, Home(near))
        try:
            await move_vm(Place("local", Stuck(near)), "vm", Place("far", remote), Wish())
        except PolyvisorError as error:
            assert error.message == "stuck"
        finally:
            await remote.close()

    asyncio.run(work())
    assert not starts(near)
    assert not starts(far)


# The network, and the hosts' own processes


@pytest.fixture
async def relay(sshd: Server) -> AsyncIterator[Relay]:
    async with relaying(sshd.port) as relay:
        sshd.know(relay.port)
        yield relay


@pytest.fixture
def far(home: Home) -> Iterator[Host]:
    with temporary_home() as other:
        with_images(other.path, home.images.readlink())
        yield Host(other)


@pytest.fixture
async def remote(far: Host, sshd: Server, relay: Relay, tmp_path: Path) -> AsyncIterator[RemoteHost]:
    remote = RemoteHost(sshd.entry(far.home.path, port=relay.port), Home(tmp_path / "client"))
    yield remote
    await remote.close()


async def prepared(source: Host, target: Host) -> None:
    for host in (source, target):
        with contextlib.suppress(PolyvisorError):
            await host.remove("vm", force=True)
    await source.create(SPEC)
    await asyncio.to_thread(qemu_io, source.home.path, f"write -q -P {MARK} 1M 3M", f"write -q -P {MARK} 900M 64k")


@pytest.mark.parametrize("way", ["out", "in"])
async def test_cut(way: str, host: Host, far: Host, remote: RemoteHost, relay: Relay) -> None:
    """The network is cut once, before each piece that crosses it at the beginning and at the end, and some between."""
    near, there = Place("local", host), Place("far", remote)
    source, target = (near, there) if way == "out" else (there, near)
    ends = (host, far) if way == "out" else (far, host)
    count = 0

    def note() -> None:
        nonlocal count
        count += 1

    await prepared(*ends)
    await remote.connect()
    relay.watch = note
    await move_vm(source, "vm", target, Wish())
    relay.watch = lambda: None
    for piece in sorted({*range(0, count, max(1, count // (12 if THOROUGH else 5))), count - 2, count - 1}):
        await prepared(*ends)
        await remote.connect()
        relay.watch = before_piece(piece, relay.cut)
        status, _ = await move_vm(source, "vm", target, Wish())
        relay.watch = lambda: None
        assert (status.name, status.state) == ("vm", VMState.STOPPED)
        assert await ends[0].names() == []
        await asyncio.to_thread(assert_whole, ends[1].home.path)


@pytest.mark.parametrize("way", ["out", "in"])
async def test_killed_agents(
    way: str, host: Host, far: Host, remote: RemoteHost, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever works for the host by SSH is killed, at several moments: the same again ends the move."""
    monkeypatch.setattr(link, "KEEPALIVE_S", 1)
    near, there = Place("local", host), Place("far", remote)
    source, target = (near, there) if way == "out" else (there, near)
    ends = (host, far) if way == "out" else (far, host)
    for i in range(0, 8, 1 if THOROUGH else 2):
        await prepared(*ends)
        await remote.connect()
        call = asyncio.ensure_future(move_vm(source, "vm", target, Wish()))
        await asyncio.sleep(0.12 * i)
        for pid in agents(far.home.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(PolyvisorError):
            await call
        await move_vm(source, "vm", target, Wish())
        assert await ends[0].names() == []
        assert [status.reason for status in await ends[1].vms()] == [None]
        await asyncio.to_thread(assert_whole, ends[1].home.path)


async def test_given_up_and_cancelled(host: Host, far: Host, remote: RemoteHost, relay: Relay) -> None:
    """Ctrl-C in the middle of the way: the source keeps the VM, and nothing is left at the target."""
    await prepared(host, far)

    class Slow(Host):
        async def parcel(self, name: str, token: str):  # type: ignore[no-untyped-def]
            async for chunk in super().parcel(name, token):
                yield chunk
                await asyncio.sleep(3600)

    call = asyncio.ensure_future(move_vm(Place("local", Slow(host.home)), "vm", Place("far", remote), Wish()))
    async with asyncio.timeout(60):
        while [status.reason for status in await host.vms()] != ["moving to far"]:
            await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert [status.reason for status in await host.vms()] == [None]
    assert await far.names() == []
    status, left = await cancel_move(Place("local", host), "vm", lambda _: Place("far", remote))
    assert (status.state, left) == (VMState.STOPPED, None)
