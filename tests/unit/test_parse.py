"""Plain data to dataclasses and back: nothing is lost, and every refusal names the place."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given

from polyvisor.errors import InvalidInput
from polyvisor.spec.parse import structure, unstructure
from polyvisor.spec.vm import Disk, Nic, VMSpec
from tests.unit.specs import QUICK, specs

VM: dict[str, Any] = {"name": "web-1", "image": "tiny"}


def refused(**values: Any) -> InvalidInput:
    """The refusal of a spec with `values`, which fits on a line or two."""
    with pytest.raises(InvalidInput) as caught:
        structure({**VM, **values}, VMSpec)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300
    assert len(caught.value.hint or "") < 300
    return caught.value


@QUICK
@given(specs)
def test_a_spec_survives_the_way_to_plain_data_and_back(spec: VMSpec) -> None:
    assert structure(unstructure(spec), VMSpec) == spec


def test_defaults_are_left_out_of_plain_data() -> None:
    assert unstructure(VMSpec(**VM)) == VM
    assert unstructure(VMSpec(**VM, nics=(Nic(), Nic(network="none")))) == {**VM, "nics": [{}, {"network": "none"}]}
    assert unstructure(VMSpec(**VM, nics=())) == {**VM, "nics": []}


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"vcpu": 2}, "vcpu: 2: is an unknown key", "did you mean 'vcpus'?"),
        ({"memory": "2G"}, "memory: '2G': is an unknown key", "did you mean 'memory_mib'?"),
        ({"disks": [{"size": 3}]}, "disks[0].size: 3: is an unknown key", "did you mean 'size_gib'?"),
        ({"nics": [{}, {"mtu": 3}]}, "nics[1].mtu: 3: is an unknown key", "known here: network, mac, forwards"),
        ({"vcpus": True}, "vcpus: True: is not a whole number", None),
        ({"vcpus": 1.0}, "vcpus: 1.0: is not a whole number", None),
        ({"vcpus": None}, "vcpus: None: is not a whole number", None),
        ({"vcpus": "2"}, "vcpus: '2': is not a whole number", "write the number alone"),
        ({"memory_mib": "2G"}, "memory_mib: '2G': is not a whole number", "the field's name has its unit"),
        ({"disks": [{"size_gib": "10G"}]}, "disks[0].size_gib: '10G': is not a whole number", "write the number alone"),
        ({"disks": [{"size_gib": False}]}, "disks[0].size_gib: False: is not a whole number", None),
        ({"disks": [{"size_gib": 0}]}, "disks[0].size_gib: 0: is out of range", "use 1 to 65536 GiB"),
        ({"disks": {"size_gib": 3}}, "disks: {'size_gib': 3}: is not a list", "write disks: [ … ]"),
        ({"disks": [3]}, "disks[0]: 3: is not a mapping", None),
        ({"name": 7}, "name: 7: is not text", 'put it in quotes: name: "7"'),
        ({"name": False}, "name: False: is not text", "put it in quotes"),
        ({"name": ["a"]}, "name: ['a']: is not text", None),
        ({"labels": ["a"]}, "labels: ['a']: is not a mapping", None),
        ({"labels": {1: "a"}}, "labels: 1: is a key that is not text", "put it in quotes"),
        ({"labels": {"a": 1}}, "labels.a: 1: is not text", 'put it in quotes: a: "1"'),
        ({"hypervisor": "vmware"}, "hypervisor: 'vmware': is not a choice here", "use auto, kvm, xen or tcg"),
        ({"hypervisor": ["kvm"]}, "hypervisor: ['kvm']: is not a choice here", "use auto"),
        ({"on_reboot": None}, "on_reboot: None: is not a choice here", "use restart or stop"),
        ({"nics": [{"network": "lan: 1"}]}, "nics[0].network: 'lan: 1': is not a network of this host", "use user"),
        ({"nics": [{"forwards": ["a: b: c"]}]}, "nics[0].forwards[0]: 'a: b: c': 'a' is not an IPv4 address", "write"),
        ({"nics": [{"forwards": [8080]}]}, "nics[0].forwards[0]: 8080: is not text", "put it in quotes"),
        ({5: "x"}, "5: 'x': is an unknown key", "known here"),
        ({None: "x"}, "None: 'x': is an unknown key", None),
    ],
)
def test_a_refusal_names_place_value_and_remedy(values: dict[Any, Any], message: str, hint: str | None) -> None:
    with pytest.raises(InvalidInput) as caught:
        structure({**VM, **values}, VMSpec)
    assert message in caught.value.message
    assert (hint or "") in (caught.value.hint or "")


@pytest.mark.parametrize("key", ["name", "image"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InvalidInput, match=f"{key}: None: is missing") as caught:
        structure({k: v for k, v in VM.items() if k != key}, VMSpec)
    assert caught.value.hint == f"add '{key}: …'"


@pytest.mark.parametrize("raw", [None, 5, "name", ["name"], [("name", "a")], True])
def test_what_is_no_mapping(raw: object) -> None:
    with pytest.raises(InvalidInput, match=r"spec: .*: is not a mapping"):
        structure(raw, VMSpec)


def test_numbers_too_long_to_print_are_refused_in_one_line() -> None:
    assert refused(vcpus=10**6000).field == "vcpus"
    assert refused(name=10**6000).field == "name"


def test_keys_and_values_of_any_length_make_one_short_line() -> None:
    assert "unknown key" in refused(**{"x" * 100_000: 1}).message
    assert "unknown key" in refused(**{"a\x1b[2Jb\n": 1}).message
    assert refused(labels={"x" * 100_000: 5}).message.startswith("labels.")
    assert refused(name=list(range(100_000))).field == "name"


@dataclass(frozen=True)
class Sample:
    flag: bool
    ratio: float = 0.5
    disk: Disk | None = None


def test_true_and_false_are_no_numbers_and_numbers_neither() -> None:
    assert structure({"flag": True, "disk": {"size_gib": 3}}, Sample) == Sample(True, disk=Disk(size_gib=3))
    assert structure({"flag": True, "disk": None}, Sample) == Sample(True)
    for wrong in (1, 0, "true"):
        with pytest.raises(InvalidInput, match=r"flag: .*is not true or false"):
            structure({"flag": wrong}, Sample)
    with pytest.raises(InvalidInput, match="ratio: True: is not a number"):
        structure({"flag": True, "ratio": True}, Sample)
