"""What VMs on the lab's Xen host do beside the contract: ends that nobody asked for, and what does not work there."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.errors import InvalidInput, Unsupported, WrongState
from polyvisor.home import Home
from polyvisor.host.api import HostApi
from polyvisor.host.host import Host
from polyvisor.images.image import Image
from polyvisor.images.store import ImageStore
from polyvisor.lab.lab import Lab
from polyvisor.network.nat import NAT_CARDS, PRIVATE_CARDS
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.transfer import copy_image
from polyvisor.spec.vm import Hypervisor, Mode, Nic, VMSpec
from polyvisor.status import VMState
from tests.contract.guest import guest
from tests.lab.grub_disk import CONFIG, build_grub_disk
from tests.lab.xen_guest import BOOT_S, on_host, says, typed, until
from tests.thorough import exhaustive

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]
LOADED_S = 900.0  # for GRUB to read kernel and initrd, too: minutes on an emulated Xen
_names = itertools.count()


@pytest.fixture(scope="module")
def host_name() -> str:
    return "lab-xen1"


@pytest.fixture
async def xen(lab: Lab, client: Home) -> AsyncIterator[HostApi]:
    remote = RemoteHost(lab.hosts.get("lab-xen1"), client)
    yield remote
    await remote.close()


@pytest.fixture(params=[Mode.PV, Mode.PVH])
async def xen_spec(request: pytest.FixtureRequest, xen: HostApi) -> AsyncIterator[VMSpec]:
    """A VM in each mode; removed afterwards where a test leaves it."""
    name = f"xen-{uuid.uuid4().hex[:6]}-{next(_names)}"
    yield VMSpec(name=name, image="tiny", mode=request.param, nics=(Nic(network="none"),))
    if name in await xen.names():
        await xen.remove(name, force=True)


async def test_a_domain_that_somebody_destroys_has_crashed(lab: Lab, xen: HostApi, xen_spec: VMSpec) -> None:
    await xen.run(xen_spec)
    await on_host(lab, f"xl destroy {xen_spec.name}")
    assert "somebody else" in await until(xen, xen_spec.name, VMState.CRASHED)
    assert (await xen.start(xen_spec.name)).state is VMState.RUNNING


async def test_a_kernel_that_panics_has_crashed(xen: HostApi, xen_spec: VMSpec) -> None:
    await xen.run(replace(xen_spec, cmdline="panic=0"))
    await says(xen, xen_spec.name, "login:")
    assert await typed(xen, xen_spec.name, "root\n", "#")
    await typed(xen, xen_spec.name, "echo c >/proc/sysrq-trigger\n", "")
    assert "kernel has crashed" in await until(xen, xen_spec.name, VMState.CRASHED)


@pytest.mark.parametrize("victims", ["xl", "all"])
async def test_a_domain_is_found_without_its_processes(lab: Lab, xen: HostApi, xen_spec: VMSpec, victims: str) -> None:
    """It is shown as running, is not started twice, and can be ended; memory is free afterwards."""
    status = await xen.run(xen_spec)
    also = "; pkill -9 -x xenconsole" if victims == "all" else ""
    await on_host(lab, f"kill -9 {status.pid}{also}; sleep 1")
    shown = (await xen.show(xen_spec.name)).status
    assert shown.state is VMState.RUNNING
    assert shown.reason is not None and "xl was killed" in shown.reason
    assert xen_spec.name in [vm.name for vm in await xen.vms() if vm.state is VMState.RUNNING]
    with pytest.raises(WrongState):
        await xen.remove(xen_spec.name)
    assert (await xen.start(xen_spec.name)).state is VMState.RUNNING
    assert (await xen.kill(xen_spec.name)).state is VMState.STOPPED
    assert xen_spec.name not in await on_host(lab, "xl list")


async def test_what_does_not_work_says_why_and_leaves_nothing(lab: Lab, xen: HostApi) -> None:
    spec = VMSpec(name="refused", image="tiny", nics=(Nic(network="none"),))
    for wrong, error in (
        (replace(spec, cpu="nested", hypervisor=Hypervisor.XEN), Unsupported),
        (replace(spec, memory_mib=1 << 20), InvalidInput),
    ):
        with pytest.raises(error):
            await xen.run(wrong)
    assert "refused" not in await xen.names()
    assert "refused" not in await on_host(lab, "xl list")


async def test_guests_of_one_private_network_reach_each_other(lab: Lab, xen: HostApi, xen_spec: VMSpec) -> None:
    """Also where the host's own network manager, as the lab's does, takes every Ethernet device for its own."""
    names = [f"{xen_spec.name}-{i}" for i in (1, 2)]
    nics = (Nic(), Nic(network="private:lan"))
    try:
        for i, name in enumerate(names, 1):
            await xen.run(replace(xen_spec, name=name, nics=nics))
            await xen.wait_for_ssh(name, timeout_s=BOOT_S)
            await guest(xen, name, f"ip address add 10.9.9.{i}/24 dev eth1; ip link set eth1 up")
        assert "1 packets received" in await guest(xen, names[0], "ping -c 1 -W 10 10.9.9.2")
        links = [line.split() for line in (await on_host(lab, "networkctl --no-legend list")).splitlines()]
        cards = {name: setup for _, name, _, _, setup in links if name.startswith((NAT_CARDS, PRIVATE_CARDS))}
        assert len(cards) == 2 * len(names)
        assert set(cards.values()) == {"unmanaged"}
    finally:
        for name in names:
            if name in await xen.names():
                await xen.remove(name, force=True)


async def test_mode_auto_says_why(xen: HostApi) -> None:
    spec = VMSpec(name=f"auto-{uuid.uuid4().hex[:6]}", image="tiny", nics=())
    assert (await xen.run(spec)).mode == "pvh"
    assert (await xen.show(spec.name)).hypervisor_reason == "mode pvh: the image has a kernel"
    await xen.remove(spec.name, force=True)


@pytest.fixture(scope="module")
def disk_image(cache: Path, image_store: ImageStore) -> Image:
    return asyncio.run(build_grub_disk(image_store, cache / "home" / "cache", "grub-disk"))


@exhaustive
@pytest.mark.parametrize("mode", [Mode.PVH, Mode.PV])
async def test_a_disk_boots_by_the_kernel_that_is_on_it_by_now(
    cache: Path, xen: HostApi, disk_image: Image, mode: Mode
) -> None:
    """What the guest changes there takes effect at its next boot, in one domain after another."""
    await copy_image(Host(Home(cache / "home")), disk_image.name, xen)
    spec = VMSpec(name=f"disk-{uuid.uuid4().hex[:6]}", image=disk_image.name, mode=mode, nics=())
    try:
        assert (await xen.run(spec)).mode == mode
        assert (await xen.show(spec.name)).hypervisor_reason == (
            f"mode {mode}: asked for; GRUB boots the kernel on the VM's disk"
        )
        await says(xen, spec.name, "login:", within_s=LOADED_S)
        assert await typed(xen, spec.name, "root\n", "#")
        change = (
            f"mount /dev/xvda1 /mnt && sed -i s/word=first/word=second/ /mnt/{CONFIG} && umount /mnt && echo do''ne\n"
        )
        assert await typed(xen, spec.name, change, "done")
        assert await typed(xen, spec.name, "cat /proc/cmdline; reboot\n", "word=first")
        await says(xen, spec.name, "login:", 2, within_s=LOADED_S)
        assert await typed(xen, spec.name, "root\n", "#")
        assert await typed(xen, spec.name, "cat /proc/cmdline\n", "word=second")
    finally:
        await xen.remove(spec.name, force=True)
