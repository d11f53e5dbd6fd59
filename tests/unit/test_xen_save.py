"""Saving VMs of Xen with a program in place of `xl`, which fails, dies or hangs where it is told to; and ourselves killed.

The real one is tests/lab/test_xen_save.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polyvisor.drivers.xen import dom0, driver, migration, xenctrl
from polyvisor.errors import CannotStart, PolyvisorError, TimedOut, WrongState
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.host.store import VMDirectory
from polyvisor.operation import Step, silent
from polyvisor.status import Accelerator, Capabilities, VMState
from polyvisor.waiting import pause, run
from tests.faults.launcher import Fault
from tests.thorough import EVERY
from tests.unit.xen_host import DRIVER, domains, made, start

XEN = Capabilities(
    driver="xen",
    version="4.17",
    accelerators=(Accelerator(name="xen", available=True, reason=""),),
    modes=("pv", "pvh", "hvm"),
)


@pytest.fixture
def home(xen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home on a Xen host, where Xen's libraries do what the program does."""

    def resume(domain: int) -> None:
        uuid, state, name = (xen / str(domain)).read_text().split()
        assert state.startswith("suspended")
        (xen / str(domain)).write_text(f"{uuid} {'paused' if state.endswith('paused') else 'running'} {name}")

    monkeypatch.setattr(dom0, "is_dom0", lambda: True)
    monkeypatch.setattr(xenctrl, "resume", resume)
    made_home = Home(tmp_path / "home")
    made_home.prepare()
    return made_home


def new_host(home: Home) -> Host:
    host = Host(home)
    host.drivers._capabilities = (XEN,)
    return host


@pytest.fixture
def host(home: Home) -> Host:
    return new_host(home)


@pytest.fixture
async def web(host: Host, xen: Path) -> VMDirectory:
    """A VM that runs, whose guest has counted to seven; it has a disk that a QEMU serves."""
    vm = made(host.home.vms / "web")
    vm.disks.mkdir()
    await start(vm)
    (xen / "count").write_text("7")
    return vm


def broken(xen: Path, call: str) -> None:
    (xen / "broken").write_text(call)


def mended(xen: Path) -> None:
    (xen / "broken").unlink(missing_ok=True)


async def state(host: Host) -> VMState:
    return (await host.show("web")).status.state


async def assert_whole(host: Host, xen: Path, before: VMState = VMState.RUNNING) -> None:
    """The VM is as before a save that failed: its guest was not lost, is waited for, and can reboot and be saved."""
    status = (await host.show("web")).status
    assert (status.state, status.reason) == (before, None)
    vm = host.store.get("web")
    assert not vm.saved.exists() and not (vm.path / migration.MARK).exists()
    if before is VMState.PAUSED:
        await host.resume("web")
    await host.reboot("web", timeout_s=10)
    assert (await host.show("web")).status.reason is None
    await assert_saved_and_restored(host, xen)


async def assert_saved_and_restored(host: Host, xen: Path) -> None:
    assert (await host.save("web")).state is VMState.SAVED
    assert domains(xen) == []
    (xen / "count").write_text("0")
    assert (await host.start("web")).state is VMState.RUNNING
    assert (xen / "count").read_text() == "7"
    assert len(domains(xen)) == 1
    assert not host.store.get("web").saved.exists()
    await host.kill("web")
    assert domains(xen) == [] and await state(host) is VMState.STOPPED


async def test_a_guest_goes_on_where_it_was(host: Host, web: VMDirectory, xen: Path) -> None:
    """It is waited for again: it reboots, is seen to end, and can be saved once more."""
    steps: list[Step] = []
    assert (await host.save("web", steps.append)).state is VMState.SAVED
    assert {step.phase for step in steps} == {"saving", "checking"}
    assert domains(xen) == [] and not web.alive()
    (xen / "count").write_text("0")
    steps.clear()
    started = await host.start("web", steps.append)
    assert started.state is VMState.RUNNING and {step.phase for step in steps} == {"checking", "restoring"}
    assert (xen / "count").read_text() == "7"
    await host.reboot("web", timeout_s=10)
    assert (await host.show("web")).status.pid == started.pid
    await assert_saved_and_restored(host, xen)


async def test_a_paused_guest_is_paused_again(host: Host, web: VMDirectory, xen: Path) -> None:
    await host.pause("web")
    assert (await host.save("web")).state is VMState.SAVED
    assert (await host.start("web")).state is VMState.PAUSED
    assert (await host.resume("web")).state is VMState.RUNNING
    await assert_saved_and_restored(host, xen)


