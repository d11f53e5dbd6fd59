"""The reference documentation is what the code says: a setting, a verb or an error can't be left out of it."""

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from polyvisor.cli.main import VERBS
from polyvisor.spec.vm import Disk, Nic, VMSpec

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "reference.py"))


@pytest.mark.parametrize("page", ["cli.md", "spec.md", "errors.md"])
def test_a_page_is_what_the_code_says(reference: dict[str, Any], page: str) -> None:
    kept = (ROOT / "docs" / "reference" / page).read_text()
    assert kept == reference["PAGES"][page](), "run: uv run python scripts/reference.py"


def test_no_page_is_left_over(reference: dict[str, Any]) -> None:
    assert {p.name for p in (ROOT / "docs" / "reference").iterdir()} == reference["PAGES"].keys()


def test_everything_is_there(reference: dict[str, Any]) -> None:
    cli, spec, errors = (reference["PAGES"][page]() for page in ("cli.md", "spec.md", "errors.md"))
    for verb in VERBS:
        assert f"\n## polyvisor {verb}\n" in cli
    for kind in (VMSpec, Disk, Nic):
        for field in dataclasses.fields(kind):
            assert f"| `{field.name}` | " in spec
    for error in reference["all_errors"]():
        assert f"| `{error.code}` | {error.exit_status} | {error.http_status} | " in errors


def test_every_exit_status_has_a_meaning(reference: dict[str, Any]) -> None:
    assert {error.exit_status for error in reference["all_errors"]()} <= reference["STATUSES"].keys()


def test_every_variable_of_the_environment_is_told(reference: dict[str, Any]) -> None:
    read = set()
    for path in (ROOT / "polyvisor").rglob("*.py"):
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", path.read_text()))
    assert "POLYVISOR_HOME" in read
    assert read - {"PATH"} <= reference["ENVIRONMENT"].keys()


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_pages_for_people_name_verbs_and_flags_that_exist(reference: dict[str, Any], page: str) -> None:
    cli = reference["PAGES"]["cli.md"]()
    text = (ROOT / page).read_text()
    for verb in re.findall(r"(?:^|`|\$ |; )polyvisor ([a-z]+)", text, re.MULTILINE):
        assert verb in VERBS, f"{page}: polyvisor {verb}"
    for flag in re.findall(r"`polyvisor [^`\n]*?(--[a-z][a-z-]+)", text):
        assert re.search(rf"`{flag}[ `]", cli), f"{page}: {flag}"
