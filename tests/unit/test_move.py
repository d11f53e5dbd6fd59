"""A move between two hosts: what arrives, what is refused before anything changes, and that there is always one VM, not two."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyvisor.cli.main import parse, run
from polyvisor.cli.parser import UsageError
from polyvisor.errors import (
    AlreadyExists,
    ConnectionLost,
    ImageRefused,
    InvalidInput,
    NotFound,
    PolyvisorError,
    StorageFull,
    TimedOut,
    Unavailable,
    Unsupported,
    WrongState,
)
from polyvisor.home import Home
from polyvisor.host import moves
from polyvisor.host.arrival import _known
from polyvisor.host.keys import login_key_of
from polyvisor.host.moves import Move, Phase, host_id
from polyvisor.operation import Step
from polyvisor.remote.address import Entry
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.move import Place, Wish, cancel_move, move_vm
from polyvisor.remote.wire import Access
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import Hypervisor, Mode, Nic, VMSpec
from polyvisor.status import VMState
from tests.unit.disks import MIB
from tests.unit.exported import add_direct, add_full
from tests.unit.moved import SPEC, TCG, XEN, Machine, made, move, offered


@pytest.fixture
def source(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "a")


@pytest.fixture
def target(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "b")


@pytest.fixture
async def vm(source: Machine, tmp_path: Path) -> str:
    await made(source, tmp_path / "scratch")
    return "web"


def content(path: Path) -> list[str]:
    """What a guest would read on a disk, as checksums of its parts."""
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    try:
        with raw.open("rb") as file:
            return [str(hash(file.read(MIB))) for _ in range(16)]
    finally:
        raw.unlink()


def backing(path: Path) -> str | None:
    said = subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True).stdout
    found: str | None = json.loads(said).get("backing-filename")
    return found


def startable(*hosts: Machine) -> list[str]:
    """On which of the hosts the VM may start."""
    found = []
    for host in hosts:
        for name in host.store.names():
            try:
                moves.require_settled(host.store.directory(name), "start")
            except WrongState as error:
                assert error.hint
            else:
                found.append(host.home.path.name)
    return found


# What arrives


async def test_all_of_it_arrives(source: Machine, target: Machine, vm: str) -> None:
    before = await source.show(vm)
    disks = [source.home.vms / f"web/disks/disk{i}.qcow2" for i in (0, 1)]
    variables = source.home.vms / "web/disks/uefi-vars.fd"
    variables.write_bytes(b"variables")
    data = [content(disk) for disk in disks]
    record = source.store.get(vm).record
    key = source.files(vm)["ssh/host_key"]
    known = source.files(vm)["ssh/known_hosts"].decode().split()[1:3]
    steps: list[Step] = []

    status, notes = await move_vm(Place("a", source), vm, Place("b", target), Wish(), steps.append)

    assert (status.name, status.id, status.state) == ("web", before.status.id, VMState.STOPPED)
    assert notes == ("it will run on tcg, in mode hvm",)
    assert replace(target.store.get(vm).record, user=record.user) == record
    assert (await target.show(vm)).mac_addresses == before.mac_addresses
    arrived = target.files(vm)
    assert arrived["ssh/host_key"] == key
    assert arrived["ssh/login"] == (source.home.keys / "id_ed25519").read_bytes(), "by which the guest lets its host in"
    assert arrived["ssh/known_hosts"].decode().split() == ["web", *known]
    assert arrived["disks/uefi-vars.fd"] == b"variables"
    disks = [target.home.vms / f"web/disks/disk{i}.qcow2" for i in (0, 1)]
    assert [content(disk) for disk in disks] == data
    image = target.images.store.get("full")
    assert image.disk is not None
    assert backing(disks[0]) == str(target.images.store.file(image, image.disk))
    assert backing(disks[1]) is None
    assert source.store.names() == []
    assert startable(source, target) == ["b"]
    moving = [step for step in steps if step.phase == "moving"]
    assert moving[-1].done == moving[-1].total


async def test_nobody_else_can_read_it(source: Machine, target: Machine, vm: str) -> None:
    await move(source, target)
    directory = target.store.get(vm).path
    for path in directory.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    user = target.store.get(vm).record.user
    if os.geteuid() == 0:
        assert user is not None
        assert {p.stat().st_uid for p in (directory / "disks").iterdir()} == {user}
        assert {p.stat().st_uid for p in (directory / "ssh").iterdir()} == {0}
        assert stat.S_IMODE(directory.stat().st_mode) == 0o711


async def test_the_login_goes_with_it_to_further_hosts(
    source: Machine, target: Machine, vm: str, tmp_path: Path
) -> None:
    await move(source, target)
    login = target.files(vm)["ssh/login"]
    third = Machine(tmp_path / "c")
    await move(target, third)
    assert third.files(vm)["ssh/login"] == login == (source.home.keys / "id_ed25519").read_bytes()


async def test_the_login_that_it_brought_opens_it_by_ssh_too(tmp_path: Path) -> None:
    """A VM with a login of its own has a file of its own for that, where its host is another machine."""
    client = RemoteHost(Entry(name="far", url="ssh://far", added_at=0.0), Home(tmp_path))
    plain = Access(address="127.0.0.1", port=1, user="u", alias="web", identity="of the host", known_hosts="web key")
    of_host = client._target("db", plain)
    own = client._target("web", replace(plain, identity="of the VM", own=True))
    assert (of_host.identity.read_text(), own.identity.read_text()) == ("of the host", "of the VM")
    assert stat.S_IMODE(own.identity.stat().st_mode) == 0o600


async def test_a_vm_that_has_come_is_opened_by_what_it_brought(source: Machine, target: Machine, vm: str) -> None:
    await move(source, target)
    private, public = await login_key_of(target.store.get(vm).path, target.home.keys)
    assert private == target.store.get(vm).path / "ssh/login"
    assert public.split()[:2] == (source.home.keys / "id_ed25519.pub").read_text().split()[:2]
    assert not (target.home.keys / "id_ed25519").exists()


@pytest.mark.parametrize("lines", ["", "web ssh-ed25519 AAAA\n", "web ssh-rsa AAAA\nweb ecdsa-sha2-nistp256 BBBB\n"])
def test_keys_that_a_guest_has_shown(tmp_path: Path, lines: str) -> None:
    (tmp_path / "known_hosts").write_text(lines)
    assert _known(tmp_path / "known_hosts") == [line.partition(" ")[2] for line in lines.splitlines()]
    for lie in ("@cert-authority * ssh-ed25519 AAAA", "web ssh-ed25519", "web ssh-ed25519 AA\x1bAA", "# a"):
        (tmp_path / "known_hosts").write_text(lines + lie)
        with pytest.raises(ImageRefused):
            _known(tmp_path / "known_hosts")


async def test_under_another_name_on_another_hypervisor(source: Machine, tmp_path: Path, vm: str) -> None:
    target = Machine(tmp_path / "b", XEN, TCG)
    status, notes = await move(source, target, name="www", hypervisor=Hypervisor.XEN, mode=Mode.PV)
    assert status.name == "www"
    assert notes == ("it will run on xen, in mode pv",)
    assert target.store.get("www").record.spec == replace(SPEC, name="www", hypervisor=Hypervisor.XEN, mode=Mode.PV)
    assert target.files("www")["ssh/known_hosts"].startswith(b"www ssh-ed25519 ")
    # And back, as it was.
    await move(target, source, "www", name="web", hypervisor=Hypervisor.AUTO, mode=Mode.AUTO)
    assert source.store.get(vm).record.spec == SPEC
    assert startable(source, target) == ["a"]


async def test_an_image_that_is_there_is_not_sent(source: Machine, target: Machine, vm: str, tmp_path: Path) -> None:
    there = add_full(target.images.store, tmp_path)
    steps: list[Step] = []
    await move_vm(Place("a", source), vm, Place("b", target), Wish(), steps.append)
    assert {step.phase for step in steps} == {"checking", "moving"}
    assert target.store.get(vm).record.image_id == there.id


async def test_the_name_of_another_image_stays_with_that(
    source: Machine, target: Machine, vm: str, tmp_path: Path
) -> None:
    other = add_direct(target.images.store, "full")
    await move(source, target)
    assert target.images.store.get("full").id == other.id
    image = target.images.store.by_id(target.store.get(vm).record.image_id)
    assert image.name.startswith("full-")
    assert (await target.image_show(image.name)).image == image
    with pytest.raises(WrongState, match="used by web"):
        await target.image_remove(image.id)


async def test_holes_are_not_sent(source: Machine, target: Machine, vm: str) -> None:
    disk = source.home.vms / "web/disks/disk1.qcow2"
    with disk.open("r+b") as file:
        file.truncate(4 << 30)  # what lies behind a qcow2 file's last cluster is nothing
    cargo, _ = await offered(source, target)
    assert cargo.data_bytes < 64 * MIB
    await move(source, target)
    assert (target.home.vms / "web/disks/disk1.qcow2").stat().st_blocks * 512 < 64 * MIB


# What is refused, before anything changes


async def unchanged(source: Machine, target: Machine, kind: type[PolyvisorError], **wish: Any) -> PolyvisorError:
    """The error of a move that changes nothing."""
    before = source.files("web"), target.store.names(), target.images.store.names()
    with pytest.raises(kind) as caught:
        await move(source, target, **wish)
    assert (source.files("web"), target.store.names(), target.images.store.names()) == before
    assert startable(source)[-1:] == ["a"]
    assert caught.value.message.isprintable()
    return caught.value


async def test_a_name_that_is_taken(source: Machine, target: Machine, vm: str, tmp_path: Path) -> None:
    await made(target, tmp_path / "other")
    error = await unchanged(source, target, AlreadyExists)
    assert "--name" in str(error.hint)
    await move(source, target, name="free")
    assert target.store.names() == ["free", "web"]


@pytest.mark.parametrize(
    ("wish", "kind", "words"),
    [
        ({"hypervisor": Hypervisor.KVM}, Unsupported, "hypervisor: kvm does not work here"),
        ({"hypervisor": Hypervisor.XEN}, Unsupported, "hypervisor: xen"),
        ({"mode": Mode.PV}, InvalidInput, "need Xen"),
        ({"name": "no name"}, InvalidInput, "not a VM name"),
    ],
)
async def test_what_does_not_run_there(
    source: Machine, target: Machine, vm: str, wish: dict[str, Any], kind: type[PolyvisorError], words: str
) -> None:
    assert words in (await unchanged(source, target, kind, **wish)).message


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"mode": Mode.HVM}, InvalidInput, "its CPU has no virtualization"),
        ({"nics": (Nic(network="private:lan"),)}, Unsupported, "no private networks"),
    ],
)
async def test_what_xen_can_not(
    source: Machine, tmp_path: Path, changes: dict[str, Any], kind: type[PolyvisorError], words: str
) -> None:
    await made(source, tmp_path / "scratch", replace(SPEC, **changes))
    assert words in (await unchanged(source, Machine(tmp_path / "b", XEN), kind)).message


async def test_a_port_that_is_taken(source: Machine, target: Machine, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        await made(source, tmp_path / "scratch", replace(SPEC, nics=(Nic(forwards=(f"{port}:80",)),)))
        taken.listen()
        error = await unchanged(source, target, InvalidInput)
    assert error.message.startswith("forwards[0]: ")
    assert str(port) in error.message


async def test_too_much_memory(source: Machine, target: Machine, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyvisor.host.arrival.total_memory_mib", lambda: 256)
    assert "256 MiB" in (await unchanged(source, target, InvalidInput)).message


async def test_too_little_space(source: Machine, target: Machine, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))
    await unchanged(source, target, StorageFull)


async def test_the_host_that_it_is_on(source: Machine, vm: str) -> None:
    assert "to: 'b'" in (await unchanged(source, source, InvalidInput)).message


async def test_no_such_vm(source: Machine, target: Machine) -> None:
    with pytest.raises(NotFound, match="there is no VM 'web'"):
        await move(source, target)
    with pytest.raises(NotFound):
        await cancel_move(Place("a", source), "web", lambda _: Place("b", target))
    with pytest.raises(NotFound):
        cargo_of = Move(**{**example().__dict__, "source_id": await source.host_id()})
        await source.move_begin("web", cargo_of)


def example() -> Move:
    some = "12345678-1234-1234-1234-123456789abc"
    return Move(
        token=some, vm_id=some, name="web", new_name="web", source="a", source_id=some, target="b", target_id=some
    )


async def test_a_vm_that_is_alive(source: Machine, target: Machine, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lives(_: object) -> bool:
        return True

    monkeypatch.setattr(source.drivers, "lives", lives)
    with pytest.raises(WrongState, match="only a stopped VM can be moved") as caught:
        await move(source, target)
    assert caught.value.hint == "polyvisor stop web"


async def test_a_vm_that_is_saved(source: Machine, target: Machine, vm: str) -> None:
    saved = source.home.vms / "web/saved"
    saved.mkdir()
    (saved / "memory").write_bytes(b"memory")
    error = await unchanged_saved(source, target)
    assert "start --fresh" in str(error.hint)


async def unchanged_saved(source: Machine, target: Machine) -> PolyvisorError:
    with pytest.raises(WrongState, match="is saved") as caught:
        await move(source, target)
    return caught.value


async def test_private_networks_are_pointed_out(source: Machine, target: Machine, tmp_path: Path) -> None:
    await made(source, tmp_path / "scratch", replace(SPEC, nics=(Nic(network="private:lan"),)))
    _, notes = await move(source, target)
    assert "on network private:lan it will meet VMs of its new host alone" in notes


# Broken off, repeated, cancelled

STEPS = [
    ("source", "move_begin"),
    ("target", "arrive"),
    ("source", "move_finish"),
    ("target", "arrival_release"),
]


async def broken(source: Machine, target: Machine, where: str, verb: str, after: bool) -> None:
    """A move that is lost before a step, or after it was done but nobody knows."""
    host = source if where == "source" else target
    host.failing, host.after, host.error = verb, after, Lost("the line is dead")
    with pytest.raises(PolyvisorError, match="the line is dead"):
        await move(source, target)
    host.failing = None


class Lost(TimedOut):
    """A host that can't be reached; nothing is undone for it."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("where", "verb"), STEPS)
