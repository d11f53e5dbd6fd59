"""A comparison goes its way whatever happens: what was measured is on disk, what failed is told, the rest can be done later."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from polyvisor.compare import results as raw
from polyvisor.compare.plan import visits
from polyvisor.compare.results import Measurement, from_json, merged, read, to_json, write
from polyvisor.compare.runner import Runner
from polyvisor.compare.session import resumed
from polyvisor.errors import (
    ConnectionLost,
    InvalidInput,
    NotFound,
    PolyvisorError,
    ProcessFailed,
    StorageFull,
    TimedOut,
)
from polyvisor.operation import Step
from tests.unit.compared import WORKLOADS, Fake, made_up, plan, results


def machines(*, of: raw.Results, **options: object) -> dict[str, Fake]:
    return {target.label: Fake(target, **options) for target in of.plan.targets}  # type: ignore[arg-type]


def failed(found: raw.Results) -> list[tuple[int, str, str]]:
    return [each.place for each in found.measurements if each.error]


async def test_everything_of_the_plan_is_measured_and_kept(tmp_path: Path) -> None:
    begun, file, steps = results(), tmp_path / "raw.json", list[Step]()
    fakes = machines(of=begun)
    found = await Runner(begun, file, fakes, WORKLOADS, steps.append).run()
    planned = {(v.round, v.target.label, name) for v in visits(begun.plan, WORKLOADS) for name in v.workloads}
    assert found.measured() == planned
    assert read(file) == found
    assert found.values("tcg", "a", "speed") == [1.0] * 3, "warm-ups don't count"
    assert steps[0].phase.startswith("warm-up, ") and steps[-1].total == len(planned)
    assert "left)" in steps[-1].phase
    assert all(fake.log[-1] == "close" and fake.log.count("discard") == 4 for fake in fakes.values())


async def test_it_is_on_disk_before_the_next_measurement(tmp_path: Path) -> None:
    begun, file = results(), tmp_path / "raw.json"
    on_disk: list[int] = []

    def look(script: str) -> str:
        on_disk.append(len(read(file).measurements))
        return "1"

    await Runner(begun, file, machines(of=begun, answer=look), WORKLOADS).run()
    assert on_disk == list(range(len(on_disk)))


async def test_ctrl_c_keeps_what_was_measured_and_the_rest_can_be_done_later(tmp_path: Path) -> None:
    begun, file = results(), tmp_path / "raw.json"
    calls = 0

    def interrupt(script: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise asyncio.CancelledError
        return "2"

    fakes = machines(of=begun, answer=interrupt)
    with pytest.raises(asyncio.CancelledError):
        await Runner(begun, file, fakes, WORKLOADS).run()
    assert all(fake.log[-1] == "close" for fake in fakes.values())
    kept = read(file)
    assert len(kept.measurements) == 7
    later = machines(of=begun)
    found = await Runner(resumed(kept), file, later, WORKLOADS).run()
    assert found.plan == begun.plan
    assert len(found.measured()) == len(found.measurements) == 2 * 4 * 3
    assert sum(2.0 in each.values.values() for each in found.measurements) == 7, "nothing is measured twice"


async def test_a_guest_that_dies_costs_one_measurement(tmp_path: Path) -> None:
    begun = results(plan(warmups=0))
    fakes = machines(of=begun)
    fakes["kvm"].failing["b"] = TimedOut("the guest is silent")
    found = await Runner(begun, tmp_path / "raw.json", fakes, WORKLOADS).run()
    assert failed(found) == [(i, "kvm", "b") for i in range(3)]
    at = fakes["kvm"].log.index("b")
    assert fakes["kvm"].log[at + 1] == "discard", "the next measurement has a new guest"
    assert len(found.measured()) == 2 * 3 * 3 - 3
    assert found.notes == ()


async def test_a_program_that_fails_costs_no_guest(tmp_path: Path) -> None:
    begun = results(plan("tcg", warmups=0, runs=1))
    fakes = machines(of=begun, is_alive=True)
    fakes["tcg"].failing["a"] = ProcessFailed(["sh"], 1, "dd: no")
    found = await Runner(begun, tmp_path / "raw.json", fakes, WORKLOADS).run()
    assert failed(found) == [(0, "tcg", "a")]
    assert fakes["tcg"].log.count("discard") == 1, "at the end of the visit alone"


async def test_what_can_not_be_read_is_a_failure_that_says_so(tmp_path: Path) -> None:
    begun = results(plan("tcg", warmups=0, runs=1))
    found = await Runner(
        begun, tmp_path / "raw.json", machines(of=begun, answer=lambda s: "no number"), WORKLOADS
    ).run()
    assert "said what can't be read: no number" in str(found.measurements[0].error)


async def test_a_host_that_is_lost_keeps_the_others_going_and_is_given_up(tmp_path: Path) -> None:
    begun, file = results(plan(warmups=0, runs=5)), tmp_path / "raw.json"
    fakes = machines(of=begun)
    lost = ConnectionLost("host 'x': the connection was lost")
    fakes["kvm"].failing.update({"a": lost, "b": lost, "birth": lost})
    found = await Runner(begun, file, fakes, WORKLOADS).run()
    assert len(failed(found)) == 2, "the rest of a visit is not tried, nor a third one"
    assert len({p for p in found.measured() if p[1] == "tcg"}) == 5 * 3
    assert found.notes == ("target 'kvm' was given up: host 'x': the connection was lost",)
    assert "close" not in fakes["kvm"].log
    again = await Runner(resumed(read(file)), file, machines(of=begun), WORKLOADS).run()
    assert len(again.measured()) == 2 * 5 * 3
    assert again.notes == ()


async def test_a_host_that_comes_back_is_not_given_up(tmp_path: Path) -> None:
    begun = results(plan("tcg", warmups=0, runs=4))
    fakes = machines(of=begun)
    turns = iter([True, False, True, False])

    def answer(script: str) -> str:
        if script == "birth" and next(turns):
            raise ConnectionLost("gone")
        return "1"

    fakes = machines(of=begun, answer=answer)
    found = await Runner(begun, tmp_path / "raw.json", fakes, WORKLOADS).run()
    assert len(failed(found)) == 2
    assert found.notes == ()


async def test_an_image_without_the_program_is_one_line_at_once(tmp_path: Path) -> None:
    begun = results()
    fakes = machines(of=begun, programs=())
    with pytest.raises(InvalidInput) as raised:
        await Runner(begun, tmp_path / "raw.json", fakes, WORKLOADS).run()
    assert "image 'tiny' lacks the program 'fio' (Debian's package fio)" in raised.value.message
    assert "--image bench" in str(raised.value.hint)
    assert all(fake.log[-1] == "close" for fake in fakes.values())


async def test_a_full_disk_ends_it(tmp_path: Path) -> None:
    begun = results()
    fakes = machines(of=begun)
    for fake in fakes.values():
        fake.failing["birth"] = StorageFull("full")
    with pytest.raises(StorageFull):
        await Runner(begun, tmp_path / "raw.json", fakes, WORKLOADS).run()


async def test_no_round_begins_that_would_end_too_late(tmp_path: Path) -> None:
    begun = results(plan(warmups=1, runs=50, limit_s=130.0))
    now = 0.0

    def slow(script: str) -> str:
        nonlocal now
        now += 5
        return "1"

    found = await Runner(
        begun, tmp_path / "raw.json", machines(of=begun, answer=slow), WORKLOADS, clock=lambda: now
    ).run()
    assert now <= 130
    assert len(found.values("tcg", "a", "speed")) == len(found.values("kvm", "a", "speed")) == 3, "whole rounds alone"
    assert found.notes == ("the time (2 minutes) was enough for 3 of 50 runs",)
    assert resumed(found).notes == (), "it is not true any more"


class TestRawData:
    def test_it_comes_back_as_it_was(self) -> None:
        found = made_up(plan("a=tcg:vcpus=2", "kvm@big", limit_s=60.0), {"a": 1.0, "kvm-at-big": 2.0}).noting("a note")
        assert from_json(to_json(found), "x") == found

    def test_whole_numbers_of_other_programs_are_numbers_too(self) -> None:
        text = json.loads(to_json(made_up(plan("tcg", limit_s=60.0), {"tcg": 1.0})))
        text["plan"]["limit_s"] = 60
        for each in text["measurements"]:
            each["values"] = dict.fromkeys(each["values"], 3)
            each["at"] = 5
        assert set(from_json(json.dumps(text), "x").values("tcg", "a", "speed")) == {3.0}

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda t: t[: len(t) // 2],
            lambda t: "[]",
            lambda t: "\xff",
            lambda t: t.replace('"format": 1', '"format": 99'),
            lambda t: t.replace('"seed": 7', '"seed": "x"'),
            lambda t: t.replace('"runs": 3', '"runs": 0'),
            lambda t: t.replace('"tcg"', '"vmware"'),
            lambda t: t.replace('"image"', '"imagination"'),
            lambda t: t.replace('"took_s": 1.0', '"took_s": NaN'),
            lambda t: t.replace('"took_s": 1.0', f'"took_s": {"9" * 5000}'),
            lambda t: "[" * 100_000,
            lambda t: t.replace('"measurements": [', '"measurements": [3, '),
            lambda t: t.replace('"at": 2.0', '"at": {}'),
        ],
    )
    def test_what_is_damaged_is_refused_in_one_line(self, spoil: Callable[[str], str], tmp_path: Path) -> None:
        file = tmp_path / "raw.json"
        file.write_text(spoil(to_json(made_up(plan("tcg"), {"tcg": 1.0}))))
        with pytest.raises(InvalidInput) as raised:
            read(file)
        assert "\n" not in raised.value.message

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound):
            read(tmp_path / "nowhere.json")
        with pytest.raises(PolyvisorError):
            write(tmp_path / "nowhere" / "raw.json", results())

    def test_a_later_measurement_replaces_the_one_before(self) -> None:
        one = Measurement(round=0, target="tcg", workload="a", at=1.0, took_s=1.0, error="no")
        two = Measurement(round=0, target="tcg", workload="a", at=2.0, took_s=1.0, values={"speed": 1.0})
        assert results().having(one).having(two).measurements == (two,)

    def test_merged_runs_are_all_there(self) -> None:
        one = made_up(plan("tcg", "kvm"), {"tcg": 1.0, "kvm": 2.0}, seed=1)
        two = made_up(plan("tcg", "native"), {"tcg": 1.0, "native": 3.0}, seed=2)
        found = merged([one, two, one])
        assert found.values("tcg", "a", "speed") == [
            *one.values("tcg", "a", "speed"),
            *two.values("tcg", "a", "speed"),
            *one.values("tcg", "a", "speed"),
        ]
        assert found.values("native", "a", "speed") == two.values("native", "a", "speed")
        assert [target.label for target in found.plan.targets] == ["tcg", "kvm", "native"]
        assert from_json(to_json(found), "x") == found

    def test_what_only_has_the_same_name_is_not_merged(self) -> None:
        one, two = (made_up(plan(text), {"x": 1.0}) for text in ("x=tcg", "x=kvm"))
        with pytest.raises(InvalidInput, match="x=tcg in one file and x=kvm in the other"):
            merged([one, two])
