"""Many commands at once: each succeeds or says in one line why not, and what they leave is whole."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from polyvisor.cli.main import run
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.images.image import Image
from polyvisor.spec.vm import VMSpec
from tests.faults.command import Done, Polyvisor, assert_nothing_left, finish, qemus

pytestmark = pytest.mark.qemu

AT_ONCE = 20
CLEAR = {3, 4, 5, 6}  # not found, already exists, busy, wrong state


def at_once(polyvisor: Polyvisor, commands: Sequence[tuple[str, ...]]) -> list[Done]:
    """Run all `commands` at the same time; each that fails must say so in one line."""
    running = [(words, polyvisor.start(*words)) for words in commands]
    done = [finish(words, process) for words, process in running]
    for one in done:
        if not one.ok:
            one.error_line()
    return done


def remove_all(polyvisor: Polyvisor) -> None:
    polyvisor.good("rm", "--force", "--all")
    assert_nothing_left(polyvisor.home)


@pytest.mark.parametrize("seed", range(3))
def test_twenty_commands_on_one_vm(polyvisor: Polyvisor, seed: int) -> None:
    verbs: list[tuple[str, ...]] = [
        *[("run", "still", "--name", "vm")] * 3,
        *[("start", "vm")] * 3,
        *[("stop", "vm", "--timeout", "0")] * 2,
        *[("kill", "vm")] * 2,
        *[("pause", "vm")] * 2,
        *[("resume", "vm")] * 2,
        *[("rm", "vm"), ("rm", "--force", "vm")],
        *[("show", "vm", "--json")] * 2,
        *[("ls", "--json")] * 2,
    ]
    assert len(verbs) == AT_ONCE
    random.Random(seed).shuffle(verbs)
    if seed:
        polyvisor.good("run", "still", "--name", "vm")
    for done in at_once(polyvisor, verbs):
        assert done.ok or done.status in CLEAR, done
        if done.words[0] == "ls":
            assert [vm["name"] for vm in done.json()] in ([], ["vm"])
    states = polyvisor.states()
    assert set(states) <= {"vm"} and set(states.values()) <= {"running", "paused", "stopped"}, states
    assert len(qemus(polyvisor.home)) == (states.get("vm") in ("running", "paused"))
    polyvisor.good("run", "still", "--name", "vm")
    assert len(qemus(polyvisor.home)) == 1
    remove_all(polyvisor)


def _qemu_that_waits(directory: Path) -> str:
    """A QEMU whose guests are paused from the first: twenty that boot at once would occupy the machine."""
    path = directory / "qemu"
    path.write_text('#!/bin/sh\nexec qemu-system-x86_64 -S "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_twenty_names(polyvisor: Polyvisor) -> None:
    """Each gets a VM, with ports and a user of its own."""
    names = [f"vm-{number}" for number in range(AT_ONCE)]
    polyvisor = Polyvisor(polyvisor.home, env={"POLYVISOR_QEMU": _qemu_that_waits(polyvisor.home.parent)})
    assert all(done.ok for done in at_once(polyvisor, [("run", "still", "--name", name) for name in names]))
    vms = polyvisor.good("ls", "--json").json()
    assert {vm["name"]: vm["state"] for vm in vms} == dict.fromkeys(names, "paused")
    ports = collections.Counter(forward["host_port"] for vm in vms for forward in vm["forwards"])
    assert len(ports) == AT_ONCE and set(ports.values()) == {1}
    assert len({vm["id"] for vm in vms}) == AT_ONCE
    if polyvisor.home.stat().st_uid == 0:
        users = {Path(f"/proc/{vm['pid']}").stat().st_uid for vm in vms}
        assert len(users) == AT_ONCE and 0 not in users
    remove_all(polyvisor)


def test_twenty_without_a_name(polyvisor: Polyvisor) -> None:
    """`run tiny` always means one more VM, also where others ask for one at the same moment."""
    created = at_once(polyvisor, [("create", "tiny", "--json")] * AT_ONCE)
    names = {done.json()["name"] for done in created}
    assert len(names) == AT_ONCE
    assert sorted(polyvisor.states()) == sorted(names)
    remove_all(polyvisor)


def test_twenty_of_one_spec(polyvisor: Polyvisor) -> None:
    done = at_once(polyvisor, [("run", "still", "--name", "same", "--json")] * AT_ONCE)
    assert all(one.ok for one in done), [one for one in done if not one.ok]
    assert len({one.json()["id"] for one in done}) == 1
    assert len({one.json()["pid"] for one in done}) == 1
    assert polyvisor.states() == {"same": "running"}
    assert len(qemus(polyvisor.home)) == 1
    remove_all(polyvisor)


def test_twenty_specs_of_one_name(polyvisor: Polyvisor) -> None:
    commands = [("run", "still", "--name", "same", "--label", f"n={number}", "--json") for number in range(AT_ONCE)]
    done = at_once(polyvisor, commands)
    [winner] = [one for one in done if one.ok]
    assert {one.status for one in done if not one.ok} == {4}
    assert winner.json()["labels"] == polyvisor.good("show", "same", "--json").json()["spec"]["labels"]
    remove_all(polyvisor)


def test_first_commands_of_a_home(empty_home: Home, tiny: Image, image_store: object, cache: Path) -> None:
    """Directories, key pair and caches are made once, however many want them."""
    path = empty_home.path.with_name("new")
    path.mkdir(mode=0o711)
    (path / "images").symlink_to(cache / "home" / "images")
    polyvisor = Polyvisor(path)
    done = at_once(polyvisor, [("run", "tiny", "--name", f"vm-{number}") for number in range(6)])
    assert all(one.ok for one in done), done
    assert {p.name for p in (path / "keys").iterdir()} <= {"id_ed25519", "id_ed25519.pub", "reserve"}
    remove_all(polyvisor)


async def test_busy_is_said_in_one_line(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who waits longer than its patience for another command says which one it waited for."""
    monkeypatch.setattr("polyvisor.host.store.LOCK_PATIENCE_S", 0.2)
    monkeypatch.setenv("POLYVISOR_HOME", str(host.home.path))
    await host.create(VMSpec(name="vm", image="tiny"))
    async with host.store.locked("vm", "move"):
        status = await asyncio.to_thread(run, ["start", "vm", "--json"])
    assert status == 5
    [line] = capsys.readouterr().err.splitlines()
    error = json.loads(line)["error"]
    assert error["code"] == "busy"
    assert "'move'" in error["message"]


def test_image_rm_against_create(bare: Polyvisor, tiny: Image, cache: Path) -> None:
    """Either the image goes and nothing stands on it, or VMs stand on it and it stays."""
    source = cache / "home" / "images"
    for number in range(3):
        shutil.rmtree(bare.home / "images", ignore_errors=True)
        shutil.copytree(source, bare.home / "images", symlinks=True)
        commands: list[tuple[str, ...]] = [("create", "tiny", "--name", f"vm-{i}") for i in range(4)]
        commands.insert(number % 5, ("image", "rm", "tiny"))
        # A `create` that finds no image would build it anew; without a network it says so in one line.
        done = at_once(Polyvisor(bare.home, env={"http_proxy": "http://127.0.0.1:9"}), commands)
        [removal] = [one for one in done if one.words[0] == "image"]
        images = [image["name"] for image in bare.good("image", "ls", "--json").json()]
        for vm in bare.good("ls", "--json").json():
            bare.good("start", vm["name"])
        assert "tiny" in images or not bare.states()
        assert removal.ok or removal.status == 6, removal
        bare.good("rm", "--force", "--all")
    assert_nothing_left(bare.home)
