"""Records on disk: read back as they were written, by this version and by the next."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import InvalidInput
from polyvisor.host.record import (
    Launch,
    Record,
    boot_id,
    launch_from_json,
    launch_to_json,
    record_from_json,
    record_to_json,
)
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import Disk, VMSpec
from tests.unit.specs import QUICK, forwards, specs

times = st.floats(0, 2**33)


@QUICK
@given(
    st.builds(
        Record,
        id=st.uuids().map(str),
        created_at=times,
        spec=specs,
        image_id=st.text(max_size=12),
        memory_mib=st.integers(16, 1 << 24),
        user=st.none() | st.integers(1, 2**31),
    )
)
def test_a_record_is_read_as_it_was_written(record: Record) -> None:
    text = record_to_json(record)
    assert record_from_json(text) == record
    assert record_from_json(text.encode()) == record


@QUICK
@given(
    st.builds(
        Launch,
        started_at=times,
        boot_id=st.text(max_size=5),
        hypervisor=st.text(max_size=5),
        reason=st.text(max_size=5),
        version=st.text(max_size=5),
        mode=st.text(max_size=5),
        argv=st.lists(st.text(max_size=5), max_size=5).map(tuple),
        forwards=st.lists(forwards, max_size=3).map(tuple),
    )
)
def test_a_launch_is_read_as_it_was_written(launch: Launch) -> None:
    assert launch_from_json(launch_to_json(launch)) == launch


FIRST = """{
  "format": 1,
  "id": "6f4d0a54-1f0a-4b5e-9d0e-2b7f6a1c9e11",
  "created_at": 1700000000.5,
  "image_id": "0123456789ab",
  "memory_mib": 128,
  "user": 1900000000,
  "spec": {"name": "web-1", "image": "tiny", "disks": [{"size_gib": 3}]}
}"""


def test_records_of_the_first_version_are_read_for_ever() -> None:
    record = record_from_json(FIRST)
    assert record.spec == VMSpec(name="web-1", image="tiny", disks=(Disk(size_gib=3),))
    assert (record.user, record.created_at) == (1_900_000_000, 1_700_000_000.5)


def test_a_record_of_a_later_format_says_so() -> None:
    with pytest.raises(ValueError, match="its format is 2; this Polyvisor reads 1"):
        record_from_json(json.dumps({**json.loads(FIRST), "format": 2}))


def test_a_spec_that_was_changed_by_hand_is_checked() -> None:
    raw = json.loads(FIRST)
    raw["spec"]["disks"][0]["size_gib"] = 0
    with pytest.raises(InvalidInput, match=r"disks\[0\].size_gib"):
        record_from_json(json.dumps(raw))


def test_a_record_is_for_people_too() -> None:
    record = record_from_json(FIRST)
    assert json.loads(record_to_json(record)) == json.loads(FIRST)
    assert record_to_json(record).count("\n") > 5
    launch = Launch(
        started_at=0.0,
        boot_id="",
        hypervisor="",
        reason="",
        version="",
        mode="",
        argv=(),
        forwards=(Forward(host_port=1, guest_port=2),),
    )
    assert json.loads(launch_to_json(launch))["forwards"][0]["guest_port"] == 2


def test_the_boot_of_this_machine_has_a_name_that_stays() -> None:
    assert boot_id() == boot_id()
    assert len(boot_id()) == 36
