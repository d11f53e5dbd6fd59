"""Disks and network cards that come, grow and go: the guest's own view is the truth, beside what the host says."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path

import pytest

from polyvisor.errors import AlreadyExists, InvalidInput, NotFound, WrongState
from polyvisor.host.api import HostApi
from polyvisor.remote.transfer import export_vm
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import DeviceModel, Disk, Nic, VMSpec
from polyvisor.status import VMState
from tests.contract.guest import BOOT_S, guest, needs

pytestmark = [pytest.mark.qemu]

SETTLES_S = 30.0
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
# Where devices are on the PCI bus, and what they are: 0000:00:03.0 0x020000.
SLOTS = "for d in /sys/bus/pci/devices/*; do echo ${d##*/} $(cat $d/class); done"
_GIB = 1 << 30


async def sizes(api: HostApi, name: str) -> dict[str, int]:
    """The disks that the guest has, with their sizes in bytes."""
    shown = await guest(api, name, "for d in /sys/block/*vd*; do [ -e $d ] && echo ${d##*/} $(cat $d/size); done; true")
    return {word: 512 * int(size) for word, size in (line.split() for line in shown.splitlines())}


async def cards(api: HostApi, name: str) -> set[str]:
    """The addresses of the guest's network cards."""
    return set((await guest(api, name, "cat /sys/class/net/eth*/address")).split())


async def has_disks(api: HostApi, name: str, wanted: dict[str, int]) -> None:
    """Wait until the guest has these disks: it finds them a moment after they were plugged in."""
    deadline = time.monotonic() + SETTLES_S
    while (found := await sizes(api, name)) != wanted:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.2)


def written(word: str, disk: str) -> str:
    return f"echo {word} | dd of=/dev/{disk} bs=512 conv=sync,fsync 2>/dev/null"


def what_is_on(disk: str) -> str:
    return f"dd if=/dev/{disk} bs=512 count=1 iflag=direct 2>/dev/null | head -n 1"


async def mac_of(api: HostApi, name: str, nic: str) -> str:
    return next(each.mac for each in await api.nic_list(name) if each.name == nic)


@pytest.mark.inside
async def test_disks_of_a_running_vm(api: HostApi, spec: VMSpec) -> None:
    """Added, grown, saved, restored, removed: what is on the disk stays, no device moves, a new start has the same."""
    for feature in ("disk-add", "disk-grow", "disk-remove", "save"):
        await needs(api, feature)
    name = spec.name
    await api.run(dataclasses.replace(spec, disks=(Disk(size_gib=1),)))
    await has_disks(api, name, {"vda": _GIB})
    boot_id = await guest(api, name, BOOT_ID)
    for _ in range(2):
        [first, added] = await api.disk_add(name, 2, disk="disk1")
        assert (first.name, added.name, added.size_mib, added.pending) == ("disk0", "disk1", 2048, None)
    await has_disks(api, name, {"vda": _GIB, "vdb": 2 * _GIB})
    await guest(api, name, written("words", "vdb"))
    for _ in range(2):
        assert [each.size_mib for each in await api.disk_grow(name, "disk1", 3)] == [1024, 3072]
    await has_disks(api, name, {"vda": _GIB, "vdb": 3 * _GIB})
    with pytest.raises(InvalidInput, match="size_gib: 2: is less than disk1 has"):
        await api.disk_grow(name, "disk1", 2)
    slots = await guest(api, name, SLOTS)

    for _ in range(2):
        await api.save(name)
        with pytest.raises(WrongState, match="is saved"):
            await api.disk_add(name)
        await api.start(name)
        assert await guest(api, name, f"{BOOT_ID}; {what_is_on('vdb')}") == f"{boot_id}\nwords"
        assert (await sizes(api, name), await guest(api, name, SLOTS)) == ({"vda": _GIB, "vdb": 3 * _GIB}, slots)

    await api.disk_add(name)
    await has_disks(api, name, {"vda": _GIB, "vdb": 3 * _GIB, "vdc": _GIB})
    slots = await guest(api, name, SLOTS)
    with pytest.raises(WrongState, match="what is on disk1 would be lost"):
        await api.disk_remove(name, "disk1")
    left = await api.disk_remove(name, "disk1", force=True)
    assert [each.name for each in left] == ["disk0", "disk2"]
    await has_disks(api, name, {"vda": _GIB, "vdc": _GIB})
    with pytest.raises(NotFound, match="no disk 'disk1'"):
        await api.disk_remove(name, "disk1", force=True)
    await guest(api, name, written("other", "vdc"))
    await api.save(name)
    await api.start(name)
    assert await guest(api, name, f"{BOOT_ID}; {what_is_on('vdc')}") == f"{boot_id}\nother"

    await api.kill(name)
    await api.start(name)
    assert await guest(api, name, what_is_on("vdb")) == "other", "the guest counts them anew"
    assert set((await guest(api, name, SLOTS)).splitlines()) < set(slots.splitlines()), "none has moved"
    assert (await api.show(name)).pending == ()
    await api.remove(name, force=True)


