"""What is said of numbers: intervals that hold what they promise, and no difference where there is none."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyvisor.compare import statistics
from polyvisor.compare.statistics import ALPHA, Verdict, compare, enough, summarize
from polyvisor.errors import Unavailable

values = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=12)


def test_a_median_with_its_interval() -> None:
    found = summarize([5, 1, 3, 2, 4])
    assert (found.median, found.least, found.most, found.runs) == (3, 1, 5, 5)
    assert found.low is not None and found.high is not None
    assert 1 <= found.low < 3 < found.high <= 5


def test_one_value_has_no_interval() -> None:
    found = summarize([5.0])
    assert (found.median, found.low, found.high) == (5, None, None)


@settings(max_examples=40, deadline=None)
@given(values)
def test_an_interval_is_within_the_values_and_the_same_each_time(sample: list[float]) -> None:
    found = summarize(sample)
    assert found == summarize(sample)
    if found.low is not None and found.high is not None:
        rounding = 1e-9 * max(sample)
        assert min(sample) - rounding <= found.low <= found.median + rounding
        assert found.median - rounding <= found.high <= max(sample) + rounding


@settings(max_examples=30, deadline=None)
@given(values, values, st.booleans())
def test_whatever_comes_there_is_a_verdict(one: list[float], other: list[float], lower: bool) -> None:
    found = compare(one, other, lower_is_better=lower)
    assert -1 <= found.effect <= 1
    assert 0 < found.p <= 1
    assert (found.verdict is Verdict.TOO_FEW) is not enough(len(one), len(other))


def test_too_few_values_show_nothing_however_far_apart_they_are() -> None:
    assert enough(5, 5) and not enough(4, 4) and not enough(1, 100)
    found = compare([1, 1.1, 1.2, 1.3], [100, 101, 102, 103], lower_is_better=True)
    assert found.verdict is Verdict.TOO_FEW
    assert found.low is None and found.high is None


def test_better_and_worse_go_by_what_the_metric_means() -> None:
    slow, fast = [10, 10.1, 10.2, 9.9, 9.8, 10.05], [5, 5.1, 5.2, 4.9, 4.8, 5.05]
    assert compare(slow, fast, lower_is_better=True).verdict is Verdict.BETTER
    assert compare(slow, fast, lower_is_better=False).verdict is Verdict.WORSE
    found = compare(slow, fast, lower_is_better=True)
    assert found.effect == -1
    assert found.change == pytest.approx(-0.5, abs=0.01)
    assert found.low is not None and found.high is not None
    assert found.low <= found.change <= found.high


def test_the_same_value_everywhere_is_no_difference() -> None:
    found = compare([3.0] * 8, [3.0] * 8, lower_is_better=True)
    assert (found.change, found.effect, found.verdict) == (0, 0, Verdict.NONE)


def test_values_that_are_not_above_zero_are_told_apart_by_their_difference() -> None:
    found = compare([0, 1, 0, -1, 0, 1], [10, 11, 10, 9, 10, 11], lower_is_better=True)
    assert not found.is_relative
    assert (found.change, found.verdict) == (10, Verdict.WORSE)


@pytest.mark.parametrize("count", [5, 10])
@pytest.mark.parametrize("shape", ["lognormal", "two humps", "a clock of few ticks"])
def test_a_target_and_itself_differ_in_at_most_one_of_a_hundred(shape: str, count: int) -> None:
    """As ALPHA promises, with room for chance: of 100 at p = 0.01, more than 5 come up once in two thousand times."""
    chance = np.random.default_rng(20250101)

    def drawn() -> Sequence[float]:
        if shape == "lognormal":
            return list(map(float, chance.lognormal(0, 0.1, count)))
        if shape == "two humps":
            return list(map(float, chance.normal(10, 0.2, count) + 3 * chance.integers(0, 2, count)))
        return list(map(float, chance.integers(20, 24, count) / 100))

    wrong = sum(compare(drawn(), drawn(), lower_is_better=True).verdict is not Verdict.NONE for _ in range(100))
    assert wrong <= 5, f"{wrong} of 100 are said to differ: expected are at most {ALPHA * 100}"


def test_a_target_at_half_speed_is_found_and_sized() -> None:
    chance = np.random.default_rng(1)
    for _ in range(10):
        full, half = (list(map(float, m * chance.lognormal(0, 0.05, 8))) for m in (100, 50))
        found = compare(full, half, lower_is_better=False)
        assert found.verdict is Verdict.WORSE
        assert found.change == pytest.approx(-0.5, abs=0.05)


def test_most_intervals_hold_the_true_median() -> None:
    """At 95 % with ten values; bootstrap intervals of so few are somewhat short, so not 143 of 150 are asked for."""
    chance = np.random.default_rng(2)
    held = 0
    for _ in range(150):
        found = summarize(list(map(float, chance.lognormal(0, 0.2, 10))))
        assert found.low is not None and found.high is not None
        held += found.low <= 1 <= found.high
    assert held >= 135


def test_without_scipy_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def lacking(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(f"No module named '{name}'")
        return genuine(name, *rest, **named)

    statistics.require()
    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(Unavailable, match="scipy, which is not installed") as raised:
        statistics.require()
    assert "pip install 'polyvisor[compare]'" in str(raised.value.hint)
