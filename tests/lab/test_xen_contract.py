"""The contract of HostApi on the lab's Xen host, in each of Xen's modes: the same tests as everywhere, by the same names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyvisor.spec.vm import VMSpec
from tests.contract import conftest as contract
from tests.contract.test_inside import *  # noqa: F403
from tests.contract.test_life import *  # noqa: F403
from tests.contract.test_save import *  # noqa: F403
from tests.contract.test_snapshot import *  # noqa: F403
from tests.lab.conftest import MODES

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def host_name() -> str:
    return "lab-xen1"


@pytest.fixture(params=MODES)
def spec(request: pytest.FixtureRequest) -> VMSpec:
    return replace(contract.named(), mode=request.param)
