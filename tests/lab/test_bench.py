"""The benchmarks run: two rounds of the shorter ones, with whatever peer is installed. What they measure is not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.start import BARE, FINISHED, OURS, TITLE
from polyvisor.home import Home
from tests.faults.command import ROOT

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(600)]


def test_from_command_to_guest(home: Home, tmp_path: Path) -> None:
    words = ["--only", "cli", "--only", "start", "--runs", "2", "--home", str(home.path), "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("*.json")
    benches = {bench["title"]: bench for bench in json.loads(results.read_text())["benches"]}
    cases = benches[TITLE]["cases"]
    for name in (OURS, BARE):
        assert cases[name][FINISHED]["runs"] == 2
        assert 0 < cases[name][FINISHED]["min"] <= cases[name][FINISHED]["max"]
