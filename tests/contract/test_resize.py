"""vCPUs, memory and CPU shares that change: the guest's own view is the truth, beside what the host says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from polyvisor.errors import InvalidInput, NotFound, TimedOut, WrongState
from polyvisor.host.api import HostApi
from polyvisor.spec.resources import Changes
from polyvisor.spec.vm import Disk, VMSpec
from polyvisor.status import VMState
from tests.contract.guest import BOOT_S, guest, needs

pytestmark = [pytest.mark.qemu, pytest.mark.inside]

OWN_MIB = 110  # what a kernel and its initramfs keep for themselves of the memory that a guest is given
SETTLES_S = 60.0


def roomy(spec: VMSpec) -> VMSpec:
    """`spec` with room to grow while it runs."""
    return replace(spec, memory_mib=192, vcpus_max=3, memory_max_mib=320)


async def vcpus_of(api: HostApi, name: str) -> int:
    return int(await guest(api, name, "nproc"))


async def memory_of(api: HostApi, name: str) -> int:
    """MemTotal of the guest, in MiB."""
    return int((await guest(api, name, "grep MemTotal /proc/meminfo")).split()[1]) // 1024


async def until(api: HostApi, name: str, what: Callable[[int], bool], memory: bool = False) -> int:
    """Wait until the guest sees it: it puts a vCPU on line by itself, a moment after it was plugged in."""
    deadline = time.monotonic() + SETTLES_S
    while not what(value := await (memory_of if memory else vcpus_of)(api, name)):
        assert time.monotonic() < deadline, value
        await asyncio.sleep(0.3)
    return value


def about(memory_mib: int) -> Callable[[int], bool]:
    return lambda value: memory_mib - OWN_MIB < value <= memory_mib


async def settled(api: HostApi, name: str, memory_mib: int) -> int:
    """What the guest sees of `memory_mib` once its balloon has done its work after the boot: it stays so for a second."""
    value = -1
    while value != (value := await until(api, name, about(memory_mib), memory=True)):
        await asyncio.sleep(1)
    return value


async def missing(api: HostApi, feature: str, name: str) -> str | None:
    """Why the driver that the VM runs on can't do it."""
    status = (await api.show(name)).status
    drivers = (await api.status()).capabilities
    found = next(each for each in drivers if status.hypervisor in [one.name for one in each.accelerators])
    return found.refusal(feature, status.hypervisor, status.mode)


async def test_vcpus_are_added_and_removed_while_the_guest_runs(api: HostApi, spec: VMSpec) -> None:
    await api.run(roomy(spec))
    await api.wait_for_ssh(spec.name, timeout_s=BOOT_S)
    assert await vcpus_of(api, spec.name) == 1
    for _ in range(2):
        resized = await api.set(spec.name, Changes(vcpus=3))
        assert (resized.applied, resized.pending) == (("vcpus",), ())
    await until(api, spec.name, lambda value: value == 3)
    details = await api.show(spec.name)
    assert details.usage is not None and details.usage.vcpus == 3
    assert (details.spec.vcpus, details.status.vcpus, details.pending) == (3, 3, ())
    resized = await api.set(spec.name, Changes(vcpus=2))
    if reason := await missing(api, "vcpus-remove", spec.name):
        assert resized.reasons == {"vcpus": reason}
        assert [(each.setting, each.now, each.then) for each in resized.pending] == [("vcpus", "3", "2")]
        assert await vcpus_of(api, spec.name) == 3
        assert (await api.vms())[0].pending == ("vcpus",)
        await api.kill(spec.name)
        await api.start(spec.name)
        await api.wait_for_ssh(spec.name, timeout_s=BOOT_S)
    assert await until(api, spec.name, lambda value: value == 2)
    assert (await api.show(spec.name)).pending == ()
    await api.remove(spec.name, force=True)