async def test_the_configuration_is_the_one_of_the_save(host: Host, web: VMDirectory) -> None:
    config = (web.path / "xl.cfg").read_text()
    await host.save("web")
    (web.path / "xl.cfg").write_text("lost")
    await host.start("web")
    assert (web.path / "xl.cfg").read_text() == config
    await host.kill("web")


@pytest.mark.parametrize(
    ("call", "before"),
    [
        *(
            (call, before)
            for call in ("save", "save-fails", "save-dies")
            for before in (VMState.RUNNING, VMState.PAUSED)
        ),
        ("unpause", VMState.PAUSED),
    ],
)
async def test_a_save_that_fails_leaves_the_guest_as_it_was(
    host: Host, web: VMDirectory, xen: Path, call: str, before: VMState
) -> None:
    if before is VMState.PAUSED:
        await host.pause("web")
    broken(xen, call)
    with pytest.raises(PolyvisorError, match="was not saved") as raised:
        await host.save("web")
    assert "xl could not write its memory" in raised.value.message
    mended(xen)
    await assert_whole(host, xen, before)


async def test_xen_does_not_answer(host: Host, web: VMDirectory, xen: Path) -> None:
    broken(xen, "list")
    with pytest.raises(WrongState, match="can't be saved"):
        await host.save("web")
    mended(xen)
    await assert_whole(host, xen)


async def test_disks_are_written_before_the_memory_counts(host: Host, xen: Path) -> None:
    """Where QEMU can't be told to write what it keeps of them, the VM is not saved."""
    from tests.golden.xl_boots import XL_BOOTS

    vm = made(host.home.vms / "web")
    vm.disks.mkdir()
    await start(vm, disks=XL_BOOTS["pv-disks"].disks)
    (xen / "count").write_text("7")
    broken(xen, "qemu-monitor-command")
    with pytest.raises(PolyvisorError, match="qemu-monitor-command is broken"):
        await host.save("web")
    mended(xen)
    (xen / "calls").unlink()
    await assert_whole(host, xen)
    calls = [line for line in (xen / "calls").read_text().splitlines() if "qemu-monitor-command" in line]
    assert [line.split()[-1] for line in calls] == ["stop", "cont"]


async def test_a_full_disk(host: Host, web: VMDirectory, xen: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError) as raised:
            await DRIVER.save(web, full, silent)
    finally:
        os.close(full)
    assert raised.value.errno == errno.ENOSPC
    await assert_whole(host, xen)


async def test_an_interrupted_save(host: Host, web: VMDirectory, xen: Path) -> None:
    broken(xen, "save-slow")
    task = asyncio.ensure_future(host.save("web"))
    while not domains(xen) or "suspended" not in (xen / domains(xen)[0]).read_text():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    mended(xen)
    await assert_whole(host, xen)


