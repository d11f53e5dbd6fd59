"""What workloads read from the output of the real programs: captured in a guest of image bench (Debian 12), emulated."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest

from polyvisor.compare.machine import Native
from polyvisor.compare.place import shell_of
from polyvisor.compare.target import parse_target
from polyvisor.compare.workload import Script, all_workloads
from polyvisor.errors import PolyvisorError, ProcessFailed, Unsupported
from polyvisor.host.host import Host
from tests.unit.compared import Fake, script

CAPTURED = Path(__file__).parents[1] / "captured" / "compare"
SCRIPTS = {name: each for name, each in all_workloads().items() if isinstance(each, Script)}
SAID = {path.stem: path.read_text() for path in sorted(CAPTURED.glob("*.txt"))}
# What is counted and timed by our own scripts is printed by them.
SAID |= {"loop": "1000 5.10 7.10\n", "spawn": "200 5.10 7.10\n", "hash": "16 150\n", "pipe": "64 128\n"}
SAID["compile"] = "100.50 163.25\n"
SAID["syscalls"] = "5.10 7.10\n1194394+0 records in\n1194393+0 records out\n611529216 bytes (583.2MB) copied\n"
EXPECTED = {
    "loop": {"loops": 500.0},
    "spawn": {"programs": 100.0},
    "syscalls": {"calls": 1194393.0},
    "hash": {"speed": 16 / 1.5},
    "pipe": {"speed": 50.0},
    "cpu": {"one": 171.10, "every": 336.14},
    "crypto": {"aes": 18305169.54 / (1 << 20), "sha": 28303576.72 / (1 << 20)},
    "faults": {"rounds": 275.99},
    "switches": {"switches": 294.16},
    "compile": {"time": 62.75},
    "bandwidth": {"write": 1005.74, "read": 1605.13, "random": 5.20},
    "database": {"transactions": 1.704478, "latency": 2346.759},
    "web": {"requests": 44.23, "p99": 749.74},
    "timer": {"average": 673.0, "p99": 8047.0, "max": 40057.0},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_metric_is_in_what_the_programs_print(name: str) -> None:
    found = SCRIPTS[name].read(SAID[name])
    assert found.keys() == {metric.name for metric in SCRIPTS[name].metrics}
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert found == pytest.approx(EXPECTED.get(name, found))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("said", ["", "sh: not found", "{}", "0 0", "0 0 0"])
async def test_what_says_nothing_is_an_error_that_quotes_it(name: str, said: str) -> None:
    machine = Fake(parse_target("tcg"), answer=lambda _: said)
    with pytest.raises(PolyvisorError, match="can't be read"):
        await SCRIPTS[name].measure(machine)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_one_for_a_plain_shell(name: str) -> None:
    for text in (SCRIPTS[name].script, SCRIPTS[name].prepare, SCRIPTS[name].prepare_peer):
        subprocess.run(["sh", "-n", "-c", text], check=True)


async def test_what_is_prepared_once_is_prepared_before() -> None:
    machine = Fake(parse_target("tcg"))
    await script("a", prepare="begin").measure(machine)
    await script("b", prepare="begin", prepare_peer="listen").measure(machine)
    assert machine.log == ["prepare a", "a", "prepare peer of b", "prepare b", "b"]


class TestTheHostItself:
    @pytest.fixture
    def native(self) -> Native:
        return Native(parse_target("native"), shell_of(Host("/nowhere")), "test")

    async def test_a_script_runs_on_it(self, native: Native) -> None:
        assert await native.run("echo $((6 * 7))", timeout_s=10) == "42\n"
        with pytest.raises(ProcessFailed, match="no luck"):
            await native.run("echo no luck >&2; false", timeout_s=10)

    async def test_programs_that_it_lacks(self, native: Native) -> None:
        assert await native.lacking(["sh", "no-such-program", "ls"]) == ["no-such-program"]
        assert await native.lacking([]) == []

    async def test_what_is_prepared_is_prepared_once(self, native: Native, tmp_path: Path) -> None:
        for _ in range(3):
            await native.prepared("x", f"echo x >>{tmp_path}/log")
        assert (tmp_path / "log").read_text() == "x\n"

    async def test_it_has_no_life_of_a_guest(self, native: Native) -> None:
        for ask in (native.time_of("boot"), native.memory_mib(), native.prepared_peer("x", "y")):
            with pytest.raises(Unsupported):
                await ask
