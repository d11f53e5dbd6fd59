"""The life of a VM: made, started, looked at, stopped, removed; every verb twice, since every verb is idempotent."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest

from polyvisor.errors import AlreadyExists, InvalidInput, NotFound, Unsupported, WrongState
from polyvisor.host.api import HostApi
from polyvisor.spec.vm import Disk, Hypervisor, Nic, VMSpec
from polyvisor.status import VMState
from tests.contract.guest import guest

pytestmark = [pytest.mark.qemu]


async def test_the_host_says_what_it_runs_on_and_why(api: HostApi) -> None:
    status = await api.status()
    assert status.hypervisor in ("kvm", "tcg", "xen")
    assert status.hypervisor_reason
    assert status.memory_mib > 0
    offered = {a.name: a for c in status.capabilities for a in c.accelerators}
    assert offered[status.hypervisor].available
    assert all(a.reason for a in offered.values())


async def test_create_makes_a_stopped_vm_and_once(api: HostApi, spec: VMSpec) -> None:
    made = await api.create(spec)
    assert made.state is VMState.STOPPED
    assert await api.create(spec) == made
    with pytest.raises(AlreadyExists, match=spec.name):
        await api.create(dataclasses.replace(spec, vcpus=2))
    assert [status.name for status in await api.vms()] == [spec.name]


async def test_start_and_kill_are_idempotent(api: HostApi, spec: VMSpec) -> None:
    await api.create(spec)
    started = await api.start(spec.name)
    assert started.state is VMState.RUNNING
    assert started.pid is not None
    assert (await api.start(spec.name)).pid == started.pid
    assert (await api.kill(spec.name)).state is VMState.STOPPED
    assert (await api.kill(spec.name)).state is VMState.STOPPED


async def test_run_of_a_running_vm_succeeds(api: HostApi, running: str, spec: VMSpec) -> None:
    before = (await api.show(running)).status
    assert (await api.run(spec)).pid == before.pid


async def test_pause_and_resume(api: HostApi, running: str) -> None:
    for _ in range(2):
        assert (await api.pause(running)).state is VMState.PAUSED
    for _ in range(2):
        assert (await api.resume(running)).state is VMState.RUNNING


@pytest.mark.inside
async def test_a_paused_guest_stands_still(api: HostApi, booted: str) -> None:
    began, up_before = time.monotonic(), float(await guest(api, booted, "cut -d' ' -f1 /proc/uptime"))
    await api.pause(booted)
    await asyncio.sleep(3)
    await api.resume(booted)
    up_after, ended = float(await guest(api, booted, "cut -d' ' -f1 /proc/uptime")), time.monotonic()
    assert 0 < up_after - up_before < ended - began - 2, "its clock has gone on as if it had run all the time"


async def test_remove_wants_a_stopped_vm_or_force(api: HostApi, spec: VMSpec) -> None:
    await api.run(spec)
    with pytest.raises(WrongState, match=spec.name):
        await api.remove(spec.name)
    assert (await api.show(spec.name)).status.state is VMState.RUNNING
    await api.remove(spec.name, force=True)
    assert await api.vms() == []
    with pytest.raises(NotFound):
        await api.remove(spec.name)


async def test_verbs_on_a_vm_that_is_not_there(api: HostApi) -> None:
    for verb in (
        api.show,
        api.start,
        api.stop,
        api.kill,
        api.reboot,
        api.pause,
        api.resume,
        api.remove,
        api.ssh_target,
    ):
        with pytest.raises(NotFound, match="nobody"):
            await verb("nobody")


async def test_verbs_that_need_a_live_vm(api: HostApi, spec: VMSpec) -> None:
    await api.create(spec)
    for verb in (api.pause, api.resume, api.reboot, api.console, api.ssh_target):
        with pytest.raises(WrongState, match="stopped"):
            await verb(spec.name)


async def test_show_tells_all(api: HostApi, running: str, spec: VMSpec) -> None:
    details = await api.show(running)
    assert details.spec == spec
    assert details.argv is not None
    assert details.hypervisor_reason
    assert len(details.mac_addresses) == 1
    assert details.status.started_at is not None


@pytest.mark.inside
async def test_what_the_guest_gets_is_what_was_asked_for(api: HostApi, spec: VMSpec) -> None:
    wanted = dataclasses.replace(
        spec,
        vcpus=2,
        memory_mib=192,
        disks=(Disk(size_gib=1), Disk(size_gib=3)),
        nics=(Nic(), Nic(mac="52:54:00:00:00:07")),
    )
    await api.run(wanted)
    assert await guest(api, spec.name, "hostname") == spec.name
    assert await guest(api, spec.name, "nproc") == "2"
    assert 150 < int(await guest(api, spec.name, "awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo")) <= 192
    sizes = await guest(api, spec.name, "cat /sys/block/*vda/size /sys/block/*vdb/size")
    assert [int(sectors) >> 21 for sectors in sizes.split()] == [1, 3]
    assert await guest(api, spec.name, "cat /sys/class/net/eth1/address") == "52:54:00:00:00:07"


async def test_labels_are_kept(api: HostApi, spec: VMSpec) -> None:
    await api.create(dataclasses.replace(spec, labels={"tier": "web", "owner": "a b"}))
    assert (await api.vms())[0].labels == {"tier": "web", "owner": "a b"}


async def test_a_failed_run_leaves_nothing(api: HostApi, spec: VMSpec) -> None:
    offered = [each for driver in (await api.status()).capabilities for each in driver.accelerators if each.available]
    absent = next(h for h in (Hypervisor.XEN, Hypervisor.KVM) if h.value not in [each.name for each in offered])
    with pytest.raises(Unsupported, match=absent.value):
        await api.run(dataclasses.replace(spec, hypervisor=absent))
    with pytest.raises(InvalidInput, match="memory_mib"):
        await api.run(dataclasses.replace(spec, memory_mib=16 << 20))
    with pytest.raises(NotFound, match="no-such-image"):
        await api.run(dataclasses.replace(spec, image="no-such-image"))
    assert await api.vms() == []