async def test_repeated(source: Machine, target: Machine, vm: str, where: str, verb: str, after: bool) -> None:
    before = source.store.get(vm).record.id
    await broken(source, target, where, verb, after)
    assert len(startable(source, target)) <= 1
    status, _ = await move(source, target)
    assert status.id == before
    assert startable(source, target) == ["b"]
    assert source.store.names() == []
    status, _ = await move(source, target)
    assert status.id == before, "it is there already"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("where", "verb"), STEPS)
async def test_cancelled(source: Machine, target: Machine, vm: str, where: str, verb: str, after: bool) -> None:
    files = source.files(vm)
    await broken(source, target, where, verb, after)
    cancelled = cancel_move(Place("a", source), vm, lambda _: Place("b", target))
    if verb == "arrival_release" or (verb == "move_finish" and after):
        with pytest.raises(WrongState, match="has left for b"):
            await cancelled
        await move(source, target)
        assert startable(source, target) == ["b"]
        return
    status, left = await cancelled
    assert (status.name, left) == (vm, None)
    assert source.files(vm) == files
    assert target.store.names() == []
    assert startable(source, target) == ["a"]
    await cancel_move(Place("a", source), vm, lambda _: Place("b", target))
    await move(source, target)
    assert startable(source, target) == ["b"]


