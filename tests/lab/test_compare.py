"""`polyvisor compare` with real guests, emulated: as a user runs it, cut off and carried on, and with a slowed target."""

from __future__ import annotations

import asyncio
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
from polyvisor.images.store import ImageStore
from polyvisor.remote.address import Hosts
from tests.faults.relay import relaying
from tests.sshd import Server
from tests.thorough import exhaustive, usually

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
    targets = ["--targets", "tcg,native", "--runs", "1", "--warmups", "0"]
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


@pytest.mark.parametrize("number", usually([signal.SIGINT, signal.SIGKILL], [signal.SIGKILL]))
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
def test_a_guest_with_a_limit_never_has_more(environment: dict[str, str], tmp_path: Path, home: Home) -> None:
    """All of QEMU is in the group, and has no more of a CPU than the limit; how slow that is, bench/ measures."""
    file = tmp_path / "raw.json"
    words = ["--targets", "half=tcg:cpu_limit=50", "--workloads", "loop,hash,spawn", "--image", "tiny"]
    process = subprocess.Popen(
        command(*words, "--runs", "1", "--warmups", "0", "-o", str(file)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: file.exists() and len(read(file).measurements) == 1, process)
    [name] = VMStore(home).names()
    pid = int((home.vms / name / "run" / "qemu.pid").read_text())
    began, had = time.monotonic(), cpu_s(pid)
    [group] = Path("/sys/fs/cgroup").glob(f"**/polyvisor-compare-{name}")
    assert (group / "cgroup.procs").read_text().split() == [str(pid)], "QEMU alone, and not who started it"
    wait_until(lambda: len(read(file).measurements) == 2, process)
    assert 0 < cpu_s(pid) - had < 0.55 * (time.monotonic() - began) + 0.1
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert not group.exists()


def cpu_s(pid: int) -> float:
    """The CPU time that a process has had so far (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_image_without_the_program_is_one_line(environment: dict[str, str], tmp_path: Path, home: Home) -> None:
    words = ["--targets", "tcg", "--workloads", "disk", "--image", "tiny", "-o", str(tmp_path / "raw.json")]
    done = compare(environment, *words)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert not (tmp_path / "raw.json").exists()
    assert "image 'tiny' lacks the program 'fio' (Debian's package fio)" in last
    assert VMStore(home).names() == []


@exhaustive
def test_features_are_what_was_seen(environment: dict[str, str], home: Home) -> None:
    done = compare(environment, "--features", "--targets", "tcg", "--json")
    assert done.returncode == 0, done.stderr
    found = {each["feature"]: (each["outcome"], each["detail"]) for each in json.loads(done.stdout)}
    assert {name for name, (outcome, _) in found.items() if outcome == "failed"} == set(), found
    for name in (
        "paravirtual devices",
        "emulated devices",
        "guests per GiB",
        "memory set at rest",
        "memory set while running",
        "vCPU added while running",
        "console through a reboot",
        "pause and resume",
        "save and restore",
    ):
        assert found[name][0] == "works", found[name]
    assert found["boot by UEFI"][0] == "not probed"
    assert found["vCPU removed while running"][0] == "not offered", "emulation can't"
    assert found["live migration"][0] == "not offered"
    assert "qemu-system-x86" in found["versions and licences"][1]
    assert VMStore(home).names() == []


def known(server: Server, home: Home, client: Path, *, port: int | None = None) -> dict[str, str]:
    """An environment in which that home is the host `loopback`, beside a home of its own."""
    Hosts(client / "hosts").add(server.entry(home.path, port=port))
    return {**os.environ, "POLYVISOR_HOME": str(client)}


@pytest.fixture
def client(empty_home: Home, image_store: ImageStore) -> Path:
    """Another home, in which is the image tiny too."""
    path = empty_home.path.with_name("client")
    path.mkdir(mode=0o711)
    (path / "images").symlink_to(image_store.path)
    return path


def test_another_host_by_ssh_and_the_host_itself(home: Home, client: Path, sshd: Server, tmp_path: Path) -> None:
    environment, file = known(sshd, home, client), tmp_path / "raw.json"
    words = ["--hosts", "loopback", "--targets", "tcg,native", "--workloads", "loop,boot,memory,save,restore"]
    done = compare(environment, *words, "--image", "tiny", "--runs", "1", "--warmups", "0", "-o", str(file))
    assert done.returncode == 0, done.stderr
    found = read(file)
    assert {target.host for target in found.plan.targets} == {"loopback"}
    assert [each.error for each in found.measurements if each.error] == []
    assert found.values("native", "loop", "loops")[0] > found.values("tcg", "loop", "loops")[0]
    assert found.values("tcg", "restore", "answer")[0] > found.values("tcg", "restore", "time")[0]
    assert found.environments["tcg"]["kernel"] == os.uname().release
    assert VMStore(home).names() == VMStore(Home(client)).names() == []


@exhaustive
async def test_a_host_that_is_lost_keeps_the_rest_and_can_be_taken_up_again(
    home: Home, client: Path, sshd: Server, tmp_path: Path
) -> None:
    file = tmp_path / "raw.json"
    words = ["--targets", "here=tcg,there=tcg@loopback", "--workloads", "loop", "--image", "tiny"]
    words += ["--runs", "3", "--warmups", "0", "-o", str(file)]
    async with relaying(sshd.port) as relay:
        sshd.know(relay.port)
        environment = known(sshd, home, client, port=relay.port)
        process = await asyncio.create_subprocess_exec(
            *command(*words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        until = time.monotonic() + 300
        while not (file.exists() and any(m.target == "there" for m in read(file).measurements)):
            assert process.returncode is None and time.monotonic() < until
            await asyncio.sleep(0.2)
    out, said = await asyncio.wait_for(process.communicate(), 600)  # the relay is gone, and nothing answers there
    assert process.returncode == 0, said.decode()
    kept = read(file)
    assert len(kept.values("here", "loop", "loops")) == 3
    assert len(kept.values("there", "loop", "loops")) < 3
    assert any(each.target == "there" and each.error for each in kept.measurements)
    assert "failed: there, loop: " in out.decode()
    environment = known(sshd, home, client)  # it is back
    done = await asyncio.to_thread(compare, environment, "--resume", str(file))
    assert done.returncode == 0, done.stderr
    assert len(read(file).values("there", "loop", "loops")) == 3
    assert VMStore(home).names() == VMStore(Home(client)).names() == []
