"""`kill -9` of the command line at every step of its verbs: nothing is lost, nothing is left, and the same again succeeds.

Each verb is walked: it is killed at its first step, at its second, and so on until it comes to its end unharmed (see
`launcher`). After every kill the list of VMs must make sense, the same command must succeed, and the VM's disk must hold
what was written on it before. `run`, `start`, `stop`, `rm`, `save` and the start of what was saved are walked step by step; of
what is repeated in other ways after the same kills, and takes longest, each ninth step (see `tests.thorough`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import os
import random
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polyvisor.drivers.qemu.programs import find_uefi
from polyvisor.errors import NotFound, Unavailable
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.spec.vm import Disk, Firmware, Mode, VMSpec
from tests.conftest import with_images
from tests.faults.command import Done, Launcher, Polyvisor, assert_nothing_left, end_all, finish, qemus
from tests.thorough import EVERY, THOROUGH

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

RUN = ("run", "still", "--name", "vm", "--disk", "1G")
WORKERS = 2
SENSIBLE = {"running", "paused", "saved", "stopped", "crashed"}
MARKER = "0x5a"
KEYS = {"id_ed25519", "id_ed25519.pub", "reserve"}  # the last is the next VM's host key


class Walk:
    """Walks a command through its steps, in several homes at a time: `step` gets a launcher and the step's number.

    It returns what came of the disturbed command; the walk ends with the first one that came to its end. It begins with step
    number `first`, and takes each `every`th.
    """

    def __init__(
        self, launchers: list[Launcher], step: Callable[[Launcher, int], Done], *, first: int = 1, every: int = 1
    ) -> None:
        self._launchers, self._step = launchers, step
        self._numbers = itertools.count(first, every)
        self._lock = threading.Lock()

    def walk(self) -> int:
        """The number of steps walked."""
        with ThreadPoolExecutor(len(self._launchers)) as pool:
            return sum(pool.map(self._worker, self._launchers))

    def _worker(self, launcher: Launcher) -> int:
        walked = 0
        while True:
            with self._lock:
                number = next(self._numbers)
            try:
                done = self._step(launcher, number)
            except AssertionError as error:
                raise AssertionError(f"step {number}: {error}") from error
            if done.finished:
                return walked
            walked += 1


@pytest.fixture
def launchers(home: Home) -> Iterator[list[Launcher]]:
    """A launcher for each of several homes, so that several steps can be walked at a time."""
    found = [Launcher(home.path), *(Launcher(_sibling(home.path, i)) for i in range(1, WORKERS))]
    yield found
    for launcher in found:
        launcher.close()
        end_all(launcher.home)


def _sibling(home: Path, number: int) -> Path:
    path = home.with_name(f"home{number}")
    Home(path).prepare()
    with_images(path, (home / "images").readlink())
    return path


def qemu_io(launcher: Polyvisor | Launcher, *commands: str) -> str:
    disk = launcher.home / "vms/vm/disks/disk0.qcow2"
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words, str(disk)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout


def mark(launcher: Launcher) -> None:
    """Write what must not get lost onto the disk of the VM, which must not be running."""
    qemu_io(launcher, f"write -q -P {MARKER} 1M 64k", "flush")


def assert_marked(launcher: Polyvisor | Launcher) -> None:
    said = qemu_io(launcher, f"read -P {MARKER} 1M 64k")
    assert "Pattern verification failed" not in said, said
    check = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", str(launcher.home / "vms/vm/disks/disk0.qcow2")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode in (0, 3), check  # 3: leaked clusters waste space, and nothing else


def assert_sensible(launcher: Polyvisor | Launcher) -> str | None:
    """The state of the VM as it is listed, None where there is none; nothing else is listed."""
    states = {status.name: status.state.value for status in asyncio.run(launcher.host().vms())}
    assert set(states) <= {"vm"}, states
    assert set(states.values()) <= SENSIBLE, states
    assert len(qemus(launcher.home)) == (states.get("vm") in ("running", "paused")), states
    return states.get("vm")


def remove(launcher: Polyvisor | Launcher) -> None:
    """`rm --force` removes the VM, or what is left of it, wholly."""
    with contextlib.suppress(NotFound):
        asyncio.run(launcher.host().remove("vm", force=True))
    assert_nothing_left(launcher.home)


def create(launcher: Launcher) -> None:
    """A new VM, with something on its disk."""
    asyncio.run(launcher.host().create(VMSpec(name="vm", image="still", disks=(Disk(size_gib=1),))))
    mark(launcher)


def start(launcher: Polyvisor | Launcher) -> None:
    asyncio.run(launcher.host().start("vm"))


def test_run(launchers: list[Launcher]) -> None:
    def step(launcher: Launcher, number: int) -> Done:
        done = launcher(*RUN, fault="kill", step=number)
        assert done.killed or done.finished, done
        state = assert_sensible(launcher)
        before = qemus(launcher.home)
        if state == "stopped":
            mark(launcher)
        launcher.good(*RUN)
        assert assert_sensible(launcher) == "running"
        assert not before or before == qemus(launcher.home), "a second process was started"
        if state == "stopped":
            asyncio.run(launcher.host().kill("vm"))
            assert_marked(launcher)
        remove(launcher)
        return done

    walked("run", Walk(launchers, step).walk(), at_least=45)


def test_run_then_remove(launchers: list[Launcher]) -> None:
    """Whatever a killed `run` leaves, `rm --force` removes it, without the `run` being repeated."""

    def step(launcher: Launcher, number: int) -> Done:
        done = launcher(*RUN, fault="kill", step=number)
        launcher.good("rm", "--force", "vm")
        assert_nothing_left(launcher.home)
        return done

    walked("run, then rm --force", Walk(launchers, step).walk(), at_least=45)


@pytest.mark.parametrize("words", [("rm", "vm"), RUN], ids=["home", "keys"])
def test_first_command(launchers: list[Launcher], words: tuple[str, ...]) -> None:
    """The very first command makes the home, its keys and its caches; the strictest umask must not spoil them."""
    images = (launchers[0].home / "images").readlink()

    def step(launcher: Launcher, number: int) -> Done:
        launcher.umask, launcher.home = 0o077, Path(launcher.home.parent, f"fresh{number}")
        if words == RUN:
            Home(launcher.home).prepare()
            shutil.rmtree(launcher.home / "keys")
            with_images(launcher.home, images)
        done = launcher(*words, fault="kill", step=number)
        assert_sensible(launcher)
        launcher("rm", "--force", "vm")
        with_images(launcher.home, images)
        launcher.good(*RUN)
        assert assert_sensible(launcher) == "running"
        remove(launcher)
        assert stat.S_IMODE((launcher.home / "keys").stat().st_mode) == 0o700
        assert {path.name for path in (launcher.home / "keys").iterdir()} <= KEYS
        shutil.rmtree(launcher.home)
        return done

    every = 1 if words[0] == "rm" else EVERY  # `run` makes what it needs as above, but for the keys
    at_least = 8 if words[0] == "rm" else 55 // every
    walked(f"first {words[0]}", Walk(launchers, step, every=every).walk(), at_least=at_least)


def test_stop(launchers: list[Launcher]) -> None:
    for launcher in launchers:
        create(launcher)

    def step(launcher: Launcher, number: int) -> Done:
        start(launcher)
        done = launcher("stop", "vm", "--timeout", "0", fault="kill", step=number)
        assert assert_sensible(launcher) in ("running", "stopped")
        launcher.good("stop", "vm", "--timeout", "0")
        assert assert_sensible(launcher) == "stopped"
        assert_marked(launcher)
        return done

    walked("stop", Walk(launchers, step).walk(), at_least=8)
    for launcher in launchers:
        remove(launcher)


def test_stop_by_signal(launchers: list[Launcher]) -> None:
    """The way of `stop` where QEMU does not listen: signals, at last the one that can't be refused."""
    for launcher in launchers:
        create(launcher)

    def step(launcher: Launcher, number: int) -> Done:
        start(launcher)
        (launcher.home / "vms/vm/run/qmp.sock").unlink()
        done = launcher("stop", "vm", "--timeout", "0", fault="kill", step=number)
        assert assert_sensible(launcher) in ("running", "stopped", "crashed")
        launcher.good("stop", "vm", "--timeout", "0")
        assert_marked(launcher)
        return done

    walked("stop by signal", Walk(launchers, step).walk(), at_least=8)
    for launcher in launchers:
        remove(launcher)


