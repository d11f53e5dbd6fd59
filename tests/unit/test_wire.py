"""What goes over the wire to another host: verbs, values and errors, there and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor import errors
from polyvisor.errors import InvalidInput, PolyvisorError, ProcessFailed, ProtocolError
from polyvisor.host.api import HostApi
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.wire import LOOKS, REPEATABLE, STREAMS, decode, encode, failure, raised, verbs
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import Disk, Nic, VMSpec

SPEC = VMSpec(
    name="web-1",
    image="debian-12",
    vcpus=2,
    memory_mib=512,
    disks=(Disk(size_gib=10), Disk()),
    nics=(Nic(forwards=("2222:22",)), Nic(network="none", mac="52:54:00:12:34:56")),
    user_data="#!/bin/sh\necho é\u2028\n",
    labels={"tier": "web"},
)


def over_the_wire(message: dict[str, Any]) -> dict[str, Any]:
    line = encode(message)
    assert line.count(b"\n") == 1, "a message is a line, whatever is in it"
    return decode(line)


def test_every_verb_of_a_host_is_there() -> None:
    public = {name for name in vars(HostApi) if not name.startswith("_")}
    assert verbs().keys() | {*STREAMS, "close"} == public
    assert public <= set(dir(RemoteHost))
    assert set(LOOKS) | set(REPEATABLE) <= verbs().keys()
    assert not set(LOOKS) & set(REPEATABLE)


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("run", {"spec": SPEC, "new": True}),
        ("add_forward", {"name": "a", "forward": Forward(host_port=0, guest_port=80, protocol="udp")}),
        ("stop", {"name": "a", "timeout_s": 2.5}),
        ("image_build", {"kind": "tiny", "suite": None, "size_gib": 4, "mirror": "x"}),
        ("vms", {}),
    ],
)
def test_arguments_arrive_as_they_were(verb: str, arguments: dict[str, Any]) -> None:
    came = over_the_wire({"id": 1, "method": verb, "params": {"arguments": arguments}})
    assert verbs()[verb].arguments(came["params"]["arguments"]) == arguments


@pytest.mark.parametrize(
    ("verb", "arguments", "says"),
    [
        ("start", {}, "name.*missing"),
        ("start", {"name": 1}, "name.*not text"),
        ("start", {"name": "a", "shell": "x"}, "shell.*unknown"),
        ("start", ["a"], "not a mapping"),
        ("run", {"spec": {"name": "a", "image": "tiny", "colour": 1}}, "spec.colour.*unknown key"),
        ("run", {"spec": {"name": "../a", "image": "tiny"}}, "spec.name.*not a VM name"),
        ("image_build", {"kind": "tiny", "suite": {"a": 1}}, "suite.*neither text"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(verb: str, arguments: object, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        verbs()[verb].arguments(arguments)


def all_errors() -> list[type[PolyvisorError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PolyvisorError)]


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_is_the_same_on_the_other_side(kind: type[PolyvisorError]) -> None:
    if kind is InvalidInput:
        error: PolyvisorError = InvalidInput("disks[0]", "x", "is wrong", hint="use 1")
    elif kind is ProcessFailed:
        error = ProcessFailed(["qemu-img", "info"], 3, "one\ntwo", hint="look")
    else:
        error = kind("what failed", hint="what to do")
    came = raised(over_the_wire({"id": 1, "error": failure(error)})["error"])
    assert type(came) is kind
    assert came.to_dict() == error.to_dict()
    assert vars(came) == vars(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_an_error_that_is_none_is_an_error_all_the_same(value: object) -> None:
    """A host may be hostile: whatever it says, the caller gets an error that it can report."""
    for error in (raised(value), raised({"data": value}), raised({"data": {"code": value, "details": value}})):
        assert isinstance(error, PolyvisorError)
        json.dumps(error.to_dict())


@pytest.mark.parametrize("line", [b"", b"hello\n", b"[1]\n", b'{"id": 1}\n', b"\xff\n", b"[" * 100_000])
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(line)
