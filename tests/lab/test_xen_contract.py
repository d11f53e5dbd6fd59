"""The contract of HostApi on the lab's Xen host, in each of Xen's modes: the same tests as everywhere, by the same names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyvisor.spec.vm import Mode, VMSpec
from tests.contract import conftest as contract
from tests.contract.test_inside import *  # noqa: F403
from tests.contract.test_life import *  # noqa: F403
from tests.contract.test_save import *  # noqa: F403

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def host_name() -> str:
    return "lab-xen1"


@pytest.fixture(params=[Mode.PV, Mode.PVH, Mode.HVM])
def spec(request: pytest.FixtureRequest) -> VMSpec:
    return replace(contract.named(), mode=request.param)
