"""A VM that is saved goes on where it was: the same kernel, memory and disks; and not twice from the same place."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from polyvisor.errors import NotFound, WrongState
from polyvisor.host.api import HostApi
from polyvisor.operation import Step
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import Disk, VMSpec
from polyvisor.status import VMState
from tests.contract.guest import BOOT_S, DISK, guest, needs

pytestmark = [pytest.mark.qemu, pytest.mark.inside]
saves = pytest.mark.usefixtures("saving")  # a mark of this module would be lost where its tests are imported

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
COUNT = (
    "cd /dev/shm 2>/dev/null || cd /tmp; (n=0; while sleep 0.1; do n=$((n+1)); echo $n >count; done) >/dev/null 2>&1 &"
)
COUNTED = "cd /dev/shm 2>/dev/null || cd /tmp; cat count"


@pytest.fixture
async def saving(api: HostApi) -> None:
    await needs(api, "save")


@saves
async def test_a_saved_vm_goes_on_where_it_was(api: HostApi, spec: VMSpec) -> None:
    await api.run(dataclasses.replace(spec, disks=(Disk(size_gib=1),)))
    before = await guest(api, spec.name, BOOT_ID)
    await guest(api, spec.name, f"echo kept >/tmp/file; echo there | dd of={DISK} bs=512 conv=sync; {COUNT}")
    counted = int(await guest(api, spec.name, f"sleep 0.5; {COUNTED}"))
    steps: list[Step] = []
    saved = await api.save(spec.name, steps.append)
    assert (saved.state, saved.pid, saved.forwards) == (VMState.SAVED, None, ())
    assert {step.phase for step in steps} >= {"saving", "checking"}
    started = await api.start(spec.name)
    assert started.state is VMState.RUNNING
    assert await guest(api, spec.name, f"{BOOT_ID}; cat /tmp/file; head -c 5 {DISK}") == f"{before}\nkept\nthere"
    await asyncio.sleep(0.5)
    assert int(await guest(api, spec.name, COUNTED)) > counted
    assert (await api.show(spec.name)).saved is None


@saves
async def test_save_and_start_again_and_again(api: HostApi, booted: str) -> None:
    """What was restored once can be saved again; each verb twice is as once."""
    before = await guest(api, booted, BOOT_ID)
    for _ in range(2):
        first = await api.save(booted)
        assert await api.save(booted) == first
        details = await api.show(booted)
        assert details.status == first
        assert details.saved is not None
        assert details.saved.size_bytes > 1 << 20
        assert not details.saved.paused
        started = await api.start(booted)
        assert (await api.start(booted)).pid == started.pid
    assert await guest(api, booted, BOOT_ID) == before


@saves
async def test_a_paused_vm_is_paused_again(api: HostApi, booted: str) -> None:
    before = await guest(api, booted, BOOT_ID)
    await api.pause(booted)
    assert (await api.save(booted)).state is VMState.SAVED
    details = await api.show(booted)
    assert details.saved is not None and details.saved.paused
    assert (await api.start(booted)).state is VMState.PAUSED
    assert (await api.show(booted)).status.reason is None
    assert (await api.resume(booted)).state is VMState.RUNNING
    assert await guest(api, booted, BOOT_ID) == before


@saves
async def test_start_fresh_boots(api: HostApi, booted: str) -> None:
    before = await guest(api, booted, BOOT_ID)
    await api.save(booted)
    assert (await api.start(booted, fresh=True)).state is VMState.RUNNING
    assert await guest(api, booted, BOOT_ID) != before
    await api.kill(booted)
    assert (await api.show(booted)).status.state is VMState.STOPPED


@saves
async def test_run_of_a_saved_vm_resumes_it(api: HostApi, booted: str, spec: VMSpec) -> None:
    before = await guest(api, booted, BOOT_ID)
    await api.save(booted)
    assert (await api.run(spec)).state is VMState.RUNNING
    assert await guest(api, booted, BOOT_ID) == before


@saves
async def test_a_saved_vm_is_not_alive(api: HostApi, spec: VMSpec) -> None:
    """Whatever ends a VM leaves it; whatever needs one that is alive says what it is."""
    name = spec.name
    await api.run(spec)
    await api.save(name)
    assert [(status.name, status.state) for status in await api.vms()] == [(name, VMState.SAVED)]
    assert (await api.status()).vms_by_state == {"saved": 1}
    assert (await api.stop(name)).state is VMState.SAVED
    assert (await api.kill(name)).state is VMState.SAVED
    for verb in (api.pause, api.resume, api.reboot, api.console, api.ssh_target):
        with pytest.raises(WrongState, match="saved"):
            await verb(name)
    await api.remove(name)
    with pytest.raises(NotFound):
        await api.show(name)


@saves
async def test_only_a_live_vm_can_be_saved(api: HostApi, spec: VMSpec) -> None:
    with pytest.raises(NotFound):
        await api.save(spec.name)
    await api.create(spec)
    with pytest.raises(WrongState, match="stopped") as raised:
        await api.save(spec.name)
    assert raised.value.hint is not None and "start" in raised.value.hint


@saves
async def test_forwards_are_those_of_the_start(api: HostApi, booted: str) -> None:
    """Ports are the host's affair: those added while the VM was saved are open afterwards, SSH keeps its own."""
    before = (await api.show(booted)).status.forwards
    await api.save(booted)
    await api.add_forward(booted, Forward(host_port=0, guest_port=7000))
    after = (await api.start(booted)).forwards
    assert set(before) < set(after)
    assert 7000 in [forward.guest_port for forward in after]
    await api.wait_for_ssh(booted, timeout_s=BOOT_S)


@saves
async def test_a_vm_that_went_on_is_not_saved_any_more(api: HostApi, booted: str) -> None:
    await api.save(booted)
    await api.start(booted)
    await api.kill(booted)
    assert (await api.show(booted)).status.state is VMState.STOPPED
