"""Errors: stable codes, messages of one line, nothing shown at length."""

import importlib
import pkgutil
import re
import subprocess

import pytest

import polyvisor
from polyvisor import errors
from polyvisor.errors import InvalidInput, PolyvisorError, ProcessFailed, shortened

STATUSES = {
    "error": 1,
    "invalid-input": 2,
    "usage": 2,
    "image-refused": 2,
    "not-found": 3,
    "already-exists": 4,
    "busy": 5,
    "wrong-state": 6,
    "not-permitted": 7,
    "unavailable": 8,
    "storage-full": 8,
    "unsupported": 8,
    "timed-out": 9,
    "cannot-start": 1,
    "download-failed": 1,
    "process-failed": 1,
    "host-key-changed": 7,
    "host-key-unknown": 7,
    "login-refused": 7,
    "connection-lost": 8,
    "protocol": 1,
    "qmp-lost": 1,
    "qmp-refused": 1,
    "disagrees": 1,
    "not-probed": 1,
}


def all_errors() -> list[type[PolyvisorError]]:
    for module in pkgutil.walk_packages(polyvisor.__path__, "polyvisor."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, todo = [], [PolyvisorError]
    while todo:
        kind = todo.pop()
        if kind.__module__.startswith("polyvisor."):
            found.append(kind)
            todo += kind.__subclasses__()
    return found


def test_codes_and_exit_statuses_are_a_promise() -> None:
    """Programs depend on them: a change here is one for the changelog."""
    assert {kind.code: kind.exit_status for kind in all_errors()} == STATUSES


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    above = {0: "PolyvisorError"}
    for place, name in re.findall(r"^    ([│ ]*[├└])── (\w+) ", errors.__doc__ or "", re.MULTILINE):
        depth = len(place) // 4 + 1
        drawn[name] = above[depth - 1]
        above[depth] = name
    declared = {k.__name__: k.__bases__[0].__name__ for k in all_errors() if k.__module__ == errors.__name__}
    assert drawn == {name: base for name, base in declared.items() if name != "PolyvisorError"}


def test_every_code_is_of_one_error() -> None:
    codes = [kind.code for kind in all_errors()]
    assert len(codes) == len(set(codes))


def test_every_error_has_a_status_for_an_api() -> None:
    assert all(400 <= kind.http_status < 600 for kind in all_errors())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "'a'"),
        ("", "''"),
        (5, "5"),
        (None, "None"),
        ([1], "[1]"),
        ("a\nb", "'a\\nb'"),
        ("\x1b[2J", "'\\x1b[2J'"),
        ("é", "'é'"),
        ("\ud800", "'\\ud800'"),
        ("x" * 100, f"'{'x' * 59}…'"),
        (list(range(1000)), f"{repr(list(range(1000)))[:59]}…"),
    ],
)
def test_values_are_shown_on_one_line_and_short(value: object, expected: str) -> None:
    assert shortened(value) == expected


def test_numbers_that_python_does_not_print() -> None:
    assert shortened(10**5000) == "int of very many digits"
    assert len(shortened([10**5000])) < 60


def test_values_too_deep_for_python_to_print() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shortened(deep) == "list of very many levels"
    while deep:  # or Python would free it recursively
        deep = deep.pop()  # type: ignore[assignment]


def test_an_invalid_input_has_its_parts() -> None:
    error = InvalidInput("disks[0].size_gib", 0, "is out of range", hint="use 1")
    assert str(error) == error.message == "disks[0].size_gib: 0: is out of range"
    assert (error.field, error.value, error.problem, error.hint) == ("disks[0].size_gib", 0, "is out of range", "use 1")
    assert error.to_dict() == {"code": "invalid-input", "message": error.message, "hint": "use 1"}


def test_a_failed_process_without_words() -> None:
    assert ProcessFailed(["qemu-img", "info"], 4, " \n").message == "qemu-img: exit status 4"


def test_only_the_command_line_exits() -> None:
    found = subprocess.run(
        ["grep", "-rlE", r"sys\.exit|raise SystemExit", *polyvisor.__path__, "--include=*.py"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert [path for path in found if "/cli/" not in path] == []
