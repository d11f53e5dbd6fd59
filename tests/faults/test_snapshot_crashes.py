"""`kill -9` of the verbs about snapshots and clones at every step: whatever was written is there, and the same again succeeds.

What a guest writes is written here through QEMU's own monitor, by the disk's device, wherever that leads by then: so each step
shows that a VM whose snapshot was cut off goes on writing where its record will find it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from pathlib import Path

import pytest

from polyvisor.drivers.qemu.argv import QMP_SOCKET
from polyvisor.drivers.qemu.qmp import connected
from polyvisor.errors import AlreadyExists, NotFound
from polyvisor.home import Home
from polyvisor.host import disks
from polyvisor.host.host import Host
from polyvisor.host.plan import disk_path
from polyvisor.host.snapshots import Snapshot
from polyvisor.spec.vm import Disk, VMSpec
from tests.faults.command import Done, Launcher, qemus
from tests.faults.test_crash_points import Walk, assert_sensible, launchers, walked
from tests.thorough import THOROUGH

__all__ = ["launchers"]

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

EVERY = 1 if THOROUGH else 29
SPEC = VMSpec(name="vm", image="still", disks=(Disk(size_gib=1),))


def host(launcher: Launcher) -> Host:
    return Host(Home(launcher.home))


def create(launcher: Launcher, *, alive: bool) -> None:
    here = host(launcher)
    asyncio.run(here.run(SPEC) if alive else here.create(SPEC))


def overlay(launcher: Launcher, name: str = "vm") -> Path:
    vm = host(launcher).store.get(name)
    return vm.path / disk_path(0, vm.record.generation)


def write_dead(launcher: Launcher, pattern: int, name: str = "vm") -> None:
    """Write onto the disk of a VM that is not alive."""
    command = f"write -q -P {pattern} 1M 64k"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(overlay(launcher, name))], check=True)


def write_alive(launcher: Launcher, pattern: int) -> None:
    """Write onto the disk of a VM that is alive, where its guest would; one that stands still goes on before."""
    if assert_sensible(launcher) == "paused":  # QEMU has given up its disks while it writes memory
        launcher.good("resume", "vm")

    async def work() -> None:
        vm = host(launcher).store.get("vm")
        async with connected(vm.path / QMP_SOCKET, timeout_s=20) as monitor:
            said = await monitor.human(
                f'qemu-io -d /machine/peripheral/disk0-dev/virtio-backend "write -P {pattern} 1M 64k"'
            )
            assert not said, said  # what it has done goes to the log
            await monitor.human('qemu-io -d /machine/peripheral/disk0-dev/virtio-backend "flush"')

    asyncio.run(work())


def content(launcher: Launcher, name: str = "vm") -> int:
    """The pattern on the disk of a VM that is not alive; each file of the chain must be sound."""
    here = host(launcher)
    [disk] = disks.disks_of(here, here.store.get(name).record)
    for path in (overlay(launcher, name), *disk.layers):
        check = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=False)
        assert check.returncode in (0, 3), path
    argv = ["qemu-img", "dd", "-f", "qcow2", "-O", "raw", "bs=64k", "skip=16", "count=17"]
    raw = launcher.home.parent / f"{launcher.home.name}.raw"
    subprocess.run([*argv, f"if={overlay(launcher, name)}", f"of={raw}"], check=True)
    found = set(raw.read_bytes()[: 64 << 10])
    raw.unlink()
    assert len(found) == 1, found
    return found.pop()


def snapshots(launcher: Launcher, name: str = "vm") -> dict[str, Snapshot]:
    return {each.name: each for each in asyncio.run(host(launcher).snapshot_list(name))}


def assert_no_waste(launcher: Launcher) -> None:
    """Every layer is stood upon once all is swept, and VMs and snapshots stand on layers that are there."""
    here = host(launcher)
    disks.sweep(here)
    needed = {layer.id for top in disks.standing(here) for layer in here.layers.chain(top)}
    assert set(here.layers.ids()) == needed
    for name in here.store.names():
        vm = here.store.get(name)
        assert [path.name for path in (vm.path / "snapshots").glob(".*")] == []


def remove(launcher: Launcher) -> None:
    here = host(launcher)
    for name in here.store.names():
        asyncio.run(here.remove(name, force=True))
    assert not [path for path in (launcher.home / "layers").glob("*") if path.is_dir()]


@pytest.mark.parametrize("memory", [True, False])
def test_create_of_a_running_vm(launchers: list[Launcher], memory: bool) -> None:
    flag = "--memory" if memory else "--no-memory"
    for launcher in launchers:
        create(launcher, alive=True)

    def step(launcher: Launcher, number: int) -> Done:
        name = f"s{number}"
        [before] = qemus(launcher.home)
        write_alive(launcher, number % 200 + 1)
        done = launcher("snapshot", "create", "vm", "--name", name, flag, fault="kill", step=number)
        assert assert_sensible(launcher) in ("running", "paused")
        assert qemus(launcher.home) == [before]
        write_alive(launcher, 201)
        if number % 2:  # it ends as it is, and is started by its record
            asyncio.run(host(launcher).kill("vm"))
            assert content(launcher) == 201
            launcher.good("start", "vm")
        again = launcher("snapshot", "create", "vm", "--name", name, flag)
        assert again.ok or again.status == AlreadyExists.exit_status, again
        launcher.good("snapshot", "create", "vm", "--name", f"{name}-b", "--no-memory")
        assert assert_sensible(launcher) == "running", "it was not paused before"
        found = snapshots(launcher)
        assert (found[name].memory_bytes is not None) == memory
        assert found[f"{name}-b"].parent == name
        launcher.good("snapshot", "revert", "--force", "vm", name)
        assert assert_sensible(launcher) == ("saved" if memory else "stopped")
        assert content(launcher) == (number % 200 + 1 if not again.ok else 201)
        launcher.good("start", "vm")
        assert assert_sensible(launcher) == "running"
        launcher.good("snapshot", "rm", "vm", name, f"{name}-b")
        assert_no_waste(launcher)
        return done

    walked(f"snapshot create {flag}", Walk(launchers, step, every=EVERY).walk(), at_least=50 // EVERY)
    for launcher in launchers:
        remove(launcher)


def test_create_of_a_stopped_vm(launchers: list[Launcher]) -> None:
    for launcher in launchers:
        create(launcher, alive=False)

    def step(launcher: Launcher, number: int) -> Done:
        name = f"s{number}"
        write_dead(launcher, 100)
        done = launcher("snapshot", "create", "vm", "--name", name, fault="kill", step=number)
        assert assert_sensible(launcher) == "stopped"
        assert content(launcher) == 100
        write_dead(launcher, 101)
        again = launcher("snapshot", "create", "vm", "--name", name)
        assert again.ok or again.status == AlreadyExists.exit_status, again
        write_dead(launcher, 102)
        launcher.good("snapshot", "revert", "vm", name)
        assert content(launcher) == (101 if again.ok else 100)
        launcher.good("snapshot", "rm", "vm", name)
        assert_no_waste(launcher)
        return done

    walked("snapshot create", Walk(launchers, step, every=EVERY).walk(), at_least=35 // EVERY)
    for launcher in launchers:
        remove(launcher)


@pytest.mark.parametrize("again", ["revert", "start"])
def test_revert(launchers: list[Launcher], again: str) -> None:
    """A revert that was cut off is as if it had not begun, or is brought to its end by whatever comes next."""
    for launcher in launchers:
        create(launcher, alive=True)
        write_alive(launcher, 100)
        launcher.good("snapshot", "create", "vm", "--name", "a", "--memory")
        write_alive(launcher, 101)
        asyncio.run(host(launcher).kill("vm"))

    def step(launcher: Launcher, number: int) -> Done:
        write_dead(launcher, 102)
        done = launcher("snapshot", "revert", "vm", "a", fault="kill", step=number)
        assert assert_sensible(launcher) in ("stopped", "saved")
        if again == "revert":
            launcher.good("snapshot", "revert", "vm", "a")
            assert assert_sensible(launcher) == "saved"
            assert content(launcher) == 100
        begun = (launcher.home / "vms/vm/snapshots/reverting").exists() or assert_sensible(launcher) == "saved"
        launcher.good("start", "vm")
        restored = b"-incoming" in Path(f"/proc/{qemus(launcher.home)[0]}/cmdline").read_bytes()
        assert restored == begun
        asyncio.run(host(launcher).kill("vm"))
        assert content(launcher) == (100 if begun else 102)
        assert_no_waste(launcher)
        return done

    walked(f"snapshot revert, then {again}", Walk(launchers, step, every=EVERY).walk(), at_least=30 // EVERY)
    for launcher in launchers:
        remove(launcher)


def test_remove(launchers: list[Launcher]) -> None:
    """What stands on a snapshot that is being removed has what it had."""
    for launcher in launchers:
        create(launcher, alive=False)

    def step(launcher: Launcher, number: int) -> Done:
        for pattern, name in ((100, "a"), (101, "b"), (102, "c")):
            write_dead(launcher, pattern)
            launcher.good("snapshot", "create", "vm", "--name", name)
        done = launcher("snapshot", "rm", "vm", "b", fault="kill", step=number)
        launcher("snapshot", "rm", "vm", "b")
        found = snapshots(launcher)
        assert {each.name: each.parent for each in found.values()} == {"a": None, "c": "a"}
        for pattern, name in ((100, "a"), (102, "c")):
            launcher.good("snapshot", "revert", "vm", name)
            assert content(launcher) == pattern
        assert_no_waste(launcher)
        launcher.good("snapshot", "rm", "vm", "a", "c")
        return done

    walked("snapshot rm", Walk(launchers, step, every=EVERY).walk(), at_least=18 // EVERY)
    for launcher in launchers:
        remove(launcher)


@pytest.mark.parametrize("flags", [(), ("--full",)])
def test_clone(launchers: list[Launcher], flags: tuple[str, ...]) -> None:
    """A clone whose making was cut off is there as a whole, or not; its source has what it had."""
    for launcher in launchers:
        create(launcher, alive=False)

    def step(launcher: Launcher, number: int) -> Done:
        write_dead(launcher, 100)
        done = launcher("clone", "vm", "copy", *flags, fault="kill", step=number)
        assert content(launcher) == 100
        again = launcher("clone", "vm", "copy", *flags)
        assert again.ok or again.status == AlreadyExists.exit_status, again
        write_dead(launcher, 101)
        assert content(launcher, "copy") == 100
        write_dead(launcher, 102, "copy")
        assert content(launcher) == 101
        launcher.good("rm", "copy")
        assert_no_waste(launcher)
        return done

    walked(f"clone {' '.join(flags)}", Walk(launchers, step, every=EVERY).walk(), at_least=35 // EVERY)
    for launcher in launchers:
        remove(launcher)


def test_import(launchers: list[Launcher]) -> None:
    for launcher in launchers:
        create(launcher, alive=False)
        write_dead(launcher, 100)
        launcher.good("export", "vm", str(launcher.home.parent / f"{launcher.home.name}.vm"))

    def step(launcher: Launcher, number: int) -> Done:
        words = ("import", str(launcher.home.parent / f"{launcher.home.name}.vm"), "--name", "copy")
        done = launcher(*words, fault="kill", step=number)
        again = launcher(*words)
        assert again.ok or again.status == AlreadyExists.exit_status, again
        assert content(launcher, "copy") == 100
        launcher.good("rm", "copy")
        return done

    walked("import", Walk(launchers, step, every=EVERY).walk(), at_least=25 // EVERY)
    for launcher in launchers:
        remove(launcher)


@pytest.mark.parametrize("fault", ["ENOSPC"])
def test_storage_fails(launchers: list[Launcher], fault: str) -> None:
    """From each step on nothing can be written: one line says so, the VM runs on, and writes where its record finds it."""
    for launcher in launchers:
        create(launcher, alive=True)

    def step(launcher: Launcher, number: int) -> Done:
        done = launcher("snapshot", "create", "vm", "--name", "a", "--memory", fault=fault, step=number)
        if not done.ok:
            assert os.strerror(getattr(errno, fault)).lower() in done.error_line().lower() or "disk is full" in done.err
        assert assert_sensible(launcher) in ("running", "paused")
        write_alive(launcher, 100)
        asyncio.run(host(launcher).kill("vm"))
        assert content(launcher) == 100
        launcher.good("start", "vm")
        try:
            asyncio.run(host(launcher).snapshot_remove("vm", "a"))
        except NotFound:
            assert not done.ok
        assert_no_waste(launcher)
        return done

    walked(f"snapshot create, {fault}", Walk(launchers, step, every=EVERY).walk(), at_least=9 // EVERY)
    for launcher in launchers:
        remove(launcher)


def test_two_at_once(launchers: list[Launcher]) -> None:
    """Snapshots, clones and removals at the same time, of the same VM: each has what it is to have."""
    [launcher, *_] = launchers
    create(launcher, alive=False)
    write_dead(launcher, 100)
    here = host(launcher)

    async def work() -> None:
        clones = [here.clone("vm", f"copy-{i}") for i in range(4)]
        await asyncio.gather(*clones, *(here.snapshot_create("vm", snapshot=f"s{i}") for i in range(4)))
        removing = [here.snapshot_remove("vm", f"s{i}") for i in range(4)]
        await asyncio.gather(
            *removing, *(here.clone(f"copy-{i}", f"next-{i}") for i in range(3)), here.remove("copy-3")
        )

    asyncio.run(work())
    assert len(here.store.names()) == 7
    for name in here.store.names():
        assert content(launcher, name) == 100
    assert_no_waste(launcher)
    remove(launcher)
