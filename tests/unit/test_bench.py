"""The benchmarks' harness: turns, statistics, and reports that don't hide what is missing."""

import json
from functools import partial
from itertools import pairwise, permutations
from pathlib import Path

import pytest

from bench.harness import Failed, Finding, Report, as_text, call, difference, ratio, summary, take_turns, write_results


def test_cases_take_turns_and_each_comes_after_each_of_the_others() -> None:
    order: list[str] = []

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"ms": float(len(order))}

    cases = {name: partial(run, name) for name in "abc"}
    measures = take_turns(cases, 12, "")
    rounds = ["".join(order[i : i + 3]) for i in range(0, 36, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert {pair for pair in pairwise(order) if pair[0] != pair[1]} == {*permutations("abc", 2)}
    for name in cases:
        assert measures[name]["ms"] == [number * 3.0 + each.index(name) + 1 for number, each in enumerate(rounds)]
    again = list(order)
    order.clear()
    take_turns(cases, 12, "")
    assert order == again, "the same plan in every run"


def test_comparisons_are_made_within_a_round() -> None:
    measures = {"a": {"ms": [10.0, 100.0, 30.0]}, "b": {"ms": [5.0, 50.0, 10.0]}}
    assert ratio(measures, "ms", "a", "b") == 2.0
    assert difference(measures, "ms", "a", "b") == 20.0


def test_rounds_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio({"a": {"ms": [1.0, 2.0]}, "b": {"ms": [1.0]}}, "ms", "a", "b")


def test_summary_is_robust_against_one_bad_run() -> None:
    found = summary([10.0, 11.0, 12.0, 13.0, 1000.0])
    assert (found["median"], found["q1"], found["q3"], found["max"], found["runs"]) == (12.0, 11.0, 13.0, 1000.0, 5)


@pytest.mark.parametrize(
    ("value", "at_most", "met"), [(59.0, True, True), (61.0, True, False), (61.0, False, True), (59.0, False, False)]
)
def test_goals_have_a_direction(value: float, at_most: bool, met: bool) -> None:
    finding = Finding("x", value, "ms", 60, at_most=at_most)
    assert finding.met is met
    assert ("MISSED" in as_text(Report("t", findings=[finding]))) is not met


def test_a_report_says_loudly_what_is_missing_and_keeps_every_value(tmp_path: Path) -> None:
    report = Report("title", {"a": {"ms": [1.0, 2.0]}}, [Finding("f", 1.5, "ms")], ["peer: not installed"])
    assert "!! NOT MEASURED: peer: not installed" in as_text(report)
    path = write_results([report], {"at": "2030-01-01T00:00:00Z"}, tmp_path)
    bench = json.loads(path.read_text())["benches"][0]
    assert bench["cases"]["a"]["ms"]["values"] == [1.0, 2.0]
    assert bench["missing"] == ["peer: not installed"]
    assert bench["findings"][0]["met"] is None


def test_a_failed_command_ends_the_benchmark_with_its_words() -> None:
    with pytest.raises(Failed, match="no way"):
        call(["sh", "-c", "echo no way >&2; exit 3"])
    with pytest.raises(Failed, match="polyvisor-absent"):
        call(["polyvisor-absent"])
