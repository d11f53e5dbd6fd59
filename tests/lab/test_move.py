"""A VM made on KVM goes to Xen, boots there in its modes with all that it had, and comes back."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import pytest

from polyvisor.home import Home
from polyvisor.host.api import HostApi
from polyvisor.lab.lab import Lab
from polyvisor.lab.plan import LabHost, lab_hosts
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.move import Place, Wish, move_vm
from polyvisor.remote.transfer import copy_image
from polyvisor.spec.vm import Disk, Mode, VMSpec
from tests.contract.guest import DISK, guest
from tests.thorough import usually

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(5400)]
BOOT_S = 900.0
STOP_S = 300.0
IMAGES = usually(["tiny", "debian-12"], ["tiny"])


@pytest.fixture(scope="module")
def hosts() -> list[LabHost]:
    return lab_hosts(1, 1)


@pytest.fixture
async def kvm(lab: Lab, client: Home) -> AsyncIterator[Place]:
    remote = RemoteHost(lab.hosts.get("lab-kvm1"), client)
    yield Place("lab-kvm1", remote)
    await remote.close()


@pytest.fixture
async def xen(lab: Lab, client: Home) -> AsyncIterator[Place]:
    remote = RemoteHost(lab.hosts.get("lab-xen1"), client)
    yield Place("lab-xen1", remote)
    await remote.close()


@pytest.fixture
async def spec(request: pytest.FixtureRequest, lab: Lab, kvm: Place, xen: Place) -> AsyncIterator[VMSpec]:
    """A VM of an image that the KVM host has; removed wherever it is afterwards."""
    name = f"move-{uuid.uuid4().hex[:6]}"
    if request.param != "tiny":
        await lab.host.image_pull(request.param)
        await copy_image(lab.host, request.param, kvm.host)
    yield VMSpec(name=name, image=request.param, disks=(Disk(size_gib=1),) if request.param == "tiny" else ())
    for place in (kvm, xen):
        if name in await place.host.names():
            await place.host.remove(name, force=True)


async def booted(api: HostApi, name: str) -> tuple[str, str | None]:
    """Start the VM, wait for it, and say what it runs on, in which mode."""
    status = await api.start(name)
    await api.wait_for_ssh(name, timeout_s=BOOT_S)
    return str(status.hypervisor), status.mode


async def write(api: HostApi, spec: VMSpec, words: str) -> None:
    if spec.image == "tiny":  # its disk is blank
        await guest(api, spec.name, f"echo '{words}' | dd of={DISK} conv=fsync seek=9000; sync")
    else:
        await guest(api, spec.name, f"echo '{words}' | sudo tee /srv/words; sync")


async def read(api: HostApi, spec: VMSpec) -> str:
    if spec.image == "tiny":
        return await guest(api, spec.name, f"dd if={DISK} skip=9000 count=1 2>/dev/null | head -n 1")
    return await guest(api, spec.name, "cat /srv/words")


@pytest.mark.parametrize("spec", IMAGES, indirect=True)
async def test_from_kvm_to_xen_and_back(kvm: Place, xen: Place, spec: VMSpec) -> None:
    await kvm.host.create(spec)
    made = await kvm.host.show(spec.name)
    assert (await booted(kvm.host, spec.name))[0] in ("kvm", "tcg")
    await write(kvm.host, spec, "written under KVM")
    await kvm.host.stop(spec.name, timeout_s=STOP_S)

    for mode in (Mode.PVH, Mode.PV):
        await move_vm(kvm, spec.name, xen, Wish(mode=mode))
        assert spec.name not in await kvm.host.names()
        assert await booted(xen.host, spec.name) == ("xen", mode.value)
        assert await read(xen.host, spec) == "written under KVM"
        there = await xen.host.show(spec.name)
        assert (there.status.id, there.mac_addresses) == (made.status.id, made.mac_addresses)
        await write(xen.host, spec, f"written on Xen, {mode.value}")
        await xen.host.stop(spec.name, timeout_s=STOP_S)

        await move_vm(xen, spec.name, kvm, Wish(mode=Mode.AUTO))
        assert spec.name not in await xen.host.names()
        assert (await booted(kvm.host, spec.name))[0] in ("kvm", "tcg")
        assert await read(kvm.host, spec) == f"written on Xen, {mode.value}"
        await write(kvm.host, spec, "written under KVM")
        await kvm.host.stop(spec.name, timeout_s=STOP_S)
    assert (await kvm.host.show(spec.name)).spec == spec
