"""What becomes of a probe's outcome; that the probes themselves tell the truth is tested with real guests."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyvisor.cli.main import run
from polyvisor.compare import features
from polyvisor.compare.features import PROBES, Disagrees, NotProbed, Outcome, Prober, probe
from polyvisor.compare.place import shell_of
from polyvisor.compare.target import parse_target
from polyvisor.errors import InvalidInput, PolyvisorError, TimedOut, Unsupported
from polyvisor.host.host import Host
from polyvisor.operation import Step


@pytest.fixture
def prober(tmp_path: Path) -> Prober:
    host = Host(tmp_path / "home")
    return Prober(parse_target("tcg"), host, shell_of(host), "probe-tcg", "tiny")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, Outcome.WORKS),
        (Unsupported("emulation can't"), Outcome.REFUSED),
        (InvalidInput("mode", "pv", "needs Xen"), Outcome.REFUSED),
        (NotProbed("no disk"), Outcome.SKIPPED),
        (Disagrees("1 was seen instead of 2"), Outcome.FAILED),
        (TimedOut("silence"), Outcome.FAILED),
    ],
)
async def test_outcomes(
    error: PolyvisorError | None, outcome: Outcome, prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def one(_: Prober) -> str:
        if error is not None:
            raise error
        return "seen"

    async def other(_: Prober) -> str:
        return "too"

    monkeypatch.setattr(features, "PROBES", {"one": one, "other": other})
    steps: list[Step] = []
    found = await probe(prober, steps.append)
    assert [(f.feature, f.outcome) for f in found] == [("one", outcome), ("other", Outcome.WORKS)]
    assert found[0].detail == (error.message if error else "seen")
    assert steps[0].phase == "tcg: one"
    assert [f.feature for f in await probe(prober, only=["other"])] == ["other"]


async def test_the_stack_is_what_the_host_says(prober: Prober) -> None:
    [found] = await probe(prober, only=["versions and licences"])
    assert found.outcome is Outcome.WORKS
    assert "Linux " in found.detail


async def test_live_migration_is_not_claimed(prober: Prober) -> None:
    [found] = await probe(prober, only=["live migration"])
    assert found.outcome is Outcome.REFUSED


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compare --features --targets native", "native'"),
        ("compare --features --targets xen-pv", "is not available: this host: "),
        ("compare --features --runs 3", "stands beside --features"),
    ],
)
def test_bad_input_is_one_line(
    line: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POLYVISOR_HOME", str(tmp_path / "home"))
    assert run(line.split()) in (2, 8)
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1


def test_there_is_a_probe_for_what_people_ask() -> None:
    assert {"console through a reboot", "save and restore", "live migration", "boot by UEFI"} <= PROBES.keys()
