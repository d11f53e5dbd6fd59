"""The report of the contract's tests: a test that was left out has a reason that somebody declared."""

from __future__ import annotations

import pytest

from tests.contract_report import PROPERTY, results, table


def report(outcome: str, reason: str = "", *, target: str = "Xen PV") -> pytest.TestReport:
    return pytest.TestReport(
        nodeid="tests/lab/test_xen_contract.py::test_life",
        location=("", 0, ""),
        keywords={},
        outcome=outcome,  # type: ignore[arg-type]
        longrepr=("file", 1, f"Skipped: {reason}") if outcome == "skipped" else None,
        when="call",
        user_properties=[(PROPERTY, ["test_life", [target]])],
    )


@pytest.mark.parametrize(
    "reason",
    [
        "xen: uefi: UEFI firmware for guests of Xen is not there yet",
        "takes a minute and more on an emulated Xen: tested with POLYVISOR_TEST_ALL=1",
        "there is no lab: it was not ready within 20 minutes",
        "the lab is left out: POLYVISOR_TEST_LAB=off",
    ],
)
def test_a_declared_reason_is_a_note(reason: str) -> None:
    found = results([report("skipped", reason), report("passed", target="Xen PVH")])
    assert found == {"test_life": {"Xen PV": reason, "Xen PVH": "ok"}}
    assert f"[1] left out: {reason}" in table(found)


@pytest.mark.parametrize("reason", ["", "flaky", "xen: does not work", "NOT TESTED: no time"])
def test_any_other_is_a_failure(reason: str) -> None:
    assert results([report("skipped", reason)]) == {"test_life": {"Xen PV": "FAILED"}}


def test_the_worst_of_several_parameters_counts() -> None:
    assert results([report("failed"), report("passed")])["test_life"]["Xen PV"] == "FAILED"
