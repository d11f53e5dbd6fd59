"""What the lab consists of."""

import json

import pytest

from polyvisor.errors import InvalidInput
from polyvisor.lab.plan import (
    LABEL,
    MAX_HOSTS,
    Kind,
    LabHost,
    default_vcpus,
    image_name,
    lab_hosts,
    lab_spec,
    user_data,
)

EVERY = [LabHost(kind=kind, number=number) for kind in Kind for number in range(1, MAX_HOSTS + 1)]


def test_one_host_of_each_kind() -> None:
    assert [host.name for host in lab_hosts(1, 1)] == ["lab-kvm1", "lab-xen1"]
    assert [host.name for host in lab_hosts(0, 2)] == ["lab-xen1", "lab-xen2"]


@pytest.mark.parametrize(("kvm", "xen", "field"), [(-1, 1, "kvm"), (1, MAX_HOSTS + 1, "xen"), (0, 0, "kvm")])
def test_a_lab_has_some_hosts_but_not_many(kvm: int, xen: int, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        lab_hosts(kvm, xen)
    assert caught.value.field == field


def test_no_two_hosts_share_a_name_or_an_address() -> None:
    for what in ("name", "address", "mac"):
        assert len({getattr(host, what) for host in EVERY}) == len(EVERY), what


@pytest.mark.parametrize("host", EVERY, ids=lambda host: str(host.name))
def test_a_host_is_a_vm_that_runs_vms(host: LabHost) -> None:
    spec = lab_spec(host, None, 2, None)
    assert (spec.name, spec.image, spec.cpu, spec.labels) == (
        host.name,
        f"lab-{host.kind}",
        "nested",
        {LABEL: host.kind},
    )
    assert [nic.network for nic in spec.nics] == ["user", "private:lab"]
    assert spec.nics[1].mac == host.mac


@pytest.mark.parametrize(
    ("kind", "accelerator", "qemu", "vcpus"),
    [
        (Kind.KVM, "tcg", (7, 2, 22), 1),
        (Kind.KVM, "tcg", (8, 0, 5), 1),
        (Kind.KVM, "tcg", (8, 1, 0), 2),
        (Kind.KVM, "tcg", (10, 0), 2),
        (Kind.KVM, "kvm", (7, 2, 22), 2),
        (Kind.XEN, "tcg", (7, 2, 22), 2),
    ],
)
def test_a_host_has_no_more_vcpus_than_are_safe(
    kind: Kind, accelerator: str, qemu: tuple[int, ...], vcpus: int
) -> None:
    assert default_vcpus(kind, accelerator, qemu) == vcpus


def test_settings_are_the_users() -> None:
    spec = lab_spec(EVERY[0], "trixie", 4, 8192)
    assert (spec.image, spec.vcpus, spec.memory_mib) == ("lab-kvm-13", 4, 8192)
    with pytest.raises(InvalidInput, match=r"suite: 'sarge': is not known"):
        image_name(Kind.KVM, "sarge")


def test_a_host_learns_its_address_and_every_name() -> None:
    host = EVERY[1]
    header, _, config = user_data(host).partition("\n")
    files = {file["path"]: file["content"] for file in json.loads(config)["write_files"]}
    assert header == "#cloud-config"
    assert (
        f"MACAddress={host.mac}\n\n[Network]\nAddress={host.address}/16" in files["/etc/systemd/network/20-lab.network"]
    )
    assert {f"{other.address} {other.name}" for other in EVERY} == set(files["/etc/hosts"].splitlines())
