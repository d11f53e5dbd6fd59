"""Saving on the lab's Xen host, beside the contract: guests count on, whatever becomes of a save or of what was saved."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator

import pytest

from polyvisor.errors import CannotStart, PolyvisorError, StorageFull
from polyvisor.host.api import HostApi
from polyvisor.lab.lab import Lab
from polyvisor.spec.vm import Disk, Mode, Nic, VMSpec
from polyvisor.status import VMState
from tests.lab.xen_guest import BOOT_S, home_of, on_host, says, until
from tests.thorough import THOROUGH

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]
MODES = (Mode.PV, Mode.PVH, *((Mode.HVM,) if THOROUGH else ()))
COUNT = "(n=0; while sleep 0.2; do n=$((n+1)); echo $n >/tmp/n.new; mv /tmp/n.new /tmp/n; done) &\n"


@pytest.fixture(scope="module")
def host_name() -> str:
    return "lab-xen1"


class Counting:
    """A VM whose guest counts in its memory."""

    def __init__(self, api: HostApi, name: str) -> None:
        self.api, self.name, self.last = api, name, 0

    async def ask(self, command: str, pattern: str) -> str:
        """What the guest's shell answers, as far as `pattern` goes; it must not match the echo of the command."""
        reader, writer = await self.api.console(self.name)
        try:
            writer.write(f"{command}\n".encode())
            await writer.drain()
            heard = ""
            async with asyncio.timeout(BOOT_S):
                while not (found := re.search(pattern, heard)):
                    data = await reader.read(4096)
                    assert data, f"its console ended: {heard!r}"
                    heard += data.decode(errors="replace")
            return found[found.lastindex or 0]
        finally:
            writer.close()

    async def counts_on(self) -> None:
        """It is the same boot, with the same memory: its counter is not below what it was, and grows."""
        before = self.last
        for _ in range(2):
            count = int(await self.ask("echo at$(cat /tmp/n)", r"at(\d+)\s"))
            assert count > self.last, f"{count} after {self.last}"
            self.last = count
        assert before < self.last

    async def is_waited_for(self) -> None:
        """It runs, nothing is wrong, and it reboots: an xl waits for it."""
        status = (await self.api.show(self.name)).status
        assert (status.state, status.reason) == (VMState.RUNNING, None)
        await self.api.reboot(self.name, timeout_s=BOOT_S)
        assert (await self.api.show(self.name)).status.reason is None


@pytest.fixture
async def counting(request: pytest.FixtureRequest, api: HostApi) -> AsyncIterator[Counting]:
    """A guest that has begun to count; in the mode and with the disks of the test's parameter."""
    mode, disks = request.param
    name = f"save-{uuid.uuid4().hex[:6]}"
    spec = VMSpec(name=name, image="tiny", mode=mode, nics=(Nic(network="none"),), disks=disks)
    await api.run(spec)
    await says(api, name, "login:")
    vm = Counting(api, name)
    await asyncio.sleep(2)  # getty drops what was typed before it listens
    await vm.ask("\nroot", r"#")
    await vm.ask(COUNT, r"#")
    yield vm
    if name in await api.names():
        await api.remove(name, force=True)


def of(mode: Mode, *disks: Disk) -> object:
    return pytest.param((mode, disks), id=mode.value)


@pytest.mark.parametrize("counting", [of(mode, Disk(size_gib=1)) for mode in MODES], indirect=True)
async def test_a_guest_counts_on(counting: Counting, api: HostApi) -> None:
    """With a disk that its QEMU had something to write of; twice; and it is waited for as before."""
    await counting.ask("echo there | dd of=/dev/xvda bs=512 conv=sync oflag=direct seek=99999; echo wr''ote", "wrote")
    for _ in range(2):
        await counting.counts_on()
        assert (await api.save(counting.name)).state is VMState.SAVED
        assert (await api.start(counting.name)).state is VMState.RUNNING
        await counting.counts_on()
    assert await counting.ask("dd if=/dev/xvda bs=512 skip=99999 count=1 | head -c 5", "there")
    await counting.is_waited_for()


@pytest.fixture
async def small(lab: Lab, api: HostApi) -> AsyncIterator[str]:
    """The directory of VMs of `api`, where 40 MiB have room: less than a guest's memory."""
    place = f"{home_of(api)}/vms"
    await on_host(lab, f"mkdir -p -m 711 {place}; mount -t tmpfs -o mode=711,size=40m none {place}")
    yield place
    for status in await api.vms():
        await api.remove(status.name, force=True)
    await on_host(lab, f"umount {place}")


@pytest.mark.parametrize("counting", [of(mode) for mode in MODES], indirect=True)
async def test_the_guest_counts_on_whatever_fails(small: str, counting: Counting, lab: Lab, api: HostApi) -> None:
    """The disk is full; xl is killed in the middle of a save; the command is; what was saved is damaged."""
    saved = f"{small}/{counting.name}/saved"
    await counting.counts_on()
    with pytest.raises(StorageFull, match="disk is full"):
        await api.save(counting.name)
    await counting.counts_on()
    await on_host(lab, f"mount -o remount,size=500m {small}")

    begun = f"while ! [ -s {saved}/memory.new ]; do sleep 0.02; done"
    killing = asyncio.ensure_future(on_host(lab, f"{begun}; pkill -9 -f '[x]l save'"))
    with pytest.raises(PolyvisorError, match="was not saved"):
        await api.save(counting.name)
    await killing
    await counting.counts_on()

    app = f"POLYVISOR_HOME={home_of(api)} python3 $(ls -t /root/.cache/polyvisor/*.pyz | head -n 1)"
    await on_host(lab, f"{app} save {counting.name} >/dev/null 2>&1 & p=$!; {begun}; kill -9 $p; wait")
    await until(api, counting.name, VMState.RUNNING)
    await counting.counts_on()

    assert (await api.save(counting.name)).state is VMState.SAVED
    await on_host(lab, f"cp {saved}/memory {saved}/kept")
    for damage, words in (
        ("truncate -s -4096 memory", "bytes instead of"),
        ("cp kept memory; printf x | dd of=memory bs=1 seek=40000000 conv=notrunc", "checksum"),
    ):
        await on_host(lab, f"cd {saved}; {damage}")
        with pytest.raises(CannotStart, match=words):
            await api.start(counting.name)
        assert (await api.show(counting.name)).status.state is VMState.SAVED
    await on_host(lab, f"cd {saved}; mv kept memory")
    assert (await api.start(counting.name)).state is VMState.RUNNING
    await counting.counts_on()
    await counting.is_waited_for()
