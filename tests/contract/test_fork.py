"""Forks of a running VM: copies that go on from one moment, each a VM of its own, and none of them the source again."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Sequence

import pytest

from polyvisor.errors import AlreadyExists, InvalidInput, NotFound, WrongState
from polyvisor.host.api import HostApi
from polyvisor.operation import Step
from polyvisor.spec.vm import Disk, Nic, VMSpec
from polyvisor.status import VMState
from tests.contract.guest import BOOT_S, DISK, guest, needs

pytestmark = [pytest.mark.qemu, pytest.mark.inside]
forks = pytest.mark.usefixtures("forking")  # a mark of this module would be lost where its tests are imported

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
# Counts, with a random number at each step: a line is the same in two guests only where it is from before the fork.
COUNT = (
    "cd /dev/shm; (n=0; while sleep 0.25; do n=$((n+1)); echo $n $(cat /proc/sys/kernel/random/uuid) >>count; done)"
    " >/dev/null 2>&1 &"
)
# Host name, machine-id, host key, and a random number: what two VMs must never share.
IDENTITY = (
    "hostname; cat /etc/machine-id; md5sum /etc/dropbear/host_key /etc/ssh/ssh_host_*_key 2>/dev/null;"
    " cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | md5sum"
)
# Writes to many pages while it is copied, and has the kernel do so; ends by itself.
WORK = (
    "(for i in $(seq 5); do dd if=/dev/zero of=/dev/shm/work bs=64k count=200; rm /dev/shm/work; ls -lR /etc /sys/bus; done)"
    " >/dev/null 2>&1 &"
)
WAIT = "while [ ! -e /tmp/go ]; do sleep 0.1; done; cat /tmp/go"


@pytest.fixture
async def forking(api: HostApi) -> None:
    await needs(api, "fork")


async def made(api: HostApi, source: str, *names: str) -> list[VMState]:
    return [status.state for status in (await api.fork(source, names)).forks]


async def answering(api: HostApi, *names: str) -> None:
    for name in names:
        await api.wait_for_ssh(name, timeout_s=BOOT_S)


def on_disk(text: str) -> str:
    """A command that writes a text to the beginning of the disk, and sees to it that it is there."""
    return f"echo {text} | dd of={DISK} bs=512 conv=sync,fsync 2>/dev/null"


READ = f"dd if={DISK} bs=512 count=1 iflag=direct 2>/dev/null | head -n 1"


async def counted(api: HostApi, name: str) -> list[str]:
    return (await guest(api, name, "cat /dev/shm/count")).splitlines()


@forks
async def test_forks_go_on_from_one_moment(api: HostApi, spec: VMSpec) -> None:
    """Memory and disk are those of one moment; from then on each guest is one of its own, and the source notices nothing."""
    source, names = spec.name, ["a", "b"]
    await api.run(dataclasses.replace(spec, disks=(Disk(size_gib=1),)))
    await answering(api, source)
    await guest(api, source, f"{on_disk('before')}; echo kept >/tmp/file; {COUNT}")
    waiting = asyncio.ensure_future(guest(api, source, WAIT))
    while len(before := await counted(api, source)) < 3:
        pass
    boot_id = await guest(api, source, f"{WORK} {BOOT_ID}")
    status = (await api.show(source)).status
    steps: list[Step] = []

    forked = await api.fork(source, names, steps.append)

    assert [(fork.name, fork.state) for fork in forked.forks] == [(name, VMState.RUNNING) for name in names]
    assert {step.phase for step in steps} >= {"copying memory", "forking"}
    assert forked.same_identity is None
    assert 0 < forked.pause_s < forked.copy_s and forked.begin_s > 0
    after = (await api.show(source)).status
    assert (after.state, after.pid, after.reason) == (VMState.RUNNING, status.pid, None)
    assert len({fork.id for fork in forked.forks} | {after.id}) == 3
    assert len({fork.pid for fork in forked.forks} | {after.pid}) == 3

    await guest(api, source, "echo went on >/tmp/go")
    assert await waiting == "went on", "a connection that was open stays so"
    await answering(api, *names)
    everyone = [source, *names]
    renewed = {name: len(await counted(api, name)) for name in everyone}
    kept = f"{BOOT_ID}; cat /tmp/file; {READ}"
    assert {await guest(api, name, kept) for name in everyone} == {f"{boot_id}\nkept\nbefore"}
    await check_identities(api, everyone)
    for name in everyone:
        while len(await counted(api, name)) <= renewed[name]:
            pass
    check_counts({name: await counted(api, name) for name in everyone}, before, renewed)

    for name in everyone:
        await guest(api, name, on_disk(name))
    assert [await guest(api, name, READ) for name in everyone] == everyone
    for name in (source, "a"):
        await api.stop(name)
        await api.start(name)
    await answering(api, source, "a")
    assert [await guest(api, name, f"{READ}; hostname") for name in everyone] == [
        f"{name}\n{name}" for name in everyone
    ]


async def check_identities(api: HostApi, names: Sequence[str]) -> None:
    told = [(await guest(api, name, IDENTITY)).splitlines() for name in names]
    assert [lines[0] for lines in told] == list(names)
    for about in zip(*told, strict=True):
        assert len(set(about)) == len(names), f"shared: {about}"
    ids = [(await api.show(name)).status.id for name in names]
    assert [lines[1] for lines in told] == [vm_id.replace("-", "") for vm_id in ids]


def check_counts(counts: dict[str, list[str]], before: list[str], renewed: dict[str, int]) -> None:
    """All began as one; and no line of one that has answered, which is after so many, is in another, be it from before that."""
    for name, lines in counts.items():
        assert lines[: len(before)] == before, name
        assert [int(line.split()[0]) for line in lines] == list(range(1, len(lines) + 1)), name
        others = {line for other in counts if other != name for line in counts[other]}
        assert not others & set(lines[renewed[name] :]), f"a random number of {name} is another one's too"


@forks
async def test_a_paused_vm_and_its_forks_are_paused(api: HostApi, booted: str) -> None:
    """Again and again; each fork goes on when it is told to, as itself."""
    boot_id = await guest(api, booted, BOOT_ID)
    await api.pause(booted)
    forked = await api.fork(booted, ["a", "b"])
    assert [fork.state for fork in forked.forks] == [VMState.PAUSED] * 2
    assert forked.pause_s == 0
    assert await made(api, booted, "c") == [VMState.PAUSED]
    status = (await api.show(booted)).status
    assert (status.state, status.reason) == (VMState.PAUSED, None)
    for name in ("a", "c", booted):
        assert (await api.resume(name)).state is VMState.RUNNING
    await answering(api, "a", "c", booted)
    await check_identities(api, ["a", "c", booted])
    assert await guest(api, "a", BOOT_ID) == boot_id
    assert (await api.show("b")).status.state is VMState.PAUSED


@forks
async def test_a_paused_fork_that_is_saved_knows_who_it_is_when_it_goes_on(api: HostApi, booted: str) -> None:
    """Its guest had no time to hear it before."""
    await api.pause(booted)
    await api.fork(booted, ["a"])
    assert (await api.save("a")).state is VMState.SAVED
    assert (await api.start("a")).state is VMState.PAUSED
    await api.resume("a")
    await api.resume(booted)
    await answering(api, "a")
    await check_identities(api, ["a", booted])


@forks
async def test_a_fork_of_a_guest_that_boots_knows_who_it_is(api: HostApi, running: str) -> None:
    """It is told before its kernel has a driver for the port, and may be reading that kernel."""
    await api.fork(running, ["a"])
    await answering(api, running, "a")
    assert [await guest(api, name, "hostname") for name in (running, "a")] == [running, "a"]
    await check_identities(api, [running, "a"])
    await api.remove("a", force=True)


@forks
async def test_a_fork_is_a_vm_like_any_other(api: HostApi, booted: str) -> None:
    """It is forked, saved, started and rebooted, and lives on when what it came from is gone."""
    boot_id = await guest(api, booted, BOOT_ID)
    await guest(api, booted, "echo kept >/tmp/file")
    assert await made(api, booted, "a") == [VMState.RUNNING]
    await answering(api, "a")
    assert await made(api, "a", "b") == [VMState.RUNNING]
    await answering(api, "b")
    await check_identities(api, [booted, "a", "b"])
    await api.remove(booted, force=True)
    assert (await api.save("b")).state is VMState.SAVED
    assert (await api.start("b")).state is VMState.RUNNING
    await api.remove("a", force=True)
    await answering(api, "b")
    assert await guest(api, "b", f"{BOOT_ID}; cat /tmp/file") == f"{boot_id}\nkept"
    assert await made(api, "b", "a") == [VMState.RUNNING], "the name is free again, and a fork that was restored forks"
    await answering(api, "a")
    await check_identities(api, ["a", "b"])
    await api.reboot("b", force=True)
    await answering(api, "b")
    assert await guest(api, "b", BOOT_ID) != boot_id
    await check_identities(api, ["a", "b"])
    assert [status.name for status in await api.vms()] == ["a", "b"]


@forks
async def test_forwards_of_forks_are_their_own(api: HostApi, spec: VMSpec) -> None:
    """A port of the host leads to one VM: where the source has a certain one, its forks have free ones."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    await api.run(dataclasses.replace(spec, nics=(Nic(forwards=(f"{port}:8080",)),)))
    await api.fork(spec.name, ["a", "b"])
    statuses = [(await api.show(name)).status for name in (spec.name, "a", "b")]
    ports = [{f.guest_port: f.host_port for f in status.forwards} for status in statuses]
    assert [set(each) for each in ports] == [{22, 8080}] * 3
    assert ports[0][8080] == port
    assert len({host_port for each in ports for host_port in each.values()}) == 6
    await api.remove(spec.name, force=True)
    await api.stop("a", timeout_s=0)
    again = (await api.start("a")).forwards
    assert {f.guest_port for f in again} == {22, 8080}
    assert not {f.host_port for f in again} & set(ports[2].values())


@forks
async def test_what_can_not_be_forked(api: HostApi, running: str) -> None:
    """Nothing is made, and nothing is done to what is there."""
    await api.create(VMSpec(name="there", image="tiny"))
    with pytest.raises(AlreadyExists, match="'there'"):
        await api.fork(running, ["a", "there", "b"])
    with pytest.raises(AlreadyExists):
        await api.fork(running, [running, "a"])
    with pytest.raises(NotFound):
        await api.fork("nobody", ["a"])
    with pytest.raises(WrongState, match="stopped") as stopped:
        await api.fork("there", ["a"])
    assert stopped.value.hint is not None and "start" in stopped.value.hint
    for names in ([], ["a", "a"], ["../a"], [f"a{i}" for i in range(1001)]):
        with pytest.raises(InvalidInput):
            await api.fork(running, names)
    assert await api.names() == sorted(["there", running])
    assert (await api.show(running)).status.state is VMState.RUNNING