@pytest.mark.inside
async def test_network_cards_of_a_running_vm(api: HostApi, spec: VMSpec) -> None:
    for feature in ("nic-add", "nic-remove", "save"):
        await needs(api, feature)
    name = spec.name
    await api.run(spec)
    await api.wait_for_ssh(name, timeout_s=BOOT_S)
    before = await cards(api, name)
    await api.nic_add(name, "private:devices", nic="nic1")
    added = await api.nic_add(name, mac="52:54:00:77:00:01")
    assert [(each.name, each.network, each.pending) for each in added] == [
        ("nic0", "user", None),
        ("nic1", "private:devices", None),
        ("nic2", "user", None),
    ]
    with pytest.raises(AlreadyExists, match="has a nic1 already: private:devices"):
        await api.nic_add(name, nic="nic1")
    with pytest.raises(InvalidInput, match="is that of another card"):
        await api.nic_add(name, mac="52:54:00:77:00:01")
    every = {each.mac for each in added}
    deadline = time.monotonic() + SETTLES_S
    while await cards(api, name) != every:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    await guest(api, name, "until ip addr show dev eth2 | grep -q 10.0.4.15; do sleep 0.1; done")
    slots = await guest(api, name, SLOTS)
    await api.save(name)
    await api.start(name)
    assert (await cards(api, name), await guest(api, name, SLOTS)) == (every, slots)
    assert before < every

    await api.add_forward(name, Forward(host_port=0, guest_port=80))
    left = await api.nic_remove(name, "nic0")
    assert [each.name for each in left] == ["nic1", "nic2"]
    assert [each.guest_port for each in (await api.show(name)).status.forwards] == [22], "by the card that is left"
    assert await cards(api, name) == every - before
    await api.save(name)
    await api.start(name)
    assert await cards(api, name) == every - before
    await api.nic_remove(name, "nic1")
    await api.kill(name)
    await api.start(name)
    await api.wait_for_ssh(name, timeout_s=BOOT_S)
    assert await cards(api, name) == {"52:54:00:77:00:01"}
    await api.nic_remove(name, "nic2")
    assert (await api.show(name)).status.forwards == ()
    assert await api.nic_list(name) == []
    await api.remove(name, force=True)


@pytest.mark.inside
async def test_snapshots_forks_and_clones_of_changed_disks(api: HostApi, spec: VMSpec, tmp_path: Path) -> None:
    """They go on with disks that were plugged in; where those differ by then, it is said what to do."""
    for feature in ("disk-add", "disk-remove", "snapshot-memory", "fork"):
        await needs(api, feature)
    name, other = spec.name, f"{spec.name}-other"
    await api.run(dataclasses.replace(spec, disks=(Disk(size_gib=1), Disk(size_gib=1))))
    await api.wait_for_ssh(name, timeout_s=BOOT_S)
    await api.disk_remove(name, "disk0", force=True)
    await api.disk_add(name, 2, disk="disk2")
    await has_disks(api, name, {"vdb": _GIB, "vda": 2 * _GIB})
    await guest(api, name, f"{written('first', 'vdb')}; {written('third', 'vda')}")
    boot_id = await guest(api, name, BOOT_ID)
    await api.snapshot_create(name, snapshot="a")
    await guest(api, name, written("later", "vda"))

    await api.fork(name, [other])
    assert await guest(api, other, f"{what_is_on('vdb')}; {what_is_on('vda')}") == "first\nlater"
    await api.disk_add(other, 1)
    await has_disks(api, other, {"vda": 2 * _GIB, "vdb": _GIB, "vdc": _GIB})
    await api.disk_remove(other, "disk2", force=True)
    await api.remove(other, force=True)

    await api.disk_remove(name, "disk2", force=True)
    await api.disk_add(name, 1, disk="disk3")
    await api.snapshot_create(name, snapshot="b", memory=False)
    with pytest.raises(WrongState, match="had disk1, disk2 at snapshot 'a', and has disk1, disk3 now") as raised:
        await api.snapshot_revert(name, "a", force=True)
    assert raised.value.hint is not None and f"disk add {name} --name disk2" in raised.value.hint
    with pytest.raises(WrongState, match="had disk1, disk2"):
        await api.clone(name, other, snapshot="a")
    await api.kill(name)
    await api.disk_remove(name, "disk3", force=True)
    await api.disk_add(name, 2, disk="disk2")
    await api.snapshot_revert(name, "a")
    await api.start(name)
    assert await guest(api, name, f"{BOOT_ID}; {what_is_on('vdb')}; {what_is_on('vda')}") == f"{boot_id}\nfirst\nthird"
    await api.disk_grow(name, "disk2", 3)
    await has_disks(api, name, {"vdb": _GIB, "vda": 3 * _GIB})

    await api.kill(name)
    await api.clone(name, other)
    await api.clone(name, f"{other}-2", snapshot="a", full=True)
    await api.remove(name)
    for clone, file in ((other, tmp_path / "one.vm"), (f"{other}-2", tmp_path / "two.vm")):
        await export_vm(api, clone, file)
        await api.remove(clone)
        await api.vm_import(str(file))
        assert [each.size_mib for each in await api.disk_list(clone)] == [1024, 3072], "under new numbers"
        await api.start(clone)
        assert await guest(api, clone, f"{what_is_on('vda')}; {what_is_on('vdb')}") == "first\nthird"
        await api.remove(clone, force=True)


