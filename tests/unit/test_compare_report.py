"""What a report says: verdicts beside the baseline, in every form, with what a sceptic must know on top."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.cli.context import to_json
from polyvisor.cli.main import run
from polyvisor.compare.html import page
from polyvisor.compare.plot import LEFT, RIGHT, WIDTH, axis, colors_of, plot
from polyvisor.compare.report import EMULATED, change_of, diff_of, figure, report_of
from polyvisor.compare.results import Measurement, Results, write
from polyvisor.compare.statistics import Verdict, compare
from polyvisor.compare.text import HEADER, markdown, table_rows
from polyvisor.errors import InvalidInput
from tests.unit.compared import made_up, plan


@pytest.fixture
def found() -> Results:
    return made_up(plan("tcg", "kvm", runs=8), {"tcg": 10.0, "kvm": 5.0})


def verdict(found: Results, target: str, workload: str, baseline: str | None = None) -> Verdict | None:
    for row in report_of(found, baseline).rows:
        for cell in row.cells:
            if (cell.name, row.workload) == (target, workload):
                return cell.comparison.verdict if cell.comparison else None
    raise AssertionError(f"no {workload} of {target}")


def test_each_target_is_told_against_the_first(found: Results) -> None:
    assert verdict(found, "kvm", "a") is Verdict.WORSE, "half as many turns"
    assert verdict(found, "kvm", "b") is Verdict.BETTER, "half the time"
    assert verdict(found, "tcg", "a") is None
    assert verdict(found, "tcg", "a", baseline="kvm") is Verdict.BETTER


def test_the_host_itself_is_the_baseline_where_it_was_measured() -> None:
    found = made_up(plan("tcg", "native", runs=8), {"tcg": 10.0, "native": 10.0})
    assert verdict(found, "tcg", "a") is Verdict.NONE
    assert verdict(found, "native", "a") is None


def test_a_baseline_that_is_none_is_refused_with_the_nearest(found: Results) -> None:
    with pytest.raises(InvalidInput) as raised:
        report_of(found, "kvn")
    assert raised.value.hint == "did you mean kvm?"


def test_a_summary_in_plain_words(found: Results) -> None:
    [line] = report_of(found).summary
    assert line.startswith("kvm against tcg: better in 1 of 3: b time (−")
    assert "worse in 2 of 3" in line


def test_emulation_is_said_in_large_letters(found: Results) -> None:
    report = report_of(found)
    assert report.notice == f"{EMULATED} Emulated: tcg."
    assert f"> # {EMULATED}" in markdown(report)
    real = made_up(plan("kvm", "xen-pv", runs=5), {"kvm": 1.0, "xen-pv": 1.0})
    assert report_of(real).notice is None


def test_failures_are_told_and_don_t_count(found: Results) -> None:
    lost = Measurement(round=3, target="kvm", workload="a", at=1.0, took_s=1.0, error="it | broke")
    report = report_of(found.having(lost, replace(lost, round=4)))
    cell = next(c for row in report.rows for c in row.cells if (row.workload, c.name) == ("a", "kvm"))
    assert (cell.failures, len(cell.values)) == (2, 6)
    assert report.errors == ("kvm, a: it | broke (2 times)",)
    assert "it \\| broke" in markdown(report)
    assert any("2 failed" in row[-1] for row in table_rows(report))


def test_every_metric_of_every_target_has_a_row(found: Results) -> None:
    rows = table_rows(report_of(found))
    assert len(rows) == 3 * 2
    assert all(len(row) == len(HEADER) for row in rows)


def test_it_is_json(found: Results) -> None:
    few = made_up(plan("tcg", "kvm", runs=1), {"tcg": 10.0, "kvm": 5.0})
    for each in (found, few):
        plain = json.loads(to_json(report_of(each)), parse_constant=pytest.fail)
        assert plain["rows"][0]["cells"][0]["name"] == "tcg"


def test_the_command_does_the_same_again(found: Results) -> None:
    from polyvisor.cli.main import parse

    options = parse(report_of(found).command.split()[1:])
    assert (options.targets, options.seed, options.runs) == ("tcg=tcg,kvm=kvm", 7, 8)


def test_a_difference_between_two_comparisons(found: Results) -> None:
    later = made_up(plan("kvm", "tcg", runs=8), {"tcg": 10.0, "kvm": 6.0}, seed=5)
    later = replace(later, environments={"tcg": {"kernel": "6.2", "load": "1"}})
    report = diff_of(replace(found, environments={"tcg": {"kernel": "6.1", "load": "2"}}), later)
    said = "\n".join(report.summary)
    assert "tcg, new against tcg, old: no difference shown in 3 of 3." in said
    assert "kvm, new against kvm, old: better in 2 of 3" in said
    assert report.notes == ("tcg: kernel was 6.1, and is 6.2",)
    with pytest.raises(InvalidInput, match="none of the old"):
        diff_of(found, made_up(plan("native"), {"native": 1.0}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567, "1,230,000"), (999.4, "999"), (12.345, "12.3"), (0.012345, "0.0123"), (-5432.1, "-5,430")],
)
def test_three_digits_count(value: float, text: str) -> None:
    assert figure(value) == text


def test_changes_as_people_read_them() -> None:
    def change(one: float, other: float) -> str:
        return change_of(compare([one] * 5, [other] * 5, lower_is_better=True))

    assert change(10, 11) == "+10.0 %"
    assert change(10, 9) == "−10.0 %"
    assert change(10, 45) == "× 4.5"
    assert change(0, 5) == "+5"


class TestCommand:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("POLYVISOR_HOME", str(tmp_path / "home"))

    def test_report_and_diff(self, found: Results, capsys: pytest.CaptureFixture[str]) -> None:
        write(Path("raw.json"), found)
        assert run(["compare", "report", "raw.json", "--baseline", "kvm", "--markdown", "r.md"]) == 0
        said = capsys.readouterr().out
        assert EMULATED in said and "tcg against kvm" in said
        assert Path("r.md").read_text().startswith("# Comparison of tcg, kvm")
        assert run(["compare", "report", "raw.json", "raw.json", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["rows"][0]["cells"][0]["values"]) == 16
        assert run(["compare", "diff", "raw.json", "raw.json"]) == 0
        assert "no difference shown in 3 of 3" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("compare --targets vmware", "targets: 'vmware': is not a target (there are kvm"),
            ("compare --targets xen-pv", "target 'xen-pv' is not available: this host: "),
            ("compare --targets tcg --workloads boott", "is not a workload (did you mean boot?)"),
            ("compare --targets tcg --runs 0", "runs: 0: is out of range (use 1 to 1000)"),
            ("compare --targets tcg --runs x", "runs: 'x': is not a whole number"),
            ("compare --targets tcg,tcg", "stands there twice"),
            ("compare --targets tcg@nowhere", "there is no host 'nowhere'"),
            ("compare --hosts nowhere", "there is no host 'nowhere'"),
            ("compare --targets tcg --limit 0", "limit: 0: is no time"),
            ("compare --targets tcg --warmups -1", "warmups: -1: is out of range"),
            ("compare --resume nowhere.json", "there is no file nowhere.json"),
            ("compare --resume a.json --targets tcg", "targets: 'tcg': stands beside --resume"),
            ("compare report nowhere.json", "there is no file nowhere.json"),
            ("compare report here.txt", "is not the raw data of a comparison"),
            ("compare --targets tcg -o here.txt", "there is a file here.txt already"),
            ("compare --targets native --workloads boot", "can be measured without a guest"),
        ],
    )
    def test_bad_input_is_one_line(self, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path("here.txt").write_text("no JSON")
        assert run(line.split()) in (1, 2, 3, 4, 8)
        captured = capsys.readouterr()
        assert said in captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
        assert [p.name for p in Path().iterdir() if p.suffix == ".json"] == []

    def test_the_workloads_are_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["compare", "--list"]) == 0
        assert "syscalls" in capsys.readouterr().out
        assert run(["compare", "--list", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["metrics"][0]["unit"]


class TestPage:
    def test_a_plot_has_every_value_and_says_what_it_is(self, found: Results) -> None:
        report = report_of(found)
        drawn = plot(report.rows[0], colors_of(["tcg", "kvm"]))
        root = ElementTree.fromstring(drawn)
        assert root.get("aria-label") == "a: speed in 1/s"
        circles = root.findall("circle")
        assert len(circles) == 16
        assert all(LEFT <= float(str(circle.get("cx"))) <= WIDTH - RIGHT for circle in circles)

    @given(st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), min_size=1, max_size=20))
    def test_an_axis_holds_its_values_and_has_a_few_round_ticks(self, values: list[float]) -> None:
        low, high, ticks = axis(values)
        slack = 1e-6 * max(1, *map(abs, values))
        assert low <= min(values) + slack and high >= max(values) - slack and low < high
        assert 2 <= len(ticks) <= 12

    def test_names_from_elsewhere_stay_text(self, found: Results) -> None:
        hostile = replace(found, environments={"tcg": {"<b>key": '"><script>x</script>'}}, version="<i>")
        text = page(report_of(hostile))
        assert "<script" not in text and "<b>key" not in text and "<i>" not in text
        assert "&lt;script&gt;" in text

    def test_targets_that_share_a_host_share_its_column(self, found: Results) -> None:
        text = page(report_of(replace(found, environments={"tcg": {"cpu": "A"}, "kvm": {"cpu": "A"}})))
        assert "<th>tcg, kvm</th>" in text