@pytest.mark.parametrize("step", ["move_cancel", "arrival_cancel"])
async def test_a_cancel_that_breaks_off_can_only_be_cancelled(
    source: Machine, target: Machine, vm: str, step: str
) -> None:
    await broken(source, target, "source", "move_finish", after=False)
    host = source if step == "move_cancel" else target
    host.failing, host.after, host.error = step, True, PolyvisorError("gone")
    with pytest.raises(PolyvisorError, match="gone"):
        await cancel_move(Place("a", source), vm, lambda _: Place("b", target))
    host.failing = None
    assert startable(source, target) == []
    assert [status.reason for status in await source.vms()] == ["moving to b, which is being cancelled"]
    with pytest.raises(WrongState, match="is being cancelled"):
        await move(source, target)
    with pytest.raises(WrongState, match="is not leaving"):
        await source.move_finish(vm, (await source.move_show(vm)).move.token)  # type: ignore[union-attr]
    await cancel_move(Place("a", source), vm, lambda _: Place("b", target))
    assert startable(source, target) == ["a"]


@pytest.mark.parametrize("error", [NotFound("no such host"), Unavailable("it is switched off")])
async def test_cancelled_without_the_target(source: Machine, target: Machine, vm: str, error: PolyvisorError) -> None:
    """What has arrived stays held for ever; the VM may be moved there again."""
    await broken(source, target, "source", "move_finish", after=False)

    def find(_: Move) -> Place:
        raise error

    _, left = await cancel_move(Place("a", source), vm, find)
    assert left is not None
    assert error.message in left
    assert startable(source, target) == ["a"]
    assert target.store.names() == ["web"]
    with pytest.raises(WrongState, match="arriving from a"):
        await target.remove(vm)
    await move(source, target)
    assert startable(source, target) == ["b"]


