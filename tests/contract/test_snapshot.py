"""Snapshots bring back what was, alone or with memory, as a tree; clones are other VMs; a VM goes through a file unharmed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from polyvisor.errors import AlreadyExists, ImageRefused, InvalidInput, NotFound, WrongState
from polyvisor.host.api import HostApi
from polyvisor.remote.transfer import export_vm
from polyvisor.spec.vm import Disk, Nic, VMSpec
from polyvisor.status import VMState
from tests.contract.guest import DISK, guest, needs
from tests.thorough import THOROUGH

pytestmark = [pytest.mark.qemu]

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
READ = f"head -c 5 {DISK}"


def write(word: str) -> str:
    """Write a word of five letters onto the disk, and into memory."""
    return f"echo {word} | dd of={DISK} bs=512 conv=sync,fsync; echo {word} >/tmp/word"


def with_disk(spec: VMSpec) -> VMSpec:
    return dataclasses.replace(spec, disks=(Disk(size_gib=1),))


@pytest.mark.inside
async def test_memory_and_disks_are_as_they_were(api: HostApi, spec: VMSpec) -> None:
    """A tree of snapshots with memory: the same kernel goes on at each of them, with the disk of then."""
    await needs(api, "snapshot-memory")
    name = spec.name
    await api.run(with_disk(spec))
    boot_id = await guest(api, name, BOOT_ID)
    await guest(api, name, write("first"))
    one = await api.snapshot_create(name, snapshot="one", description="the first")
    assert (one.name, one.parent, one.current, one.running) == ("one", None, True, True)
    assert one.memory_bytes is not None and one.memory_bytes > 1 << 20
    assert (await api.show(name)).status.state is VMState.RUNNING
    await guest(api, name, write("other"))
    two = await api.snapshot_create(name)
    assert (two.name, two.parent) == ("s1", "one")
    assert await guest(api, name, f"{READ}; {BOOT_ID}") == f"other{boot_id}"

    with pytest.raises(WrongState, match="running"):
        await api.snapshot_revert(name, "one")
    for _ in range(2):  # and once more, before it is started
        assert (await api.snapshot_revert(name, "one", force=True)).state is VMState.SAVED
    assert (await api.start(name)).state is VMState.RUNNING
    assert await guest(api, name, f"{READ}; cat /tmp/word; {BOOT_ID}") == f"firstfirst\n{boot_id}"
    await guest(api, name, write("third"))
    three = await api.snapshot_create(name, snapshot="three", memory=False)
    assert (three.parent, three.memory_bytes) == ("one", None)

    await api.snapshot_remove(name, "one")  # in the middle: both that stand on it stay
    shown = {each.name: (each.parent, each.current) for each in await api.snapshot_list(name)}
    assert shown == {"s1": (None, False), "three": (None, True)}
    await api.snapshot_revert(name, "s1", force=True)
    await api.start(name)
    assert await guest(api, name, f"{READ}; cat /tmp/word; {BOOT_ID}") == f"otherother\n{boot_id}"
    await api.remove(name, force=True)


@pytest.mark.inside
async def test_disks_alone_clones_and_files(api: HostApi, spec: VMSpec, tmp_path: Path) -> None:
    """What was written is there again after a revert, in a linked clone that outlives its source, and after a file."""
    await needs(api, "snapshot-live")
    name, other = spec.name, f"{spec.name}-clone"
    await api.run(with_disk(spec))
    await guest(api, name, write("first"))
    assert not (await api.snapshot_create(name, snapshot="a", memory=False)).memory_bytes
    first_key = (await api.ssh_target(name)).known_hosts.read_text().split()[2]
    await guest(api, name, write("other"))
    assert (await api.snapshot_revert(name, "a", force=True)).state is VMState.STOPPED
    made = await api.clone(name, other, snapshot="a")
    source, clone = await api.show(name), await api.show(other)
    assert made.state is VMState.STOPPED and made.id != source.status.id
    assert set(clone.mac_addresses).isdisjoint(source.mac_addresses)
    await api.remove(name)

    await api.start(other)
    assert await guest(api, other, f"{READ}; hostname") == f"first{other}"
    assert (await api.ssh_target(other)).known_hosts.read_text().split()[2] != first_key
    await guest(api, other, write("clone"))
    with pytest.raises(WrongState, match="running"):
        await export_vm(api, other, tmp_path / "vm")
    await api.stop(other)
    await export_vm(api, other, tmp_path / "vm")
    await api.remove(other)
    assert (await api.vm_import(str(tmp_path / "vm"))).id == made.id
    await api.start(other)
    assert await guest(api, other, READ) == "clone"
    await api.remove(other, force=True)


@pytest.mark.inside
async def test_disks_of_a_vm_that_was_stopped(api: HostApi, spec: VMSpec) -> None:
    """Layers above layers, booted from by whatever runs VMs here."""
    if not THOROUGH:
        pytest.skip("boots three times for what the others show on QEMU: tested with POLYVISOR_TEST_ALL=1")
    name = spec.name
    await api.run(with_disk(spec))
    for word in ("first", "other"):
        await guest(api, name, write(word))
        await api.stop(name)
        await api.snapshot_create(name, snapshot=word)
        await api.start(name)
    assert await guest(api, name, READ) == "other"
    await api.snapshot_revert(name, "first", force=True)
    await api.start(name)
    assert await guest(api, name, READ) == "first"
    await api.remove(name, force=True)


@pytest.mark.inside
async def test_a_vm_without_disks_has_its_memory(api: HostApi, booted: str) -> None:
    await needs(api, "snapshot-memory")
    before = await guest(api, booted, f"echo kept >/tmp/file; {BOOT_ID}")
    with pytest.raises(WrongState, match="no disk"):
        await api.snapshot_create(booted, memory=False)
    await api.pause(booted)
    await api.snapshot_create(booted, snapshot="paused")
    assert (await api.show(booted)).status.state is VMState.PAUSED
    await api.resume(booted)
    await guest(api, booted, "rm /tmp/file")
    await api.snapshot_revert(booted, "paused", force=True)
    assert (await api.start(booted)).state is VMState.PAUSED
    await api.resume(booted)
    assert await guest(api, booted, f"cat /tmp/file; {BOOT_ID}") == f"kept\n{before}"
    await api.kill(booted)
    with pytest.raises(WrongState, match="memory"):
        await api.snapshot_create(booted, memory=True)
    with pytest.raises(WrongState, match="no disk"):
        await api.snapshot_create(booted)


async def test_snapshots_of_a_stopped_vm_are_a_tree(api: HostApi, spec: VMSpec) -> None:
    name = spec.name
    await api.create(with_disk(spec))
    assert await api.snapshot_list(name) == []
    for snapshot, parent in (("a", None), ("b", "a"), ("c", "b")):
        assert (await api.snapshot_create(name, snapshot=snapshot)).parent == parent
    with pytest.raises(AlreadyExists, match="'b'"):
        await api.snapshot_create(name, snapshot="b")
    assert (await api.snapshot_revert(name, "b")).state is VMState.STOPPED
    assert (await api.snapshot_show(name, "b")).current
    assert (await api.snapshot_create(name)).parent == "b"
    await api.snapshot_remove(name, "b")
    parents = {each.name: each.parent for each in await api.snapshot_list(name)}
    assert parents == {"a": None, "c": "a", "s1": "a"}
    with pytest.raises(NotFound, match="no snapshot 'b'"):
        await api.snapshot_remove(name, "b")
    with pytest.raises(NotFound, match="no snapshot 's11'") as raised:
        await api.snapshot_revert(name, "s11")
    assert raised.value.hint == "did you mean 's1'?"
    with pytest.raises(InvalidInput):
        await api.snapshot_create(name, snapshot="../x")
    await api.remove(name)
    with pytest.raises(NotFound):
        await api.snapshot_list(name)


async def test_clones_are_other_vms(api: HostApi, spec: VMSpec) -> None:
    """Linked or full, of a VM or of a clone; what one stands on stays when the other goes."""
    name = spec.name
    nic = Nic(mac="52:54:00:12:34:56", forwards=("40022:22",))
    await api.create(dataclasses.replace(with_disk(spec), nics=(nic,)))
    made = [await api.clone(name, f"{name}-1"), await api.clone(f"{name}-1", f"{name}-2", full=True)]
    await api.clone(f"{name}-1", f"{name}-3")
    shown = [await api.show(each) for each in await api.names()]
    assert len({each.status.id for each in shown}) == len(shown) == 4
    assert len({each.mac_addresses for each in shown}) == 4
    assert [each.spec.nics[0].forwards for each in shown] == [("40022:22",), *[("127.0.0.1::22",)] * 3]
    assert all(each.state is VMState.STOPPED for each in made)
    with pytest.raises(AlreadyExists):
        await api.clone(name, f"{name}-1")
    with pytest.raises(InvalidInput):
        await api.clone(name, name)
    with pytest.raises(NotFound):
        await api.clone(name, "another", snapshot="none")
    assert "another" not in await api.names()
    await api.remove(name)
    await api.remove(f"{name}-1")
    await api.clone(f"{name}-3", name, full=True)
    for each in (name, f"{name}-2", f"{name}-3"):
        await api.remove(each)


async def test_a_vm_that_runs_is_cloned_by_a_snapshot(api: HostApi, running: str) -> None:
    with pytest.raises(WrongState, match="running") as raised:
        await api.clone(running, "copy")
    assert raised.value.hint is not None and "snapshot create" in raised.value.hint


async def test_a_vm_is_taken_in_from_a_file(api: HostApi, spec: VMSpec, tmp_path: Path) -> None:
    """With its snapshots left behind; the same VM where it is not here any more, and a clone where it is."""
    name, file = spec.name, tmp_path / "vm"
    made = await api.create(with_disk(spec))
    await api.snapshot_create(name)
    await export_vm(api, name, file)
    with pytest.raises(AlreadyExists):
        await export_vm(api, name, file)
    with pytest.raises(AlreadyExists):
        await api.vm_import(str(file))
    copy = await api.vm_import(str(file), name=f"{name}-2")
    assert copy.id != made.id and copy.name == f"{name}-2"
    await api.remove(name)
    assert (await api.vm_import(str(file))).id == made.id
    assert await api.snapshot_list(name) == []
    content = file.read_bytes()
    for broken in (content[:-100], content[:40], b"", b"polyvisor vm 2\n" + content[15:], content[:-200] + bytes(200)):
        file.write_bytes(broken)
        with pytest.raises(ImageRefused):
            await api.vm_import(str(file), name="broken")
    assert "broken" not in await api.names()
    with pytest.raises(NotFound):
        await api.vm_import(str(tmp_path / "none"))
    for each in (name, f"{name}-2"):
        await api.remove(each)
