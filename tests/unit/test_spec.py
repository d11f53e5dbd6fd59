"""What a spec refuses, field by field, and what it lets pass."""

from typing import Any

import pytest

from polyvisor.errors import InvalidInput
from polyvisor.spec.vm import Disk, Hypervisor, Mode, Nic, VMSpec, check_name

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPhgn9Y"


def spec(**values: Any) -> VMSpec:
    return VMSpec(**{"name": "web-1", "image": "tiny", **values})


def test_the_defaults_are_one_processor_and_a_card_on_the_user_network() -> None:
    made = spec()
    assert (made.vcpus, made.memory_mib, made.disks, made.nics) == (1, None, (), (Nic(),))
    assert made.hypervisor is Hypervisor.AUTO
    assert made.mode is Mode.AUTO


@pytest.mark.parametrize("name", ["a", "0", "web-1", "a" * 63, "1a"])
def test_names_of_machines(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", "A", "a_b", "a.b", "../a", "a/b", "..", ".new-a", "a\0", "a\n", "a" * 64, "a" * 300, "é", "a b"],
)
def test_what_names_no_machine(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_name(name)
    assert caught.value.field == "name"
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 120
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vcpus", 0),
        ("vcpus", -1),
        ("vcpus", 256),
        ("memory_mib", 0),
        ("memory_mib", 15),
        ("memory_mib", -512),
        ("memory_mib", (16 << 20) + 1),
        ("memory_mib", 10**30),
        ("image", ""),
        ("image", "a\nb"),
        ("image", "a\0"),
        ("image", "a" * 4097),
        ("cpu", ""),
        ("cpu", "host,+svm"),
        ("cpu", "-x"),
        ("cpu", "a b"),
        ("cpu", "help"),
        ("cmdline", "a\nb"),
        ("cmdline", "a\0b"),
        ("cmdline", "a" * 1025),
        ("user_data", "a" * ((512 << 10) + 1)),
        ("user_data", "é" * (256 << 10) + "a"),
        ("user_data", "\ud800"),
        ("disks", (Disk(),) * 17),
        ("nics", (Nic(),) * 9),
    ],
)
def test_a_value_that_cant_be_meant_is_refused_with_field_value_and_remedy(field: str, value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec(**{field: value})
    assert caught.value.field == field
    assert caught.value.message.startswith(f"{field}: ")
    assert len(caught.value.message) < 200
    assert caught.value.message.isprintable()
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vcpus", 1),
        ("vcpus", 255),
        ("memory_mib", 16),
        ("memory_mib", 16 << 20),
        ("image", "a" * 4096),
        ("cpu", "EPYC-v4"),
        ("cpu", "a" * 64),
        ("cmdline", "a" * 1024),
        ("user_data", "a" * (512 << 10)),
        ("user_data", ""),
        ("disks", (Disk(),) * 16),
        ("nics", (Nic(),) * 8),
        ("nics", ()),
        ("ssh_keys", (KEY, f"{KEY} me@laptop", "ecdsa-sha2-nistp256 AAAA=", "sk-ssh-ed25519@openssh.com AAAA x")),
        ("labels", {"tier": "web", "a.b/c-d": "", "a" * 63: "é"}),
    ],
)
def test_a_value_at_the_edge_of_what_can_be_meant(field: str, value: object) -> None:
    assert getattr(spec(**{field: value}), field) == value


@pytest.mark.parametrize(
    "key", ["", "ssh-ed25519", "AAAA", f"{KEY}\nssh-rsa BBBB", f"{KEY} a\0", "-----BEGIN OPENSSH PRIVATE KEY-----"]
)
def test_what_is_no_public_key(key: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec(ssh_keys=(KEY, key))
    assert caught.value.field == "ssh_keys[1]"


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ({"": "x"}, "labels"),
        ({"a b": "x"}, "labels"),
        ({"a" * 64: "x"}, "labels"),
        ({"a": "x\n"}, "labels.a"),
        ({"a": "x" * 256}, "labels.a"),
    ],
)
def test_labels_that_are_none(labels: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec(labels=labels)
    assert caught.value.field == field


@pytest.mark.parametrize("size", [0, -1, (64 << 10) + 1])
def test_sizes_of_disks(size: int) -> None:
    with pytest.raises(InvalidInput, match=r"size_gib: .* is out of range"):
        Disk(size_gib=size)


@pytest.mark.parametrize(
    "mac", ["53:54:00:12:34:56", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5G", ""]
)
def test_addresses_of_cards(mac: str) -> None:
    with pytest.raises(InvalidInput, match="mac: "):
        Nic(mac=mac)


def test_capitals_in_a_mac_address_are_refused_with_the_form_to_write() -> None:
    with pytest.raises(InvalidInput) as caught:
        Nic(mac="52:54:00:AB:CD:EF")
    assert "52:54:00:12:34:56" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "network", ["private", "private:", "private:A", "private:a b", "private:-", f"private:{'a' * 33}"]
)
def test_a_private_network_has_a_name(network: str) -> None:
    with pytest.raises(InvalidInput, match=r"network: .* is not a network of this host"):
        Nic(network=network)
    assert Nic(network="private:a-1").network == "private:a-1"


def test_networks_that_are_not_there() -> None:
    with pytest.raises(InvalidInput, match="network: 'bridge0': is not a network of this host"):
        Nic(network="bridge0")


def test_forwards_need_a_user_network() -> None:
    with pytest.raises(InvalidInput, match=r"forwards: .*: network 'none' has no port forwards"):
        Nic(network="none", forwards=("2222:22",))


def test_a_bad_forward_is_named_by_its_place() -> None:
    with pytest.raises(InvalidInput) as caught:
        Nic(forwards=("2222:22", "x:22"))
    assert caught.value.field == "forwards[1]"


def test_a_spec_cant_be_changed() -> None:
    with pytest.raises(AttributeError):
        spec().vcpus = 2  # type: ignore[misc]