def test_start(launchers: list[Launcher]) -> None:
    for launcher in launchers:
        create(launcher)

    def step(launcher: Launcher, number: int) -> Done:
        done = launcher("start", "vm", fault="kill", step=number)
        assert assert_sensible(launcher) in ("running", "stopped")
        launcher.good("start", "vm")
        assert assert_sensible(launcher) == "running"
        asyncio.run(launcher.host().kill("vm"))
        assert_marked(launcher)
        return done

    walked("start", Walk(launchers, step).walk(), at_least=20)
    for launcher in launchers:
        remove(launcher)


def test_set(launchers: list[Launcher]) -> None:
    """A `set` that was cut off is in force, or pending; the same again completes it."""
    spec = VMSpec(name="vm", image="tiny", disks=(Disk(size_gib=1),), memory_mib=160, memory_max_mib=224)
    launchers = launchers if THOROUGH else launchers[:1]  # its guest has to take part, and so to boot
    for launcher in launchers:
        asyncio.run(launcher.host().run(spec))
        asyncio.run(launcher.host().wait_for_ssh("vm", timeout_s=120))

    def step(launcher: Launcher, number: int) -> Done:
        before = asyncio.run(launcher.host().show("vm")).spec
        memory_mib, affinity = (200, "0") if before.memory_mib == 160 else (160, "all")
        wanted = dataclasses.replace(before, memory_mib=memory_mib, cpu_affinity=affinity)
        words = ("set", "vm", "--memory", str(memory_mib), "--cpu-affinity", affinity)
        done = launcher(*words, fault="kill", step=number)
        assert assert_sensible(launcher) == "running"
        assert asyncio.run(launcher.host().show("vm")).spec in (before, wanted)
        launcher.good(*words)
        details = asyncio.run(launcher.host().show("vm"))
        assert (details.spec, details.pending, details.status.memory_mib) == (wanted, (), memory_mib)
        assert details.usage is not None and details.usage.memory_mib == memory_mib
        return done

    walked("set", Walk(launchers, step, every=EVERY).walk(), at_least=10 // EVERY)
    for launcher in launchers:
        remove(launcher)


def test_save(launchers: list[Launcher]) -> None:
    """A VM whose `save` was cut off is alive, or saved; saved again and started it goes on, and its disk is whole."""
    for launcher in launchers:
        create(launcher)
        start(launcher)

    def step(launcher: Launcher, number: int) -> Done:
        [before] = qemus(launcher.home)
        done = launcher("save", "vm", fault="kill", step=number)
        state = assert_sensible(launcher)
        assert state in ("running", "paused", "saved")
        assert state == "saved" or qemus(launcher.home) == [before], "it was not saved, and is not there"
        launcher.good("save", "vm")
        assert assert_sensible(launcher) == "saved"
        launcher.good("start", "vm")
        assert assert_sensible(launcher) == "running", "it was not paused before"
        assert not (launcher.home / "vms/vm/saved").exists()
        return done

    walked("save", Walk(launchers, step, first=min(3, EVERY), every=EVERY).walk(), at_least=35 // EVERY)
    for launcher in launchers:
        asyncio.run(launcher.host().kill("vm"))
        assert_marked(launcher)
        remove(launcher)


def test_save_then_resume(launchers: list[Launcher]) -> None:
    """What a `save` that was cut off has left is deleted before the guest goes on, and never counts again."""
    for launcher in launchers:
        create(launcher)

    def step(launcher: Launcher, number: int) -> Done:
        start(launcher)
        done = launcher("save", "vm", fault="kill", step=number)
        if assert_sensible(launcher) != "saved":
            launcher.good("resume", "vm")
            assert not (launcher.home / "vms/vm/saved").exists()
            assert assert_sensible(launcher) == "running"
            time.sleep(0.2)
            assert assert_sensible(launcher) == "running", "the save has stopped it after all"
            asyncio.run(launcher.host().kill("vm"))
            assert assert_sensible(launcher) == "stopped"
        return done

    walked("save, then resume", Walk(launchers, step, first=min(2, EVERY), every=EVERY).walk(), at_least=35 // EVERY)
    for launcher in launchers:
        remove(launcher)


def test_save_of_a_paused_vm(launchers: list[Launcher]) -> None:
    """What the user had paused stays paused, wherever the save was cut off."""
    for launcher in launchers:
        create(launcher)
        start(launcher)
        asyncio.run(launcher.host().pause("vm"))

    def step(launcher: Launcher, number: int) -> Done:
        done = launcher("save", "vm", fault="kill", step=number)
        assert assert_sensible(launcher) in ("paused", "saved")
        launcher.good("save", "vm")
        launcher.good("start", "vm")
        assert assert_sensible(launcher) == "paused"
        return done

    walked("save of a paused VM", Walk(launchers, step, every=EVERY).walk(), at_least=35 // EVERY)
    for launcher in launchers:
        remove(launcher)


@pytest.mark.parametrize("again", ["start", "stop", "kill", "start --fresh"])
def test_restore(launchers: list[Launcher], again: str) -> None:
    """A restore that was cut off leaves the VM saved, or with all of its memory; the next command is not confused by it."""
    for launcher in launchers:
        create(launcher)
        start(launcher)

    def step(launcher: Launcher, number: int) -> Done:
        start(launcher)
        asyncio.run(launcher.host().save("vm"))
        done = launcher("start", "vm", fault="kill", step=number)
        state = assert_sensible(launcher)
        assert state in ("saved", "paused", "running")
        saved = (launcher.home / "vms/vm/saved/memory").exists()
        verb, *flags = again.split()
        launcher.good(verb, *flags, "vm", *(["--timeout", "0"] if verb == "stop" else []))
        after = assert_sensible(launcher)
        if verb == "start":
            assert after == "running"
            assert not list((launcher.home / "vms/vm").glob("saved/*"))
        else:
            assert after == ("saved" if saved else "stopped")
        return done

    first = min(2, EVERY) if again == "start" else 1
    walk = Walk(launchers, step, first=first, every=EVERY)
    walked(f"start of a saved VM, then {again}", walk.walk(), at_least=30 // EVERY)
    for launcher in launchers:
        asyncio.run(launcher.host().start("vm", fresh=True))
        asyncio.run(launcher.host().kill("vm"))
        assert_marked(launcher)
        remove(launcher)


@pytest.mark.parametrize("words", [("save", "vm"), ("start", "vm")])
def test_interrupted_save_and_restore(launchers: list[Launcher], words: tuple[str, ...]) -> None:
    """Ctrl-C: a save leaves the VM running as before, or saved; a restore leaves it saved, or running."""
    for launcher in launchers:
        create(launcher)

    def step(launcher: Launcher, number: int) -> Done:
        start(launcher)
        if words[0] == "start":
            asyncio.run(launcher.host().save("vm"))
        done = launcher(*words, fault="interrupt", step=number)
        assert done.finished or done.status in (0, 130), done
        assert "Traceback" not in done.err, done.err
        assert assert_sensible(launcher) in ("running", "saved"), done
        return done

    walked(f"interrupted {words[0]}", Walk(launchers, step, every=EVERY).walk(), at_least=30 // EVERY)
    for launcher in launchers:
        remove(launcher)


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_storage_fails_in_save(launchers: list[Launcher], fault: str) -> None:
    """From each step on nothing can be written: one line says so, and the VM runs on."""
    for launcher in launchers:
        create(launcher)

    def step(launcher: Launcher, number: int) -> Done:
        start(launcher)
        done = launcher("save", "vm", fault=fault, step=number)
        if not done.ok:
            assert os.strerror(getattr(errno, fault)).lower() in done.error_line().lower() or "disk is full" in done.err
            assert assert_sensible(launcher) == "running"
            assert not (launcher.home / "vms/vm/saved").exists()
        return done

    walked(f"save, {fault}", Walk(launchers, step).walk(), at_least=5)
    for launcher in launchers:
        remove(launcher)


def test_first_start_with_uefi(empty_home: Home, tmp_path: Path) -> None:
    """The first start copies the firmware's variables, which must be the VM's own wherever it was cut off."""
    try:
        find_uefi()
    except Unavailable as error:
        pytest.skip(f"NOT TESTED: crash points of VMs with UEFI: {error.message}: {error.hint}")
    disk = tmp_path / "blank.raw"
    disk.write_bytes(bytes(510) + b"\x55\xaa" + bytes((1 << 20) - 512))
    asyncio.run(Host(empty_home).image_import(str(disk), name="blank"))
    launcher = Launcher(empty_home.path)

    def step(launcher: Launcher, number: int) -> Done:
        asyncio.run(launcher.host().create(VMSpec(name="vm", image="blank", mode=Mode.HVM, firmware=Firmware.UEFI)))
        done = launcher("start", "vm", fault="kill", step=number)
        assert assert_sensible(launcher) in ("running", "stopped")
        launcher.good("start", "vm")
        assert assert_sensible(launcher) == "running"
        remove(launcher)
        return done

    try:
        walked("first start with UEFI", Walk([launcher], step).walk(), at_least=25)
    finally:
        launcher.close()


@pytest.mark.parametrize("alive", [True, False])
def test_rm(launchers: list[Launcher], alive: bool) -> None:
    """A VM whose removal was cut off is there with its whole disk, or gone; nothing between."""
    words = ("rm", "--force", "vm") if alive else ("rm", "vm")

    def step(launcher: Launcher, number: int) -> Done:
        create(launcher)
        if alive:
            start(launcher)
        done = launcher(*words, fault="kill", step=number)
        state = assert_sensible(launcher)
        assert state in ("running", "stopped", None)
        if state == "stopped":
            assert_marked(launcher)
        again = launcher(*words)
        # Without --force, a VM that the killed command has removed to the last file is not found.
        assert again.ok or (state is None and again.status == NotFound.exit_status), again
        assert_nothing_left(launcher.home)
        return done

    walked(" ".join(words), Walk(launchers, step).walk(), at_least=15)


def test_rm_then_run(launchers: list[Launcher]) -> None:
    """After a removal that was cut off, the name is free for a new VM, or the old one is there still."""

    def step(launcher: Launcher, number: int) -> Done:
        create(launcher)
        done = launcher("rm", "vm", fault="kill", step=number)
        state = assert_sensible(launcher)
        launcher.good(*RUN)
        asyncio.run(launcher.host().kill("vm"))
        if state is not None:
            assert_marked(launcher)
        remove(launcher)
        return done

    walked("rm, then run", Walk(launchers, step).walk(), at_least=15)


def test_interrupted_run(launchers: list[Launcher]) -> None:
    """Ctrl-C at every step: the VM is there, whole, or it is not; never a process without a VM."""

    def step(launcher: Launcher, number: int) -> Done:
        done = launcher(*RUN, fault="interrupt", step=number)
        assert done.finished or done.status in (0, 130), done
        assert "Traceback" not in done.err, done.err
        assert_sensible(launcher)
        launcher.good(*RUN)
        remove(launcher)
        return done

    walked("interrupted run", Walk(launchers, step).walk(), at_least=45)


@pytest.mark.parametrize("fault", ["ENOSPC", "EACCES", "EIO"])
def test_storage_fails_in_run(launchers: list[Launcher], fault: str) -> None:
    """From each step on nothing can be written: one line says so, and nothing is left."""

    def step(launcher: Launcher, number: int) -> Done:
        done = launcher(*RUN, fault=fault, step=number)
        if not done.ok:
            assert os.strerror(getattr(errno, fault)).lower() in done.error_line().lower() or "disk is full" in done.err
            assert_nothing_left(launcher.home)
        launcher.good(*RUN)
        remove(launcher)
        return done

    walked(f"run, {fault}", Walk(launchers, step).walk(), at_least=10)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment(polyvisor: Polyvisor, seed: int) -> None:
    """Kills between the steps that the walks know: at random moments, also while QEMU is loading."""
    moments = random.Random(seed)
    for words in (RUN, ("stop", "vm", "--timeout", "0"), RUN, ("rm", "--force", "vm")):
        process = polyvisor.start(*words)
        time.sleep(moments.uniform(0.05, 0.35))
        process.kill()
        done = finish(words, process)
        assert done.killed or done.ok, done
        assert_sensible(polyvisor)
        polyvisor.good(*words)
        assert_sensible(polyvisor)
    assert_nothing_left(polyvisor.home)


def test_guest_shuts_down_though_stop_is_killed(polyvisor: Polyvisor) -> None:
    """`stop` by the power button, killed while it waits; what the guest wrote is on the disk."""
    polyvisor.good("run", "tiny", *RUN[2:], "--wait", "--timeout", "120")
    write = "tr '\\0' Z </dev/zero | dd of=/dev/vda bs=64k count=1 seek=16 iflag=fullblock && sync"
    polyvisor.good("exec", "vm", "--", "sh", "-c", write)
    process = polyvisor.start("stop", "vm")
    time.sleep(0.4)
    process.kill()
    finish(("stop",), process)
    assert assert_sensible(polyvisor) in ("running", "stopped")
    polyvisor.good("stop", "vm")
    assert assert_sensible(polyvisor) == "stopped"
    assert_marked(polyvisor)
    start(polyvisor)
    remove(polyvisor)


def walked(verb: str, steps: int, *, at_least: int) -> None:
    """Say how many steps a walk took; far fewer than there are would mean that the launcher misses them."""
    print(f"crash points walked: {verb}: {steps}")
    at_least = max(1, at_least)  # where few of the steps are walked
    assert at_least <= steps <= 5 * at_least