async def test_memory_grows_and_shrinks_while_the_guest_runs(api: HostApi, spec: VMSpec) -> None:
    await api.run(roomy(spec))
    await api.wait_for_ssh(spec.name, timeout_s=BOOT_S)
    first = await settled(api, spec.name, 192)
    for memory_mib in (320, 160, 256):
        resized = await api.set(spec.name, Changes(memory_mib=memory_mib))
        assert (resized.applied, resized.pending) == (("memory_mib",), ())
        seen = await memory_of(api, spec.name)
        assert abs(seen - first - (memory_mib - 192)) <= 4, "to the MiB, but for what Xen rounds"
        details = await api.show(spec.name)
        assert details.usage is not None and details.usage.memory_mib is not None
        assert abs(details.usage.memory_mib - memory_mib) <= 10
    await saved_and_resized(api, spec.name)
    await api.reboot(spec.name, force=True)
    await api.wait_for_ssh(spec.name, timeout_s=BOOT_S)
    await until(api, spec.name, about(300), memory=True)
    await api.remove(spec.name, force=True)


async def saved_and_resized(api: HostApi, name: str) -> None:
    """A VM that was resized is saved with what it has by then, goes on with that, and is resized again."""
    if await missing(api, "save", name):
        await api.set(name, Changes(memory_mib=300))
        return
    boot = await guest(api, name, "cat /proc/sys/kernel/random/boot_id")
    await api.set(name, Changes(vcpus=2))
    await until(api, name, lambda value: value == 2)
    seen = await memory_of(api, name)
    for _ in range(2):
        assert (await api.save(name)).vcpus == 2
        await api.start(name)
        assert await guest(api, name, "cat /proc/sys/kernel/random/boot_id") == boot
        assert (await vcpus_of(api, name), await memory_of(api, name)) == (2, seen)
    await api.set(name, Changes(vcpus=3, memory_mib=300))
    await until(api, name, lambda value: value == 3)
    assert abs(await memory_of(api, name) - seen - 44) <= 4


async def test_a_guest_that_can_not_spare_it_keeps_its_memory(api: HostApi, booted: str) -> None:
    """Nothing has changed after an error: neither the guest, nor the spec."""
    before, seen = await api.show(booted), await memory_of(api, booted)
    with pytest.raises((WrongState, TimedOut), match=f"VM '{booted}' was not changed"):
        await api.set(booted, Changes(memory_mib=16))
    assert (await api.show(booted)).spec == before.spec
    assert abs(await until(api, booted, lambda value: abs(value - seen) <= 4, memory=True) - seen) <= 4


async def test_more_than_there_is_room_for_waits(api: HostApi, booted: str) -> None:
    resized = await api.set(booted, Changes(vcpus=2, memory_mib=200))
    assert resized.applied == ()
    assert {each.setting for each in resized.pending} == {"vcpus", "memory_mib"} == resized.reasons.keys()
    assert await vcpus_of(api, booted) == 1
    assert (await api.show(booted)).status.pending == ("vcpus", "memory_mib")
    await api.kill(booted)
    assert (await api.start(booted)).pending == ()
    await api.wait_for_ssh(booted, timeout_s=BOOT_S)
    assert await vcpus_of(api, booted) == 2
    assert about(200)(await memory_of(api, booted))


async def test_a_vm_at_rest_is_changed_for_its_start(api: HostApi, spec: VMSpec) -> None:
    with pytest.raises(NotFound):
        await api.set(spec.name, Changes(vcpus=2))
    await api.create(spec)
    resized = await api.set(spec.name, Changes(vcpus=2, memory_mib=160))
    assert (resized.status.state, resized.applied, resized.pending) == (VMState.STOPPED, (), ())
    status = await api.start(spec.name)
    assert (status.vcpus, status.memory_mib, status.pending) == (2, 160, ())
    await api.wait_for_ssh(spec.name, timeout_s=BOOT_S)
    assert await vcpus_of(api, spec.name) == 2
    assert about(160)(await memory_of(api, spec.name))
    await api.remove(spec.name, force=True)