async def test_cancelled_with_another_host(source: Machine, target: Machine, vm: str, tmp_path: Path) -> None:
    await broken(source, target, "source", "move_finish", after=False)
    third = Machine(tmp_path / "c")
    _, left = await cancel_move(Place("a", source), vm, lambda _: Place("c", third))
    assert left is not None
    assert "another host" in left


async def test_a_refusal_at_the_target_gives_it_back(source: Machine, target: Machine, vm: str) -> None:
    target.failing, target.error = "arrive", ImageRefused("a bad disk")
    with pytest.raises(ImageRefused, match="a bad disk"):
        await move(source, target)
    assert startable(source, target) == ["a"]
    assert not (source.home.vms / "web/move.json").exists()


async def test_cancelled_while_it_is_carried(source: Machine, target: Machine, vm: str) -> None:
    """Another command cancels between the target's yes and the source's: the source keeps it, the target drops it."""
    finish = source.move_finish

    async def meanwhile(name: str, token: str) -> None:
        await cancel_move(Place("a", source), name, lambda _: Place("b", target))
        await finish(name, token)

    source.move_finish = meanwhile  # type: ignore[method-assign]
    with pytest.raises(WrongState, match="not leaving by this move"):
        await move(source, target)
    assert startable(source, target) == ["a"]
    assert target.store.names() == []


