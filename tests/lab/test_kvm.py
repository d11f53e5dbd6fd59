"""The contract of HostApi on the lab's KVM host, and what goes on there alone."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from polyvisor.errors import WrongState
from polyvisor.host.api import HostApi
from polyvisor.lab.lab import Lab
from polyvisor.lab.plan import lab_hosts
from polyvisor.spec.vm import VMSpec
from polyvisor.status import VMState

# The contract's tests take `api`, which is the lab's KVM host here (conftest.py).
from tests.contract.guest import guest
from tests.contract.test_devices import *  # noqa: F403
from tests.contract.test_fork import *  # noqa: F403
from tests.contract.test_images import *  # noqa: F403
from tests.contract.test_inside import *  # noqa: F403
from tests.contract.test_life import *  # noqa: F403
from tests.contract.test_resize import *  # noqa: F403
from tests.contract.test_save import *  # noqa: F403
from tests.contract.test_snapshot import *  # noqa: F403
from tests.contract.test_template import *  # noqa: F403

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(1800)]


async def test_a_guest_on_the_kvm_host_runs_under_kvm(api: HostApi, spec: VMSpec) -> None:
    status = await api.run(spec)
    assert status.hypervisor == "kvm"
    source = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    assert await guest(api, spec.name, f"cat {source}") == "kvm-clock"
    assert "Hypervisor detected: KVM" in await guest(api, spec.name, "dmesg")
    await api.remove(spec.name, force=True)


async def test_a_host_in_the_midst_of_a_guest_is_not_saved_for_good(lab: Lab, api: HostApi, spec: VMSpec) -> None:
    """Emulation could not read it back: the save is refused and all goes on, unless it met a better moment."""
    await api.run(spec)
    await guest(api, spec.name, "(while true; do :; done) >/dev/null 2>&1 &")
    await api.close()
    with contextlib.suppress(WrongState):
        await lab.host.save("lab-kvm1")
    assert (await lab.up(lab_hosts(1, 0)))[0].state is VMState.RUNNING
    assert (await api.show(spec.name)).status.running
    assert await guest(api, spec.name, "hostname") == spec.name
    await api.remove(spec.name, force=True)


async def test_what_was_made_before_a_power_cut_starts_after_it(lab: Lab, api: HostApi, spec: VMSpec) -> None:
    """A host loses what it has not written to its disk yet: the lab's does when its VM is killed."""
    made, later = replace(spec, name=f"{spec.name}-made"), replace(spec, name=f"{spec.name}-later")
    await api.run(spec)
    await api.create(made)
    await api.close()
    await lab.host.kill("lab-kvm1")
    assert (await lab.up(lab_hosts(1, 0)))[0].state is VMState.RUNNING
    crashed = (await api.show(spec.name)).status
    assert (crashed.state, crashed.reason) == (VMState.CRASHED, "the host went down while it ran")
    for start in (api.start(spec.name), api.start(made.name), api.run(later)):
        name = (await start).name
        assert await guest(api, name, "hostname") == name
        await api.remove(name, force=True)
