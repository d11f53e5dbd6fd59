"""Forks that are cut off: `kill -9` at every step, a full disk, a QEMU that dies, five commands at once.

The source runs on, or is shown to be paused and goes on when told to; what is left of a fork can be removed, and the same
command again makes it whole. No second QEMU stays.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polyvisor.drivers.qemu.agent import heard, tell
from polyvisor.host.identity import told_again
from polyvisor.spec.vm import VMSpec
from tests.contract.guest import BOOT_S, guest
from tests.faults.command import Done, Launcher, Polyvisor, assert_nothing_left, finish, processes, qemus
from tests.faults.test_concurrency import at_once
from tests.faults.test_crash_points import Walk, launchers, walked
from tests.thorough import THOROUGH

__all__ = ["launchers"]

pytestmark = pytest.mark.qemu

FORK = ("fork", "vm", "copy")
DISK = ("--disk", "1G")
# A walk takes each step, or each 23rd: a fork is many steps, and each costs two or three of them.
STEPS = 1 if THOROUGH else 23
WALKS = [(source, then) for source in ("running", "paused") for then in ("fork", "rm", "resume", "save")]


def states(home: Launcher | Polyvisor) -> dict[str, str]:
    return {status.name: status.state.value for status in asyncio.run(home.host().vms())}


def alone(home: Path, *pids: int) -> None:
    """No process of the home is left but those of its VMs; one that is being killed has a moment."""
    deadline = time.monotonic() + 5
    while (left := set(processes(home)) - set(pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"processes left: {processes(home)}"


def vm_pids(home: Launcher | Polyvisor) -> list[int]:
    return [status.pid for status in asyncio.run(home.host().vms()) if status.pid is not None]


def looks_right(launcher: Launcher | Polyvisor, source: str) -> dict[str, str]:
    """What is listed after a kill: the source runs, or is paused and it is said why; nothing works beside VMs."""
    listed = {status.name: status for status in asyncio.run(launcher.host().vms())}
    assert set(listed) <= {"vm", "copy"}, listed
    assert listed["vm"].state.value in (source, "paused"), listed
    if listed["vm"].state.value != source:
        assert listed["vm"].reason is not None and "polyvisor resume" in listed["vm"].reason, listed
    alone(launcher.home, *vm_pids(launcher))
    return {name: status.state.value for name, status in listed.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "then"), WALKS if THOROUGH else [("running", "fork"), ("paused", "save")])
def test_killed_at_every_step(launchers: list[Launcher], source: str, then: str) -> None:
    for launcher in launchers:
        launcher.good("run", "tiny", "--name", "vm", *DISK)
        if source == "paused":
            launcher.good("pause", "vm")

    def step(launcher: Launcher, number: int) -> Done:
        done = launcher(*FORK, fault="kill", step=number)
        assert done.killed or done.finished, done
        found = looks_right(launcher, source)
        if then == "fork":
            again = launcher(*FORK)
            # Where the killed command had made the fork, it is there.
            assert again.ok or (again.status == 4 and found.get("copy") == source), again
            assert states(launcher) == {"vm": source, "copy": source}
        elif then == "resume" and source == "running":
            launcher.good("resume", "vm")
            time.sleep(0.1)
            assert states(launcher)["vm"] == "running", "a copy that was cut off has stopped it after all"
        elif then == "save":
            launcher.good("save", "vm")
            launcher.good("start", "vm")
            assert states(launcher)["vm"] == source
        launcher.good("rm", "--force", "copy")
        if states(launcher)["vm"] != source:
            launcher.good("resume", "vm")
        alone(launcher.home, *vm_pids(launcher))
        return done

    every = STEPS if then == "fork" else STEPS * (1 if THOROUGH else 2)
    walked(f"fork of a {source} VM, then {then}", Walk(launchers, step, every=every).walk(), at_least=60 // every)
    for launcher in launchers:
        launcher.good("rm", "--force", "vm")
        assert_nothing_left(launcher.home)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["interrupt", "ENOSPC"])
def test_undone(launchers: list[Launcher], fault: str) -> None:
    """Ctrl-C, or a disk that is full from each step on: the fork is there as a whole or not at all, and the source runs."""
    for launcher in launchers:
        launcher.good("run", "tiny", "--name", "vm", *DISK)

    def step(launcher: Launcher, number: int) -> Done:
        done = launcher(*FORK, fault=fault, step=number)
        assert "Traceback" not in done.err, done.err
        if fault == "ENOSPC" and not done.ok:
            assert "no space left" in done.error_line().lower() or "disk is full" in done.err
        found = states(launcher)
        assert found["vm"] == "running", done
        assert found.get("copy") in (None, "running") if done.ok or fault == "interrupt" else "copy" not in found, done
        alone(launcher.home, *vm_pids(launcher))
        if "copy" in found:
            launcher.good("rm", "--force", "copy")
        return done

    walked(
        f"fork, {fault}",
        Walk(launchers, step, every=STEPS).walk(),
        at_least=(10 if fault != "interrupt" else 40) // STEPS + 1,
    )
    for launcher in launchers:
        launcher.good("rm", "--force", "vm")
        assert_nothing_left(launcher.home)


def when(condition: Callable[[], bool], process: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.fixture
def fork_with_its_own_memory(polyvisor: Polyvisor) -> Polyvisor:
    """A VM `vm` whose memory its QEMU does not share: so another fork takes a second QEMU, and some time."""
    polyvisor.good("run", "tiny", "--name", "first", *DISK, "--memory", "512M")
    polyvisor.good("fork", "first", "vm")
    polyvisor.good("rm", "--force", "first")
    return polyvisor


def test_source_killed_while_it_is_copied(fork_with_its_own_memory: Polyvisor) -> None:
    polyvisor = fork_with_its_own_memory
    [pid] = qemus(polyvisor.home)
    process = polyvisor.start(*FORK)
    when((polyvisor.home / "vms/vm/run/template.sock").exists, process)
    os.kill(pid, signal.SIGKILL)
    done = finish(FORK, process)
    assert "'vm' was not forked" in done.error_line()
    assert polyvisor.states() == {"vm": "crashed"}
    alone(polyvisor.home)
    polyvisor.good("start", "vm")
    polyvisor.good(*FORK)
    assert polyvisor.states() == {"vm": "running", "copy": "running"}
    polyvisor.good("rm", "--force", "--all")
    assert_nothing_left(polyvisor.home)


def test_second_qemu_killed(fork_with_its_own_memory: Polyvisor) -> None:
    """What receives the memory dies: the source runs on, and nothing is made."""
    polyvisor = fork_with_its_own_memory
    before = qemus(polyvisor.home)
    process = polyvisor.start(*FORK)
    when((polyvisor.home / "vms/vm/run/template.sock").exists, process)
    for pid in set(qemus(polyvisor.home)) - set(before):
        os.kill(pid, signal.SIGKILL)
    done = finish(FORK, process)
    assert "'vm' was not forked" in done.error_line()
    assert polyvisor.states() == {"vm": "running"}
    assert qemus(polyvisor.home) == before
    assert not (polyvisor.home / "vms/vm/forking").exists(), "if the user pauses it now, that is no cut-off fork"
    polyvisor.good(*FORK)
    polyvisor.good("rm", "--force", "--all")
    assert_nothing_left(polyvisor.home)


def test_disk_full(small: Polyvisor) -> None:
    """Forks need little of it, but some: where that is not there, none is made."""
    small.good("run", "tiny", "--name", "vm")
    filler = small.home / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass
    done = small(*FORK)
    assert "disk is full" in done.error_line() or "No space left" in done.err
    assert small.states() == {"vm": "running"}
    filler.unlink()
    small.good(*FORK)
    assert small.states() == {"vm": "running", "copy": "running"}
    small.good("rm", "--force", "--all")
    assert_nothing_left(small.home)


async def test_a_fork_that_is_told_again_renews_itself_once(polyvisor: Polyvisor) -> None:
    """One that is slow is told again before it has answered; its SSH server, which answers by then, must stay."""
    host = polyvisor.host()
    await host.run(VMSpec(name="vm", image="tiny"))
    await host.wait_for_ssh("vm", timeout_s=BOOT_S)
    await host.pause("vm")
    await host.fork("vm", ["copy"])
    vm = host.store.get("copy")
    told = told_again(vm)
    assert told.endswith(b"\n"), "it runs not yet, and can't have answered"
    await host.resume("copy")
    await host.wait_for_ssh("copy", timeout_s=BOOT_S)
    servers = "cat /run/dropbear.pid; hostname"
    before = await guest(host, "copy", servers)
    tell(vm, told)
    answer = b""
    async with asyncio.timeout(BOOT_S):
        while b"polyvisor-renewed" not in answer:
            await asyncio.sleep(0.05)
            answer += heard(vm)
    assert await guest(host, "copy", servers) == before
    polyvisor.good("rm", "--force", "--all")
    assert_nothing_left(polyvisor.home)


def test_five_forks_at_once(polyvisor: Polyvisor) -> None:
    """Each makes its own, one after the other; one name is given once."""
    polyvisor.good("run", "tiny", "--name", "vm", *DISK)
    names = [f"copy-{i}" for i in range(5)]
    assert all(done.ok for done in at_once(polyvisor, [("fork", "vm", name) for name in names]))
    assert polyvisor.states() == dict.fromkeys(["vm", *names], "running")
    done = at_once(polyvisor, [("fork", "vm", "same")] * 3)
    assert sorted(one.status for one in done) == [0, 4, 4]
    assert len(qemus(polyvisor.home)) == 7
    polyvisor.good("rm", "--force", "--all")
    assert_nothing_left(polyvisor.home)
