"""VMs on a private network reach each other, and nobody else."""

from __future__ import annotations

import dataclasses

import pytest

from polyvisor.host.host import Host
from polyvisor.spec.vm import Nic, VMSpec
from tests.contract.guest import guest

pytestmark = pytest.mark.qemu

ADDRESSES = {"a": "10.9.0.1", "b": "10.9.0.2", "c": "10.9.0.3"}


async def test_vms_of_one_private_network_reach_each_other(host: Host) -> None:
    here = VMSpec(name="a", image="tiny", nics=(Nic(), Nic(network="private:one")))
    await host.run(here)
    await host.run(dataclasses.replace(here, name="b"))
    await host.run(dataclasses.replace(here, name="c", nics=(Nic(), Nic(network="private:two"))))
    for name, address in ADDRESSES.items():
        await guest(host, name, f"ip address add {address}/24 dev eth1; ip link set eth1 up")
    assert await _answers(host, "a", ADDRESSES["b"])
    assert await _answers(host, "b", ADDRESSES["a"])
    assert not await _answers(host, "a", ADDRESSES["c"]), "a VM of another network answers"


async def _answers(host: Host, name: str, address: str) -> bool:
    return await guest(host, name, f"ping -c 3 -W 2 {address} >/dev/null && echo yes || echo no") == "yes"
