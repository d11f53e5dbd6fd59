"""Resources of VMs that change while they run, on the lab's Xen host: the contract, and what Xen itself says of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from polyvisor.host.api import HostApi
from polyvisor.lab.lab import Lab
from polyvisor.spec.resources import Changes
from polyvisor.spec.vm import Mode, Nic, VMSpec
from polyvisor.ssh import execute
from tests.contract import conftest as contract
from tests.contract.guest import guest
from tests.contract.test_resize import *  # noqa: F403
from tests.lab.conftest import MODES

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]
BOOT_S = 300.0


@pytest.fixture(scope="module")
def host_name() -> str:
    return "lab-xen1"


@pytest.fixture(params=MODES)
def spec(request: pytest.FixtureRequest) -> VMSpec:
    return replace(contract.named(), mode=request.param)


@pytest.mark.parametrize("mode", [Mode.PV, Mode.PVH])
async def test_what_was_set_is_what_xen_says_and_outlives_a_reboot(lab: Lab, api: HostApi, mode: Mode) -> None:
    """A guest that reboots becomes another domain, with the same resources."""
    made = replace(contract.named(), mode=mode, nics=(Nic(),), vcpus_max=2, memory_mib=192, memory_max_mib=320)
    await api.run(made)
    try:
        await api.wait_for_ssh(made.name, timeout_s=BOOT_S)
        await api.set(made.name, Changes(vcpus=2, memory_mib=256, cpu_weight=200, cpu_limit=150, cpu_affinity="0"))
        await _as_xen_says(lab, made.name)
        await api.reboot(made.name, timeout_s=BOOT_S)
        await api.wait_for_ssh(made.name, timeout_s=BOOT_S)
        await _as_xen_says(lab, made.name)
        assert await guest(api, made.name, "nproc") == "2"
        assert (await api.show(made.name)).pending == ()
    finally:
        await api.remove(made.name, force=True)


async def _as_xen_says(lab: Lab, name: str) -> None:
    listed: list[str] = []
    for _ in range(60):
        listed = (await _on_host(lab, f"xl list {name}")).splitlines()[1].split()
        if listed[2:4] == ["256", "2"]:
            break
        await asyncio.sleep(1)
    assert listed[2:4] == ["256", "2"], listed
    scheduled = (await _on_host(lab, f"xl sched-credit2 -d {name}")).splitlines()[-1].split()
    assert scheduled[-2:] == ["512", "150"], scheduled
    pinned = (await _on_host(lab, f"xl vcpu-list {name}")).splitlines()[1:]
    assert len(pinned) == 2
    assert all(line.split()[-3:] == ["0", "/", "all"] for line in pinned), pinned


async def _on_host(lab: Lab, script: str) -> str:
    return (await execute(lab.host, "lab-xen1", ["sh", "-c", script], timeout_s=120)).stdout
