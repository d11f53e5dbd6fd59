"""tests/lab/emulation.py runs again what failed for emulation's sake, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFTEST = """
from pathlib import Path
import pytest
from tests.lab.emulation import *
from tests.lab.emulation import allow_reruns, watch

FAULTS = Path("faults")

def pytest_collection_modifyitems(items):
    allow_reruns(items)

@pytest.fixture(autouse=True, scope="session")
def watched(request):
    watch(request.config, lambda: len(FAULTS.read_text()) if FAULTS.exists() else 0)

@pytest.fixture
def shaky():
    if not Path("shaken").exists():
        Path("shaken").touch()
        FAULTS.write_text("xxx")
        raise RuntimeError("it does not boot")
"""
TESTS = """
from pathlib import Path
import pytest

def test_of_a_guest_that_died():
    if not Path("died").exists():
        Path("died").touch()
        Path("faults").write_text("x")
        pytest.fail("it does not answer")

def test_of_a_fixture_that_died(shaky):
    pass

def test_that_fails():
    with Path("calls").open("a") as calls:
        calls.write("x")
    assert not "broken"

async def test_that_waits_for_a_guest_that_died():
    if not Path("waited").exists():
        Path("waited").touch()
        Path("faults").write_text("xxxx")
        raise TimeoutError
"""


def test_what_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_guests.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nasyncio_mode = auto\npythonpath = {ROOT}\n")
    argv = [sys.executable, "-m", "pytest", "-q", "-rR", "-p", "no:cacheprovider"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert "1 failed, 3 passed, 3 rerun" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "calls").read_text() == "x", "what simply fails is not run again"
