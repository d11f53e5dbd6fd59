"""`polyvisor compare` with real guests, emulated: as a user runs it, cut off and carried on, and with a slowed target."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polyvisor.compare.cap import cap_refusal
from polyvisor.compare.results import read
from polyvisor.home import Home
from polyvisor.host.store import VMStore

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(900)]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "polyvisor", "compare", *words]


@pytest.fixture
def environment(home: Home) -> dict[str, str]:
    return {**os.environ, "POLYVISOR_HOME": str(home.path)}


def compare(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), env=environment, capture_output=True, text=True, timeout=800, check=False)


def test_a_quick_comparison_with_the_host_itself(environment: dict[str, str], tmp_path: Path, home: Home) -> None:
    file = tmp_path / "raw.json"
    targets = ["--targets", "tcg,native", "--runs", "2", "--warmups", "0"]
    done = compare(environment, "--quick", *targets, "-o", str(file), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["errors"] == []
    medians = {
        (row["workload"], row["metric"]["name"], cell["name"]): cell["summary"]["median"]
        for row in report["rows"]
        for cell in row["cells"]
    }
    assert medians["hash", "speed", "native"] > 1.5 * medians["hash", "speed", "tcg"], "emulation costs something"
    assert 30 < medians["memory", "taken", "tcg"] < 400
    assert 0.5 < medians["boot", "login", "tcg"] < 120
    assert medians["boot", "start", "tcg"] < medians["boot", "login", "tcg"]
    assert ("boot", "login", "native") not in medians
    assert report["emulated"][0] == "tcg"
    assert report["environments"]["tcg"]["cpus"] == str(len(os.sched_getaffinity(0)))
    assert VMStore(home).names() == [], "no guest is left"
    again = compare(environment, "report", str(file))
    assert "EMULATED" in again.stdout and "too few runs to tell" in again.stdout


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while not happened():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_is_cut_off_goes_on(environment: dict[str, str], tmp_path: Path, home: Home, number: int) -> None:
    file = tmp_path / "raw.json"
    words = ["--targets", "a=tcg,b=tcg", "--workloads", "boot,loop", "--image", "tiny", "--runs", "1", "--warmups", "0"]
    process = subprocess.Popen(
        command(*words, "-o", str(file)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: file.exists() and len(read(file).measurements) == 3, process)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert f"go on: polyvisor compare --resume {file}" in said
        assert VMStore(home).names() == []
    kept = read(file).measurements
    assert len(kept) == 3
    done = compare(environment, "--resume", str(file))
    assert done.returncode == 0, done.stderr
    assert read(file).measurements[:3] == kept, "what was measured stays"
    assert len(read(file).measured()) == 4
    assert VMStore(home).names() == []


def test_a_guest_that_is_killed_costs_one_measurement(environment: dict[str, str], tmp_path: Path, home: Home) -> None:
    file = tmp_path / "raw.json"
    words = ["--targets", "tcg", "--workloads", "loop,hash,spawn", "--image", "tiny", "--runs", "1", "--warmups", "0"]
    process = subprocess.Popen(
        command(*words, "-o", str(file)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: file.exists() and len(read(file).measurements) == 1, process)
    [name] = VMStore(home).names()
    os.kill(int((home.vms / name / "run" / "qemu.pid").read_text()), signal.SIGKILL)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    measurements = read(file).measurements
    assert len(measurements) == 3
    assert [bool(each.error) for each in measurements] == [False, True, False], "the last one has a new guest"
    assert f"failed: tcg, {measurements[1].workload}: " in out
    assert VMStore(home).names() == []


@pytest.mark.skipif(cap_refusal() is not None, reason=f"no CPU limit here: {cap_refusal()}")
def test_a_guest_with_half_a_cpu_does_half_the_work(environment: dict[str, str], tmp_path: Path) -> None:
    """Roughly, on a machine that others use too; bench/ measures how nearly."""
    words = ["--targets", "full=tcg,half=tcg:cpu_limit=50", "--workloads", "loop", "--image", "tiny"]
    file = tmp_path / "raw.json"
    done = compare(environment, *words, "--runs", "3", "--warmups", "0", "-o", str(file))
    assert done.returncode == 0, done.stderr
    found = {name: sorted(read(file).values(name, "loop", "loops"))[1] for name in ("full", "half")}
    assert 0.25 < found["half"] / found["full"] < 0.8
    assert not list(Path("/sys/fs/cgroup").glob("**/polyvisor-compare-*"))


def test_an_image_without_the_program_is_one_line(environment: dict[str, str], tmp_path: Path, home: Home) -> None:
    words = ["--targets", "tcg", "--workloads", "fio", "--image", "tiny", "-o", str(tmp_path / "raw.json")]
    done = compare(environment, *words)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "image 'tiny' lacks the program 'fio' (Debian's package fio)" in last
    assert VMStore(home).names() == []
