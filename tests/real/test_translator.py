"""QEMU's emulator ends itself where a vCPU comes while its buffer of translated code is full, so none comes then."""

from __future__ import annotations

import pytest

from polyvisor.drivers.qemu import argv, resize
from polyvisor.drivers.qemu.argv import QMP_SOCKET
from polyvisor.drivers.qemu.qmp import connected
from polyvisor.drivers.qemu.resize import free_regions, set_vcpus, usage
from polyvisor.errors import WrongState
from polyvisor.host.host import Host
from polyvisor.spec.vm import VMSpec
from polyvisor.status import VMState
from tests.contract.guest import BOOT_S

pytestmark = pytest.mark.qemu


async def test_a_vcpu_comes_when_there_is_room_for_its_code(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argv, "GROWING_BUFFER_MIB", argv.TCG_BUFFER_MIB)  # a boot fills it several times
    await host.run(VMSpec(name="vm", image="tiny", vcpus_max=2))
    async with connected(host.store.get("vm").path / QMP_SOCKET, timeout_s=5) as monitor:
        while free_regions(await monitor.human("info jit"), 1, 2):
            pass
        with monkeypatch.context() as impatient, pytest.raises(WrongState, match="no room for the code of another"):
            impatient.setattr(resize, "TRANSLATOR_S", 0.0)
            await set_vcpus(monitor, 2, emulated=True)
        await set_vcpus(monitor, 2, emulated=True)
        assert (await usage(monitor)).vcpus == 2
    await host.wait_for_ssh("vm", timeout_s=BOOT_S)
    assert (await host.show("vm")).status.state is VMState.RUNNING
    await host.remove("vm", force=True)