async def test_another_move_of_the_same_vm_is_refused(
    source: Machine, target: Machine, vm: str, tmp_path: Path
) -> None:
    await broken(source, target, "source", "move_finish", after=False)
    for other, wish in ((Machine(tmp_path / "c"), Wish()), (target, Wish(name="www")), (target, Wish(mode=Mode.PVH))):
        with pytest.raises(WrongState, match="moving to b") as caught:
            await move_vm(Place("a", source), vm, Place("c", other), wish)
        assert "polyvisor --host a move web --to b" in str(caught.value.hint)
    with pytest.raises(WrongState, match="moving to b"):
        await source.move_begin(vm, (await offered(source, target))[1])
    with pytest.raises(WrongState, match="arriving from a"):
        await move(target, source)


async def test_what_is_moving_does_not_change(source: Machine, target: Machine, vm: str) -> None:
    await broken(source, target, "source", "move_finish", after=False)
    for host in (source, target):
        for verb in (
            host.start(vm),
            host.run(replace(SPEC)),
            host.remove(vm),
            host.add_forward(vm, Forward(host_port=0, guest_port=80)),
            host.remove_forward(vm, Forward(host_port=0, guest_port=80)),
        ):
            with pytest.raises(WrongState, match=r"moving|arriving"):
                await verb
    [there], [here] = await target.vms(), await source.vms()
    assert (here.state, here.reason) == (VMState.STOPPED, "moving to b")
    assert (there.state, there.reason) == (VMState.STOPPED, "arriving from a")
    for host in (source, target):
        await host.remove(vm, force=True)
        assert host.store.names() == []


async def test_where_it_went_is_remembered(source: Machine, target: Machine, vm: str, tmp_path: Path) -> None:
    await move(source, target)
    with pytest.raises(NotFound, match="it was moved to b"):
        await move(source, Machine(tmp_path / "c"))
    await target.remove(vm)
    with pytest.raises(NotFound, match="no VM 'web' there any more"):
        await move(source, target)
    await made(target, tmp_path / "other")
    with pytest.raises(WrongState, match="another one"):
        await move(source, target)


async def test_a_token_of_nobody_changes_nothing(source: Machine, target: Machine, vm: str) -> None:
    other = example().token
    with pytest.raises(WrongState, match="not leaving"):
        await source.move_finish(vm, other)
    await source.move_cancel(vm, other, done=True)
    await target.arrival_cancel("web", other)
    await source.arrival_cancel(vm, other)
    with pytest.raises(WrongState, match="not leaving"):
        await anext(source.parcel(vm, other))
    with pytest.raises(InvalidInput):
        await source.move_finish(vm, "../../x")
    assert startable(source, target) == ["a"]


async def test_a_release_without_the_source_is_not_asked_for(source: Machine, target: Machine, vm: str) -> None:
    """What is released is what came by that move, and no other VM of the name."""
    await broken(source, target, "source", "move_finish", after=False)
    _, other = await offered(source, target)
    with pytest.raises(WrongState, match="another one"):
        await target.arrival_release(other)
    assert startable(source, target) == []