async def test_a_vm_at_rest(api: HostApi, spec: VMSpec) -> None:
    """All changes are in its directory and its spec, and what runs it next has them."""
    name = spec.name
    with pytest.raises(NotFound):
        await api.disk_list(name)
    await api.create(spec)
    assert await api.disk_list(name) == []
    await api.disk_add(name, 1)
    await api.disk_add(name, 2)
    assert [(each.name, each.size_mib) for each in await api.disk_grow(name, "disk0", 3)] == [
        ("disk0", 3072),
        ("disk1", 2048),
    ]
    await api.disk_remove(name, "disk1", force=True)
    with pytest.raises(InvalidInput, match="disk: 'sda': is no name for a disk"):
        await api.disk_add(name, 1, disk="sda")
    with pytest.raises(InvalidInput, match="size_gib: 0: is out of range"):
        await api.disk_add(name, 0)
    with pytest.raises(AlreadyExists, match="has a disk0 already: 3 GiB"):
        await api.disk_add(name, 1, disk="disk0")
    with pytest.raises(InvalidInput, match="network: 'wifi'"):
        await api.nic_add(name, "wifi")
    await api.nic_add(name, "none")
    await api.nic_remove(name, "nic0")
    details = await api.show(name)
    assert (details.spec.disks, details.spec.nics) == ((Disk(size_gib=3),), (Nic(network="none"),))
    assert (details.disk_names, details.nic_names, details.pending) == (("disk0",), ("nic1",), ())
    assert (await api.start(name)).state is VMState.RUNNING
    assert (await api.disk_list(name))[0].pending is None
    await api.remove(name, force=True)


async def test_what_waits_for_the_next_boot(api: HostApi, spec: VMSpec) -> None:
    """Emulated devices stay as they are until then; memory is not kept meanwhile, which would not fit."""
    name = spec.name
    await api.run(dataclasses.replace(spec, devices=DeviceModel.EMULATED, disks=(Disk(size_gib=1), Disk(size_gib=1))))
    added = (await api.disk_add(name, 1))[-1]
    assert added.pending == "added at the next boot" and "emulated" in (added.reason or "")
    grown = (await api.disk_grow(name, "disk0", 2))[0]
    assert (grown.pending, grown.size_mib) == ("grown to 2 GiB at the next boot", 1024)
    removed = (await api.disk_remove(name, "disk1", force=True))[-1]
    assert (removed.name, removed.pending) == ("disk1", "removed at the next boot")
    assert [each.pending is None for each in await api.nic_add(name, "none")] == [True, False]
    shown = {each.setting: (each.now, each.then) for each in (await api.show(name)).pending}
    assert shown == {
        "disk0": ("1 GiB", "2 GiB"),
        "disk1": ("1 GiB", "none"),
        "disk2": ("none", "1 GiB"),
        "nic1": ("none", "on none"),
    }
    with pytest.raises(WrongState, match="can't be saved while disk1, disk2, nic1 wait for its next boot"):
        await api.save(name)
    with pytest.raises(WrongState, match="can't get a snapshot while disk1"):
        await api.snapshot_create(name)
    with pytest.raises(WrongState, match="can't be forked while disk1"):
        await api.fork(name, [f"{name}-2"])
    await api.kill(name)
    assert (await api.start(name)).pending == ()
    assert [(each.name, each.size_mib, each.pending) for each in await api.disk_list(name)] == [
        ("disk0", 2048, None),
        ("disk2", 1024, None),
    ]
    await api.remove(name, force=True)


async def test_a_paused_guest_lets_go_of_nothing(api: HostApi, spec: VMSpec) -> None:
    await needs(api, "disk-remove")
    await api.run(dataclasses.replace(spec, disks=(Disk(size_gib=1),)))
    await api.pause(spec.name)
    before = (await api.show(spec.name)).spec
    with pytest.raises(WrongState, match="is paused: its guest can't let go of disk0") as raised:
        await api.disk_remove(spec.name, "disk0", force=True)
    assert raised.value.hint is not None and "resume" in raised.value.hint
    assert (await api.show(spec.name)).spec == before
    await api.disk_grow(spec.name, "disk0", 2)
    await api.remove(spec.name, force=True)