async def test_a_save_that_hangs(host: Host, web: VMDirectory, xen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up; the VM is shown as what it is, and once that xl is gone, as any verb finds, it is as before."""
    monkeypatch.setattr(migration, "SILENCE_S", 0.5)
    broken(xen, "save-hangs")
    with pytest.raises(TimedOut):
        await host.save("web")
    assert (await host.show("web")).status.state is VMState.PAUSED
    with pytest.raises(TimedOut, match="still saving"):
        await host.resume("web")
    mended(xen)
    for pid in holders(web.path / migration.MARK):
        os.kill(pid, signal.SIGKILL)
    assert (await host.resume("web")).state is VMState.RUNNING
    await assert_whole(host, xen)


def holders(path: Path) -> list[int]:
    """The processes that have a file open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == path and int(link.parts[2]) != os.getpid():
                found.append(int(link.parts[2]))
    return found


async def test_kill_ends_a_save_that_was_cut_off(host: Host, web: VMDirectory, xen: Path) -> None:
    broken(xen, "save-dies")
    cut_off(host.home, "save", 30)
    assert (await host.kill("web")).state is VMState.STOPPED
    assert domains(xen) == [] and not web.alive()
    assert not (web.path / migration.MARK).exists()


def truncate(memory: Path) -> None:
    os.truncate(memory, memory.stat().st_size // 2)


def flip(memory: Path) -> None:
    data = bytearray(memory.read_bytes())
    data[len(data) // 2] ^= 0x10
    memory.write_bytes(data)


def believed(memory: Path) -> None:
    """Truncated, and the description says that this is right: xl itself has to find out."""
    import hashlib

    truncate(memory)
    description = memory.parent / "saved.json"
    state = json.loads(description.read_text())
    state |= {"size_bytes": memory.stat().st_size, "sha256": hashlib.sha256(memory.read_bytes()).hexdigest()}
    description.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("damage", "words"), [(truncate, "bytes instead of"), (flip, "checksum"), (believed, "xl: .*Record Header")]
)
async def test_damaged_memory_is_refused_and_kept(
    host: Host, web: VMDirectory, xen: Path, damage: Callable[[Path], None], words: str
) -> None:
    await host.save("web")
    files = {path: path.read_bytes() for path in web.saved.iterdir()}
    damage(web.saved / "memory")
    with pytest.raises(CannotStart, match=words) as raised:
        await host.start("web")
    assert "--fresh" in (raised.value.hint or "")
    assert await state(host) is VMState.SAVED
    assert domains(xen) == [] and not web.alive()
    for path, data in files.items():
        path.write_bytes(data)
    assert (await host.start("web")).state is VMState.RUNNING
    await assert_saved_and_restored(host, xen)


@pytest.mark.parametrize("call", ["restore", "half"])
async def test_a_restore_that_fails_or_hangs_loses_nothing(
    host: Host, web: VMDirectory, xen: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.save("web")
    monkeypatch.setattr(migration, "SILENCE_S", 0.5)
    monkeypatch.setattr(driver, "START_S", 0.5)
    broken(xen, call)
    with pytest.raises((CannotStart, TimedOut)):
        await host.start("web")
    assert await state(host) is VMState.SAVED
    assert domains(xen) == [] and not web.alive()
    mended(xen)
    monkeypatch.undo()
    monkeypatch.setattr(dom0, "is_dom0", lambda: True)


async def test_an_older_xen_is_refused(host: Host, web: VMDirectory, xen: Path) -> None:
    await host.save("web")
    description = web.saved / "saved.json"
    kept = description.read_text()
    description.write_text(kept.replace('"version": "4.17', '"version": "4.20'))
    with pytest.raises(CannotStart, match=r"saved on Xen 4\.20"):
        await host.start("web")
    description.write_text(kept)
    assert (await host.start("web")).state is VMState.RUNNING
    await host.kill("web")


# Killed ourselves


def cut_off(home: Home, verb: str, step: int) -> bool:
    """Let a process of its own do `verb`, killed at its step number `step`; returns whether it was."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            host = new_host(home)
            sys.addaudithook(Fault("kill", step, str(home.path)))
            run(host.save("web") if verb == "save" else host.start("web"))
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


@pytest.mark.parametrize("before", [VMState.RUNNING, VMState.PAUSED])
async def test_killed_at_each_step_of_a_save(host: Host, web: VMDirectory, xen: Path, before: VMState) -> None:
    """The VM is there, or saved, and the same command brings it to its end; what its user had paused stays paused."""
    if before is VMState.PAUSED:
        await host.pause("web")
    step, steps = 1, 0
    while cut_off(host.home, "save", step):
        assert await state(host) in (before, VMState.PAUSED, VMState.SAVED), step
        assert (await host.save("web")).state is VMState.SAVED, step
        assert domains(xen) == [], step
        (xen / "count").write_text("0")
        assert (await host.start("web")).state is before, step
        assert ((xen / "count").read_text(), len(domains(xen))) == ("7", 1), step
        step, steps = step + EVERY, steps + 1
    assert steps >= 30 // EVERY
    await host.kill("web")


async def test_killed_at_each_step_of_a_save_then_resumed(host: Host, web: VMDirectory, xen: Path) -> None:
    step = 1
    while cut_off(host.home, "save", step):
        if await state(host) is not VMState.SAVED:
            assert (await host.resume("web")).state is VMState.RUNNING, step
            assert not web.saved.exists(), step
            await pause(0.1)
            await host.reboot("web", timeout_s=10)
            status = (await host.show("web")).status
            assert (status.state, status.reason) == (VMState.RUNNING, None), step
        else:
            await host.start("web")
        step += EVERY
    await host.kill("web")


async def test_killed_at_each_step_of_a_restore(host: Host, web: VMDirectory, xen: Path) -> None:
    step = 1
    while True:
        await host.save("web")
        (xen / "count").write_text("0")
        if not cut_off(host.home, "start", step):
            break
        assert await state(host) in (VMState.SAVED, VMState.PAUSED, VMState.RUNNING), step
        assert (await host.start("web")).state is VMState.RUNNING, step
        assert ((xen / "count").read_text(), len(domains(xen))) == ("7", 1), step
        assert not list(web.saved.glob("*")), step
        step += EVERY
    assert step >= 25
    await host.kill("web")