async def test_a_lost_connection_is_tried_again(source: Machine, target: Machine, vm: str) -> None:
    arrive, times = target.arrive, 0

    async def flaky(chunks: Any) -> None:
        nonlocal times
        times += 1
        if times < 3:
            raise ConnectionLost("gone")
        await arrive(chunks)

    target.arrive = flaky  # type: ignore[method-assign]
    await move(source, target)
    assert times == 3


# Notes


def test_a_host_keeps_its_id(source: Machine) -> None:
    assert host_id(source.home) == host_id(source.home)
    (source.home.path / "id").write_text("../../etc")
    with pytest.raises(PolyvisorError, match="is not the id"):
        host_id(source.home)


@pytest.mark.parametrize(
    "changes",
    [
        {"token": "x"},
        {"vm_id": "../x"},
        {"name": "/etc"},
        {"new_name": "A"},
        {"source": "\x1b[2J"},
        {"target": "x" * 999},
    ],
)
def test_a_move_that_can_not_be_meant(changes: dict[str, str]) -> None:
    with pytest.raises(InvalidInput):
        replace(example(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1}', "{" * 99_999])
async def test_a_note_that_makes_no_sense(source: Machine, vm: str, text: str) -> None:
    (source.home.vms / "web/move.json").write_text(text)
    with pytest.raises(PolyvisorError, match="can't be understood"):
        await source.start(vm)
    [status] = await source.vms()
    assert "can't be understood" in str(status.reason)
    await source.remove(vm, force=True)


def test_the_command_of_a_move() -> None:
    whole = replace(example(), new_name="www", hypervisor=Hypervisor.XEN, mode=Mode.PV)
    assert str(whole) == "polyvisor --host a move web --to b --name www --hypervisor xen --mode pv"
    assert str(replace(example(), source="local")) == "polyvisor move web --to b"
    assert replace(example(), phase=Phase.LEFT).phase is Phase.LEFT


# The command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Machine, target: Machine) -> Machine:
    monkeypatch.delenv("POLYVISOR_HOST", raising=False)
    monkeypatch.setenv("POLYVISOR_HOME", str(source.home.path))
    monkeypatch.setattr("polyvisor.host.host.Host", lambda: source)
    monkeypatch.setattr("polyvisor.cli.remote.named_host", lambda name: target)
    asyncio.run(made(source, tmp_path / "scratch"))
    return source


def test_the_command(here: Machine, target: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["move", "web", "--to", "far", "--name", "www"]) == 0
    out, err = capsys.readouterr()
    assert out == "www is on far, stopped; start it: polyvisor --host far start www\n"
    assert "www: it will run on tcg, in mode hvm" in err
    assert run(["--host", "far", "move", "www", "--to", "local", "--name", "web", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "web"
    assert here.store.names() == ["web"]


def test_the_command_cancels(here: Machine, target: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(broken(here, target, "source", "move_finish", after=False))
    assert run(["start", "web"]) == 6
    assert "polyvisor move web --cancel" in capsys.readouterr().err
    assert run(["move", "web", "--cancel"]) == 0
    assert capsys.readouterr().out == "web stays; start it: polyvisor start web\n"
    assert target.store.names() == []
    assert run(["move", "web", "--cancel", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "web"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["move", "web"], 2, "no host is named"),
        (["move", "web", "--to", "local"], 2, "is the host that the VM is on"),
        (["move", "nobody", "--to", "far"], 3, "no VM 'nobody'"),
        (["move", "nobody", "--cancel"], 3, "no VM 'nobody'"),
        (["move", "web", "--to", "far", "--name", "A"], 2, "not a VM name"),
        (["move", "../x", "--to", "far"], 2, "not a VM name"),
    ],
)
def test_the_command_says_what_is_wrong(
    here: Machine, words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == status
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_what_the_command_takes() -> None:
    options = parse(["move", "a", "--to", "b", "--hypervisor", "xen", "--mode", "pv"])
    assert (options.name, options.to, options.hypervisor, options.mode, options.cancel) == (
        "a",
        "b",
        "xen",
        "pv",
        False,
    )
    with pytest.raises(UsageError):
        parse(["move", "a", "--to", "b", "--mode", "other"])
    assert VMSpec(name="a", image="b").name == "a"