async def test_a_paused_guest_takes_no_part(api: HostApi, booted: str) -> None:
    before = (await api.show(booted)).spec
    await api.pause(booted)
    with pytest.raises(WrongState, match="paused") as raised:
        await api.set(booted, Changes(memory_mib=100))
    assert raised.value.hint is not None and "resume" in raised.value.hint
    assert (await api.show(booted)).spec == before


async def test_affinity_of_a_spec_and_of_a_running_vm(api: HostApi, spec: VMSpec) -> None:
    await api.run(replace(spec, cpu_affinity="0"))
    assert (await api.set(spec.name, Changes(cpu_affinity="all"))).applied == ("cpu_affinity",)
    assert (await api.set(spec.name, Changes(cpu_affinity="0"))).applied == ("cpu_affinity",)
    with pytest.raises(InvalidInput, match="this host has no CPU 4000"):
        await api.set(spec.name, Changes(cpu_affinity="0,4000"))
    assert (await api.show(spec.name)).spec.cpu_affinity == "0"
    await api.remove(spec.name, force=True)


async def test_weight_and_limit(api: HostApi, spec: VMSpec) -> None:
    await needs(api, "cpu-limit")
    await needs(api, "cpu-weight")
    await api.run(replace(spec, cpu_weight=200, cpu_limit=50))
    resized = await api.set(spec.name, Changes(cpu_weight=300, cpu_limit=0))
    assert (resized.applied, resized.pending) == (("cpu_weight", "cpu_limit"), ())
    shown = (await api.show(spec.name)).spec
    assert (shown.cpu_weight, shown.cpu_limit) == (300, None)
    await api.remove(spec.name, force=True)


async def test_disks_are_no_faster_than_they_may_be(api: HostApi, spec: VMSpec) -> None:
    """All disks share one limit, which a guest keeps that is saved, or forked, and goes on."""
    await needs(api, "disk-rate-limit-mib")
    await needs(api, "disk-iops-limit")
    await api.run(replace(spec, disks=(Disk(size_gib=1),), disk_rate_limit_mib=4))
    await api.wait_for_ssh(spec.name, timeout_s=BOOT_S)
    assert await reading(api, spec.name, mib=8) > 1.5
    resized = await api.set(spec.name, Changes(disk_rate_limit_mib=0))
    assert (resized.applied, resized.pending) == (("disk_rate_limit_mib",), ())
    assert await reading(api, spec.name, mib=160) < 30, "it would take 40 s"
    await api.disk_add(spec.name, 1)
    assert (await api.set(spec.name, Changes(disk_iops_limit=32))).applied == ("disk_iops_limit",)
    assert await reading(api, spec.name, mib=8, disk="vdb") > 1.5, "64 requests"
    await api.save(spec.name)
    await api.start(spec.name)
    assert await reading(api, spec.name, mib=8) > 1.5
    await api.fork(spec.name, ["copy"])
    await api.wait_for_ssh("copy", timeout_s=BOOT_S)
    assert await reading(api, "copy", mib=8) > 1.5
    details = await api.show("copy")
    assert (details.spec.disk_iops_limit, details.spec.disk_rate_limit_mib, details.pending) == (32, None, ())
    for name in (spec.name, "copy"):
        await api.remove(name, force=True)


async def reading(api: HostApi, name: str, *, mib: int, disk: str = "vda") -> float:
    """How many seconds a guest takes to read so much of a disk, 128 KiB at a time."""
    await guest(api, name, f"until [ -b /dev/{disk} ]; do sleep 0.1; done; echo 3 > /proc/sys/vm/drop_caches")
    begun = time.monotonic()
    assert await guest(api, name, f"dd if=/dev/{disk} of=/dev/null bs=128k count={mib * 8} && echo done") == "done"
    return time.monotonic() - begun
