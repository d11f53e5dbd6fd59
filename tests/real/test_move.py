"""A guest that is moved between two homes, by SSH, and boots there with all that it had."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from polyvisor.errors import PolyvisorError, WrongState
from polyvisor.home import Home
from polyvisor.host.api import HostApi
from polyvisor.host.host import Host
from polyvisor.operation import Step
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.move import Place, Wish, move_vm
from polyvisor.spec.vm import Disk, VMSpec
from polyvisor.status import VMState
from tests.conftest import temporary_home
from tests.contract.guest import BOOT_S, guest
from tests.sshd import Server

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(600)]

SPEC = VMSpec(name="web", image="tiny", disks=(Disk(size_gib=1), Disk(size_gib=2)), labels={"of": "test"})
WORDS = "all that it had"


@pytest.fixture
def there() -> Iterator[Host]:
    """Another host on this machine, with an image store of its own, and nothing in it."""
    with temporary_home() as home:
        yield Host(home)


@pytest.fixture
async def remote(there: Host, sshd: Server, tmp_path: Path) -> AsyncIterator[RemoteHost]:
    remote = RemoteHost(sshd.entry(there.home.path), Home(tmp_path / "client"))
    yield remote
    await remote.close()


async def write(api: HostApi, device: str, words: str) -> None:
    await guest(api, "web", f"echo '{words}' | dd of=/dev/{device} conv=fsync seek=9000; sync")


async def read(api: HostApi, name: str, device: str) -> str:
    return await guest(api, name, f"dd if=/dev/{device} skip=9000 count=1 2>/dev/null | head -n 1")


async def test_there_and_back(host: Host, remote: RemoteHost, there: Host) -> None:
    here, far = Place("local", host), Place("loopback", remote)
    await host.run(SPEC)
    await host.wait_for_ssh("web", timeout_s=BOOT_S)
    for device in ("vda", "vdb"):
        await write(host, device, f"{WORDS} on {device}")
    key = (host.home.vms / "web/ssh/host_key").read_text()
    before = await host.show("web")
    with pytest.raises(WrongState, match="running: only a stopped VM"):
        await move_vm(here, "web", far, Wish())
    await host.stop("web", timeout_s=60)
    steps: list[Step] = []

    status, _ = await move_vm(here, "web", far, Wish(name="web-2"), steps.append)

    assert (status.name, status.state, status.labels) == ("web-2", VMState.STOPPED, {"of": "test"})
    assert await host.names() == []
    assert {"moving", "uploading"} <= {step.phase for step in steps}, "the image, then the VM"
    last = [step for step in steps if step.phase == "moving"][-1]
    assert last.done == last.total
    assert last.total is not None
    assert last.total < 64 << 20, "no holes"
    after = await remote.show("web-2")
    assert (after.status.id, after.mac_addresses) == (before.status.id, before.mac_addresses)
    await remote.start("web-2")
    await remote.wait_for_ssh("web-2", timeout_s=BOOT_S)
    for device in ("vda", "vdb"):
        assert await read(remote, "web-2", device) == f"{WORDS} on {device}"
    assert (there.home.vms / "web-2/ssh/host_key").read_text() == key, "with which the guest has just been known"
    assert await guest(remote, "web-2", "hostname") == "web-2"
    await remote.stop("web-2", timeout_s=60)

    status, _ = await move_vm(far, "web-2", here, Wish(name="web"))

    assert (status.name, status.id) == ("web", before.status.id)
    assert await remote.names() == []
    await host.start("web")
    await host.wait_for_ssh("web", timeout_s=BOOT_S)
    assert await read(host, "web", "vdb") == f"{WORDS} on vdb"
    assert (await host.show("web")).spec == SPEC


async def test_what_is_saved_stays(host: Host, remote: RemoteHost) -> None:
    await host.run(SPEC)
    await host.save("web")
    with pytest.raises(WrongState, match="saved") as caught:
        await move_vm(Place("local", host), "web", Place("loopback", remote), Wish())
    assert "start --fresh" in str(caught.value.hint)
    assert await remote.names() == []
    await host.start("web")


async def test_what_has_not_arrived_starts_nowhere(host: Host, remote: RemoteHost, there: Host) -> None:
    """In the middle of a move neither host starts it; with it at its end, the target does."""
    await host.create(SPEC)

    class Interrupted(Host):
        async def move_finish(self, name: str, token: str) -> None:
            raise PolyvisorError("interrupted")

    with pytest.raises(PolyvisorError, match="interrupted"):
        await move_vm(Place("local", Interrupted(host.home)), "web", Place("loopback", remote), Wish())
    with pytest.raises(WrongState, match="moving to loopback"):
        await host.start("web")
    with pytest.raises(WrongState, match="arriving from local"):
        await remote.start("web")
    assert [status.reason for status in await remote.vms()] == ["arriving from local"]
    await move_vm(Place("local", host), "web", Place("loopback", remote), Wish())
    assert (await remote.start("web")).running
