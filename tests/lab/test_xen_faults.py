"""What goes wrong on the lab's Xen host itself: clear errors, and nothing lost or left.

NOT TESTED: xenstored killed. What it knows of the domains is in its memory alone, so the host, which other tests use, would
have to boot again. Here it stands still instead, which makes every call of xl hang.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from polyvisor.errors import CannotStart, StorageFull
from polyvisor.host.api import HostApi
from polyvisor.lab.lab import Lab
from polyvisor.spec.vm import Disk, Mode, Nic, VMSpec
from polyvisor.status import VMState
from tests.lab.xen_guest import home_of, on_host, until

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def host_name() -> str:
    return "lab-xen1"


@pytest.fixture
def spec() -> VMSpec:
    return VMSpec(name=f"fault-{uuid.uuid4().hex[:6]}", image="tiny", mode=Mode.PV, nics=(Nic(network="none"),))


async def nothing_is_left(lab: Lab, api: HostApi, name: str) -> None:
    assert name not in await api.names()
    assert name not in await on_host(lab, "xl list; ls /var/lib/xen /var/run/xen")


async def test_xen_has_no_memory_for_it(lab: Lab, api: HostApi, spec: VMSpec) -> None:
    """The machine has as much, and dom0 has half of it: Xen alone can say so, when it is asked."""
    with pytest.raises(CannotStart, match="memory"):
        await api.run(replace(spec, memory_mib=3000))
    await nothing_is_left(lab, api, spec.name)
    assert (await api.run(spec)).state is VMState.RUNNING


@pytest.fixture
async def full(lab: Lab, api: HostApi) -> AsyncIterator[None]:
    """1 MiB has room where the VMs of `api` are."""
    place = f"{home_of(api)}/vms"
    await on_host(lab, f"mkdir -p -m 711 {place}; mount -t tmpfs -o mode=711,size=1m none {place}")
    yield
    await on_host(lab, f"umount {place}")


async def test_the_disk_is_full(full: None, lab: Lab, api: HostApi, spec: VMSpec) -> None:
    with pytest.raises(StorageFull, match="disk is full"):
        await api.run(spec)
    await nothing_is_left(lab, api, spec.name)
    assert await on_host(lab, f"ls -A {home_of(api)}/vms") == ""


async def test_a_disk_that_qemu_can_not_open(lab: Lab, api: HostApi, spec: VMSpec) -> None:
    """Debian's QEMU for Xen knows no zstd, and xl starts the guest all the same."""
    await api.create(replace(spec, disks=(Disk(size_gib=1),)))
    disk = f"{home_of(api)}/vms/{spec.name}/disks/disk0.qcow2"
    await on_host(lab, f"mv {disk} {disk}.good; qemu-img create -q -f qcow2 -o compression_type=zstd {disk} 1G")
    with pytest.raises(CannotStart, match="does not serve the disk xvda"):
        await api.start(spec.name)
    assert (await api.show(spec.name)).status.state is VMState.STOPPED
    assert spec.name not in await on_host(lab, "xl list")
    await on_host(lab, f"mv {disk}.good {disk}")
    assert (await api.start(spec.name)).state is VMState.RUNNING


async def test_xenstore_stands_still(lab: Lab, api: HostApi, spec: VMSpec) -> None:
    """No call of xl comes back: the VM is shown as not responding, and is as before once it does."""
    pid = (await api.run(spec)).pid
    await on_host(lab, "pkill -STOP -x oxenstored")
    try:
        status = (await api.show(spec.name)).status
        assert status.state is VMState.UNRESPONSIVE
        assert "did not end within" in (status.reason or "")
    finally:
        await on_host(lab, "pkill -CONT -x oxenstored")
    await until(api, spec.name, VMState.RUNNING)
    status = (await api.show(spec.name)).status
    assert (status.pid, status.reason) == (pid, None)
    await api.pause(spec.name)
    await api.resume(spec.name)
    assert (await api.kill(spec.name)).state is VMState.STOPPED
