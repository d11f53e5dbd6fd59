"""The benchmark of `compare` itself: it counts right, and does not say "met" where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import compare as bench
from bench.harness import Failed
from bench.product import Polyvisor
from polyvisor.compare.results import Results
from tests.unit.compared import WORKLOADS, made_up, plan


@pytest.fixture
def polyvisor(tmp_path: Path) -> Polyvisor:
    return Polyvisor(tmp_path)


def measuring(monkeypatch: pytest.MonkeyPatch, medians: dict[str, float], *targets: str, runs: int = 6) -> list[int]:
    """Let the benchmark find values around `medians`; returns a list with an entry for each comparison."""
    made: list[int] = []

    def comparison(*_: object) -> Results:
        made.append(len(made))
        return made_up(plan(*targets, runs=runs), medians, seed=len(made), spread=0.02)

    monkeypatch.setattr(bench, "comparison", comparison)
    return made


def test_a_target_against_itself_meets_the_goal(
    polyvisor: Polyvisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = measuring(monkeypatch, {"a": 10.0, "b": 10.0}, "a=tcg", "b=tcg")
    assert bench.calibrate(polyvisor, 30, 6, tmp_path)
    assert len(made) == 10, "three metrics each"
    assert "of 30 (goal: 95%): met" in capsys.readouterr().out


def test_differences_that_are_none_miss_it(
    polyvisor: Polyvisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measuring(monkeypatch, {"a": 10.0, "b": 12.0}, "a=tcg", "b=tcg")
    assert not bench.calibrate(polyvisor, 6, 6, tmp_path)
    assert "MISSED" in capsys.readouterr().out


def test_too_few_runs_are_no_proof(polyvisor: Polyvisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, {"a": 10.0, "b": 10.0}, "a=tcg", "b=tcg", runs=3)
    with pytest.raises(Failed, match="too few"):
        bench.calibrate(polyvisor, 3, 3, tmp_path)


@pytest.mark.parametrize(("half", "met"), [(5.0, True), (6.5, False), (10.0, False)])
def test_a_slowed_target_is_found_and_sized(
    polyvisor: Polyvisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: float, met: bool
) -> None:
    monkeypatch.setattr(bench, "cap_refusal", lambda: None)
    monkeypatch.setattr("tests.unit.compared.WORKLOADS", {"a": WORKLOADS["a"]})
    measuring(monkeypatch, {"full": 10.0, "half": half}, "full=tcg", "half=tcg:cpu_limit=50", runs=8)
    assert bench.find_slowed(polyvisor, 8, tmp_path) is met


def test_without_limits_it_is_not_measured(
    polyvisor: Polyvisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "cap_refusal", lambda: "it takes root")
    assert not bench.find_slowed(polyvisor, 8, tmp_path)
    assert "NOT MEASURED: a slowed target: it takes root" in capsys.readouterr().out
