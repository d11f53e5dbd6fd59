"""`kill -9` at the steps of `disk` and `nic`: the VM runs on or starts, has all or nothing, and the same command completes it.

In between the VM is now and then saved and started, or killed and started: whatever the launch record says by then must be a
machine that QEMU can make. Guests have to take part, and so to boot: by default each of the walks takes one or two steps, in
one home, with one guest (see `tests.thorough`).
"""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from polyvisor.errors import NotFound, WrongState
from polyvisor.spec.vm import Disk, VMSpec
from polyvisor.storage.layers import virtual_size
from tests.faults.command import Done, Launcher, qemus
from tests.faults.test_crash_points import Walk, assert_sensible, launchers, remove, walked
from tests.thorough import EVERY, THOROUGH

pytestmark = [pytest.mark.qemu, pytest.mark.slow]
__all__ = ["launchers"]

SPEC = VMSpec(name="vm", image="tiny", disks=(Disk(size_gib=1),))
# A step takes seconds.
FEW = 1 if THOROUGH else 25
_GIB = 1 << 30


@pytest.fixture
def homes(launchers: list[Launcher]) -> list[Launcher]:
    """Those in whose homes a guest boots."""
    return launchers if THOROUGH else launchers[:1]


def begin(launcher: Launcher) -> None:
    """A VM whose guest is booted: it has to take part."""
    asyncio.run(launcher.host().run(SPEC))
    ready(launcher)


def ready(launcher: Launcher) -> None:
    asyncio.run(launcher.host().wait_for_ssh("vm", timeout_s=120))


def files(launcher: Launcher) -> set[str]:
    return {path.name for path in (launcher.home / "vms/vm/disks").glob("disk*")}


def sizes(launcher: Launcher) -> dict[str, int]:
    disks = asyncio.run(launcher.host().disk_list("vm"))
    assert all(disk.pending is None for disk in disks), disks
    return {disk.name: disk.size_mib >> 10 for disk in disks}


def cards(launcher: Launcher) -> set[str]:
    nics = asyncio.run(launcher.host().nic_list("vm"))
    assert all(nic.pending is None for nic in nics), nics
    return {nic.name for nic in nics}


def assert_goes_on(launcher: Launcher, number: int, before: list[int]) -> None:
    """The VM is alive, and goes on after a save, or, where all is tested, boots again, with what its records say."""
    assert assert_sensible(launcher) == "running"
    assert qemus(launcher.home) == before
    if (way := number // FEW % 3) == 0:
        saved = launcher("save", "vm")
        assert saved.ok or saved.status == WrongState.exit_status, saved
        launcher.good("start", "vm")
    elif way == 1 and THOROUGH:
        asyncio.run(launcher.host().kill("vm"))
        launcher.good("start", "vm")
        ready(launcher)
    assert assert_sensible(launcher) == "running"


def assert_whole(launcher: Launcher) -> None:
    """What the launch record says is what there is: a guest that was saved goes on."""
    launcher.good("save", "vm")
    launcher.good("start", "vm")
    assert asyncio.run(launcher.host().show("vm")).pending == ()


def walk_disk_add(homes: list[Launcher]) -> None:
    words = ("disk", "add", "vm", "--size", "2", "--name", "disk1")

    def step(launcher: Launcher, number: int) -> Done:
        before = qemus(launcher.home)
        done = launcher(*words, fault="kill", step=number)
        assert_goes_on(launcher, number, before)
        launcher.good(*words)
        assert sizes(launcher) == {"disk0": 1, "disk1": 2}
        assert_whole(launcher)
        asyncio.run(launcher.host().disk_remove("vm", "disk1", force=True))
        assert files(launcher) == {"disk0.qcow2"}
        return done

    walked("disk add", Walk(homes, step, every=FEW).walk(), at_least=25 // FEW)


def walk_disk_remove(homes: list[Launcher]) -> None:
    words = ("disk", "rm", "--force", "vm", "disk1")

    def step(launcher: Launcher, number: int) -> Done:
        asyncio.run(launcher.host().disk_add("vm", 2, disk="disk1"))
        before = qemus(launcher.home)
        done = launcher(*words, fault="kill", step=number)
        assert_goes_on(launcher, number, before)
        again = launcher(*words)
        assert again.ok or again.status == NotFound.exit_status, again
        assert sizes(launcher) == {"disk0": 1}
        assert_whole(launcher)
        return done

    walked("disk rm", Walk(homes, step, first=min(8, FEW), every=FEW).walk(), at_least=20 // FEW)
    for launcher in homes:
        asyncio.run(launcher.host().disk_add("vm", 2, disk="disk2"))
        assert files(launcher) == {"disk0.qcow2", "disk2.qcow2"}, "what was cut off is tidied by what comes next"
        asyncio.run(launcher.host().disk_remove("vm", "disk2", force=True))


def walk_disk_grow(homes: list[Launcher]) -> None:
    def step(launcher: Launcher, number: int) -> Done:
        before, size = qemus(launcher.home), number + 1
        words = ("disk", "grow", "vm", "disk0", "--size", str(size))
        done = launcher(*words, fault="kill", step=number)
        assert_goes_on(launcher, number, before)
        launcher.good(*words)
        assert sizes(launcher) == {"disk0": size}
        assert virtual_size(launcher.home / "vms/vm/disks/disk0.qcow2") == size * _GIB
        return done

    walked("disk grow", Walk(homes, step, first=min(6, FEW), every=FEW).walk(), at_least=15 // FEW)


def walk_cards(homes: list[Launcher]) -> None:
    """Added, and removed again: the way to SSH stays with the first."""

    def step(launcher: Launcher, number: int) -> Done:
        before = qemus(launcher.home)
        words = ("nic", "add", "vm", "--name", "nic1")
        added = launcher(*words, fault="kill", step=number)
        assert_goes_on(launcher, number, before)
        launcher.good(*words)
        assert cards(launcher) == {"nic0", "nic1"}
        before, other = qemus(launcher.home), ("nic", "rm", "vm", "nic1")
        removed = launcher(*other, fault="kill", step=number)
        assert_goes_on(launcher, number + FEW, before)
        again = launcher(*other)
        assert again.ok or again.status == NotFound.exit_status, again
        assert cards(launcher) == {"nic0"}
        assert_whole(launcher)
        return added if added.killed else removed

    walked("nic add, nic rm", Walk(homes, step, first=min(12, FEW), every=FEW).walk(), at_least=20 // FEW)


def test_while_it_runs(homes: list[Launcher]) -> None:
    for launcher in homes:
        begin(launcher)
    for walk in (walk_disk_add, walk_disk_remove, walk_cards, walk_disk_grow):
        walk(homes)
    for launcher in homes:
        remove(launcher)


def test_at_rest(launchers: list[Launcher]) -> None:
    """What a cut off change has left is no hindrance to a start, nor to the same again."""
    for launcher in launchers:
        asyncio.run(launcher.host().create(SPEC))

    def step(launcher: Launcher, number: int) -> Done:
        for command in ("disk add vm --size 1 --name disk1", "disk grow vm disk1 --size 3", "disk rm --force vm disk1"):
            words = command.split()
            done = launcher(*words, fault="kill", step=number)
            assert assert_sensible(launcher) == "stopped"
            if number // EVERY % 2:
                launcher.good("start", "vm")
                asyncio.run(launcher.host().kill("vm"))
            again = launcher(*words)
            assert again.ok or (words[1] == "rm" and again.status == NotFound.exit_status), again
        assert sizes(launcher) == {"disk0": 1}
        return done

    walked("disk, at rest", Walk(launchers, step, every=EVERY).walk(), at_least=10 // EVERY)
    for launcher in launchers:
        asyncio.run(launcher.host().start("vm"))
        assert files(launcher) == {"disk0.qcow2"}
        remove(launcher)


def test_storage_fails(homes: list[Launcher]) -> None:
    """From each step on nothing can be written: one line says so, and the VM is as before, or has what was wanted."""
    for launcher in homes:
        begin(launcher)

    def step(launcher: Launcher, number: int) -> Done:
        words = ("disk", "add", "vm", "--size", "1", "--name", "disk1")
        done = launcher(*words, fault="ENOSPC", step=number)
        if not done.ok:
            assert os.strerror(errno.ENOSPC).lower() in done.error_line().lower() or "disk is full" in done.err
        assert assert_sensible(launcher) == "running"
        launcher.good(*words)
        assert_whole(launcher)
        asyncio.run(launcher.host().disk_remove("vm", "disk1", force=True))
        return done

    walked("disk add, ENOSPC", Walk(homes, step, every=EVERY).walk(), at_least=5 // EVERY)
    for launcher in homes:
        remove(launcher)
