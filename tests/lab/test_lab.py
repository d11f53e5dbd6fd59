"""The lab: real KVM and real Xen beside each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from polyvisor.home import Home
from polyvisor.host.api import HostApi
from polyvisor.lab.lab import Lab
from polyvisor.lab.plan import LabHost, lab_hosts
from polyvisor.remote.host import RemoteHost
from polyvisor.spec.vm import VMSpec
from polyvisor.ssh import execute
from polyvisor.status import VMState
from tests.contract.guest import guest

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def hosts() -> list[LabHost]:
    return lab_hosts(1, 1)


async def test_the_xen_host_says_what_its_xen_can_do(lab: Lab, client: Home) -> None:
    host = RemoteHost(lab.hosts.get("lab-xen1"), client)
    try:
        [xen] = [driver for driver in (await host.status()).capabilities if driver.driver == "xen"]
    finally:
        await host.close()
    assert re.match(r"4\.\d+\.\d+", str(xen.version))
    assert xen.modes == ("pvh", "hvm", "pv")
    assert "virt_caps: pv hvm hap" in xen.accelerators[0].reason


async def test_the_hosts_reach_each_other_by_name(lab: Lab) -> None:
    for here, there in (("lab-kvm1", "lab-xen1"), ("lab-xen1", "lab-kvm1")):
        pinged = await execute(lab.host, here, ["ping", "-c", "2", "-W", "5", there], timeout_s=60)
        assert pinged.status == 0, pinged.stdout + pinged.stderr


async def test_the_command_line_uses_them_as_hosts(lab: Lab) -> None:
    said = _polyvisor(lab, "--host", "lab-xen1", "host")
    assert re.search(r"^driver xen +4\.", said, re.MULTILINE)
    assert "virt_caps: pv hvm" in said
    assert "lab-kvm1" in _polyvisor(lab, "lab", "status")
    assert _polyvisor(lab, "lab", "ssh", "xen1", "--", "xl", "list").splitlines()[1].startswith("Domain-0")


async def test_saved_hosts_are_there_again_as_they_were(lab: Lab, api: HostApi, spec: VMSpec) -> None:
    """Also the guest that runs on one of them, and had much to do."""
    await api.run(spec)
    await guest(api, spec.name, "echo kept > /tmp/note; (while true; do :; done) >/dev/null 2>&1 &")
    before = await guest(api, spec.name, "cat /proc/sys/kernel/random/boot_id")
    await api.close()
    assert {status.state for status in await lab.down()} == {VMState.SAVED}
    assert {status.state for status in await lab.up(lab_hosts(1, 1))} == {VMState.RUNNING}
    assert await guest(api, spec.name, "cat /tmp/note /proc/sys/kernel/random/boot_id") == f"kept\n{before}"
    await api.remove(spec.name, force=True)


def _polyvisor(lab: Lab, *words: str) -> str:
    environment = {**os.environ, "POLYVISOR_HOME": str(lab.host.home.path)}
    argv = [sys.executable, "-m", "polyvisor.cli.main", *words]
    return subprocess.run(argv, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout
