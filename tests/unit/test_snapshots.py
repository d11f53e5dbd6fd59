"""Snapshots and clones of stopped VMs with two disks, without a hypervisor: what is on the disks, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from polyvisor.cli.snapshot import tree
from polyvisor.errors import (
    ImageRefused,
    InvalidInput,
    NotFound,
    NotPermitted,
    PolyvisorError,
    Unsupported,
    WrongState,
)
from polyvisor.host import disks, merging
from polyvisor.host.plan import UEFI_VARIABLES, disk_path
from polyvisor.host.record import Record, record_from_json, record_to_json
from polyvisor.host.snapshots import Snapshot
from polyvisor.host.store import VMDirectory
from polyvisor.images import qemu_img as images
from polyvisor.operation import silent
from polyvisor.remote.transfer import export_vm
from tests.unit.disks import MIB, qemu_img
from tests.unit.moved import SPEC, TCG, Machine, made

VARIABLES = {"one": b"variables" * 1000, "two": b"others" * 99}


@pytest.fixture
async def host(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "a")
    await made(machine, tmp_path / "scratch")
    return machine


def vm(host: Machine, name: str = "web") -> VMDirectory:
    return host.store.get(name)


def overlay(host: Machine, index: int = 0, name: str = "web") -> Path:
    return vm(host, name).path / disk_path(index, vm(host, name).record.generation)


def write(host: Machine, pattern: int, *, at: int = 5 * MIB, index: int = 0, name: str = "web") -> None:
    command = f"write -q -P {pattern} {at} 192k"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, overlay(host, index, name)], check=True)


def raw(host: Machine, index: int = 0, name: str = "web") -> bytes:
    """What the guest would see on a disk."""
    target = host.home.path / "raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay(host, index, name), target)
    with target.open("rb") as file:
        content = file.read(12 * MIB)
    target.unlink()
    return content


def depth(host: Machine, name: str = "web") -> list[int]:
    return [len(host.layers.files(layer)) for layer in vm(host, name).record.layers]


async def test_disks_and_uefi_variables_come_back(host: Machine) -> None:
    variables = vm(host).path / UEFI_VARIABLES
    await host.snapshot_create("web", snapshot="none")
    variables.write_bytes(VARIABLES["one"])
    write(host, 1)
    write(host, 2, index=1)
    before = raw(host), raw(host, 1)
    await host.snapshot_create("web", snapshot="a")
    variables.write_bytes(VARIABLES["two"])
    write(host, 3)
    write(host, 4, index=1)
    await host.snapshot_create("web", snapshot="b")
    await host.snapshot_revert("web", "a")
    assert (raw(host), raw(host, 1)) == before
    assert variables.read_bytes() == VARIABLES["one"]
    assert variables.stat().st_uid == overlay(host).stat().st_uid
    await host.snapshot_revert("web", "b")
    assert raw(host) != before[0] and raw(host, 1) != before[1]
    assert variables.read_bytes() == VARIABLES["two"]
    await host.snapshot_revert("web", "none")
    assert not variables.exists()
    assert sorted(path.name for path in vm(host).disks.iterdir()) == ["disk0-6.qcow2", "disk1-6.qcow2"]


@pytest.mark.parametrize("seed", range(2))
async def test_any_tree_of_snapshots_holds_what_it_was_given(host: Machine, seed: int) -> None:
    """Random writes, snapshots, reverts, removals and clones: every snapshot, and every clone, has what was there."""
    chance, kept, count = random.Random(seed), dict[str, tuple[bytes, bytes]](), 0
    for _ in range(10):
        for index in (0, 1):
            write(host, chance.randrange(1, 255), at=chance.randrange(6 * MIB // 512) * 512, index=index)
        match chance.choice(["create", "create", "create", "revert", "rm", "clone"]):
            case "create":
                kept[(await host.snapshot_create("web")).name] = raw(host), raw(host, 1)
            case "revert" if kept:
                name = chance.choice(sorted(kept))
                await host.snapshot_revert("web", name)
                assert (raw(host), raw(host, 1)) == kept[name]
            case "rm" if kept:
                name = chance.choice(sorted(kept))
                await host.snapshot_remove("web", name)
                del kept[name]
            case "clone":
                full, there = chance.random() < 0.5, (raw(host), raw(host, 1))
                await host.clone("web", f"copy-{count}", full=full)
                assert (raw(host, name=f"copy-{count}"), raw(host, 1, f"copy-{count}")) == there
                assert (depth(host, f"copy-{count}") == []) == full
                count += 1
    for name, content in kept.items():
        await host.snapshot_revert("web", name)
        assert (raw(host), raw(host, 1)) == content
    standing = {layer.id for top in disks.standing(host) for layer in host.layers.chain(top)}
    assert set(host.layers.ids()) == standing
    for name in host.store.names():
        await host.remove(name)
    assert host.layers.ids() == []


async def test_what_nobody_needs_is_merged(host: Machine) -> None:
    for pattern in range(1, 7):
        write(host, pattern, at=pattern * MIB)
        await host.snapshot_create("web", snapshot=f"s{pattern}")
    there = raw(host)
    assert depth(host) == [6, 6]
    for pattern in (1, 3, 4, 2):
        await host.snapshot_remove("web", f"s{pattern}")
    assert depth(host) == [2, 2]
    assert raw(host) == there
    await host.snapshot_revert("web", "s5")
    assert raw(host) != there
    await host.snapshot_revert("web", "s6")
    assert raw(host) == there


@pytest.mark.parametrize("cut", ["commit", "fold"])
async def test_a_merge_that_was_cut_off_changes_nothing(
    host: Machine, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    write(host, 1)
    await host.snapshot_create("web", snapshot="a")
    write(host, 2, at=6 * MIB)
    await host.snapshot_create("web", snapshot="b")
    there = raw(host), raw(host, 1)

    class Cut(BaseException):
        pass

    def cuts(*_: object) -> None:
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        if cut == "commit":
            patch.setattr(host.layers, "fold", cuts)
        else:
            patch.setattr(host.layers, "_write", cuts)
        await host.snapshot_remove("web", "a")
    assert (raw(host), raw(host, 1)) == there
    await host.snapshot_create("web", snapshot="c")
    await host.clone("web", "copy", full=True)
    assert (raw(host, name="copy"), raw(host, 1, "copy")) == there
    await merging.merge(host, "none", silent)
    assert depth(host) == [2, 2]  # b and c
    assert (raw(host), raw(host, 1)) == there


async def test_what_others_stand_on_is_not_merged(host: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a VM nor a snapshot has the layer in the middle: somebody may have its files open."""
    for name in ("a", "b", "c"):
        await host.snapshot_create("web", snapshot=name)
    other, standing = vm(host).record.layers, disks.standing
    await host.snapshot_revert("web", "a")
    monkeypatch.setattr(disks, "standing", lambda here: standing(here) | {layer for layer in other if layer})
    await host.snapshot_remove("web", "c")
    await host.snapshot_remove("web", "b")
    assert [len(host.layers.files(layer)) for layer in other] == [3, 3]


async def test_layers_that_a_clone_stands_on_are_not_merged_into(host: Machine) -> None:
    write(host, 1)
    await host.snapshot_create("web", snapshot="a")
    await host.clone("web", "copy", snapshot="a")
    write(host, 2)
    await host.snapshot_create("web", snapshot="b")
    await host.snapshot_remove("web", "a")
    assert depth(host) == [2, 2]
    there = raw(host, name="copy")
    await host.remove("copy")
    await host.snapshot_remove("web", "b")
    assert depth(host) == [1, 1]
    assert raw(host) != there


@pytest.mark.parametrize("full", [True, False])
async def test_a_clone_is_another_vm(host: Machine, full: bool) -> None:
    (vm(host).path / UEFI_VARIABLES).write_bytes(VARIABLES["one"])
    there = raw(host), raw(host, 1)
    await host.clone("web", "copy", full=full)
    source, clone = vm(host).record, vm(host, "copy").record
    assert (raw(host, name="copy"), raw(host, 1, "copy")) == there
    assert (vm(host, "copy").path / UEFI_VARIABLES).read_bytes() == VARIABLES["one"]
    assert clone.spec == dataclasses.replace(
        SPEC, name="copy", nics=(dataclasses.replace(SPEC.nics[0], mac=None, forwards=("127.0.0.1::80",)), SPEC.nics[1])
    )
    assert (clone.origin, clone.image_id, clone.memory_mib) == (source.id, source.image_id, source.memory_mib)
    assert clone.id != source.id and (os.geteuid() != 0 or clone.user != source.user)
    assert (vm(host, "copy").path / "ssh/host_key").read_bytes() != (vm(host).path / "ssh/host_key").read_bytes()
    assert (vm(host, "copy").path / "ssh/known_hosts").read_text().startswith("copy ssh-ed25519 ")
    write(host, 9)
    write(host, 8, name="copy")
    assert len({raw(host), raw(host, name="copy"), there[0]}) == 3


async def test_the_key_that_a_guest_lets_in_is_its_clones_too(host: Machine) -> None:
    (vm(host).path / "ssh/login").write_text("a key")
    await host.clone("web", "copy")
    assert (vm(host, "copy").path / "ssh/login").read_text() == "a key"


def hide_data_file(path: Path) -> None:
    """Let a qcow2 file name an external data file, as a VM's process that a guest has taken over could."""
    with path.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 1 << 2))


async def test_a_disk_that_names_a_file_of_the_host_is_not_opened(host: Machine, tmp_path: Path) -> None:
    hide_data_file(overlay(host))
    with pytest.raises(ImageRefused, match="data file"):
        await host.clone("web", "copy", full=True)
    await host.snapshot_create("web")
    with pytest.raises(ImageRefused, match="data file"):
        await export_vm(host, "web", tmp_path / "file")
    assert host.store.names() == ["web"]
    assert not (tmp_path / "file").exists()


async def test_what_a_disk_says_of_files_below_it_counts_for_nothing(host: Machine, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret!!" * MIB)
    await host.snapshot_create("web")
    there = raw(host)
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", secret, overlay(host))
    await host.clone("web", "copy", full=True)
    assert raw(host, name="copy") == there


async def test_a_link_in_the_place_of_uefi_variables_is_not_followed(host: Machine, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (vm(host).path / UEFI_VARIABLES).symlink_to(tmp_path / "secret")
    for work in (host.snapshot_create("web"), host.clone("web", "copy")):
        with pytest.raises(PolyvisorError):
            await work
    assert (host.store.names(), await host.snapshot_list("web")) == (["web"], [])


async def test_a_file_of_a_vm_with_layers_holds_all(host: Machine, tmp_path: Path) -> None:
    write(host, 1)
    await host.snapshot_create("web")
    write(host, 2, at=6 * MIB)
    there, other = (raw(host), raw(host, 1)), Machine(tmp_path / "b")
    await export_vm(host, "web", tmp_path / "file")
    await other.vm_import(str(tmp_path / "file"))
    assert (raw(other), raw(other, 1)) == there
    assert vm(other).record.id == vm(host).record.id
    assert (vm(other).path / "ssh/host_key").read_bytes() == (vm(host).path / "ssh/host_key").read_bytes()
    assert [image.image.name for image in await other.image_list()] == ["full"]
    await other.vm_import(str(tmp_path / "file"), name="again")
    assert vm(other, "again").record.origin == vm(host).record.id
    assert (vm(other, "again").path / "ssh/host_key").read_bytes() != (vm(host).path / "ssh/host_key").read_bytes()
    assert list((host.home.cache).glob("export-*")) == list((other.home.cache).glob("import-*")) == []


async def test_a_damaged_file_is_refused(host: Machine, tmp_path: Path) -> None:
    file, other = tmp_path / "file", Machine(tmp_path / "b")
    await export_vm(host, "web", file)
    content = file.read_bytes()
    places = [0, 14, 20, 24, 600, 3000, len(content) // 3, *(len(content) - back for back in (30, 3000, 300_000))]
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        with pytest.raises((ImageRefused, InvalidInput)):
            await other.vm_import(str(file))
        assert other.store.names() == []
    for size in range(0, len(content), len(content) // 9):
        file.write_bytes(content[:size])
        with pytest.raises(ImageRefused):
            await other.vm_import(str(file))
    file.write_bytes(content)
    await other.vm_import(str(file))


async def test_a_vm_with_snapshots_is_not_moved(host: Machine) -> None:
    await host.snapshot_create("web", snapshot="a")
    with pytest.raises(WrongState, match="snapshots") as caught:
        await host.move_show("web")
    assert caught.value.hint is not None and "clone --full" in caught.value.hint
    await host.clone("web", "copy", full=True)
    assert (await host.move_show("copy")).cargo is not None


async def test_what_cant_be_is_refused(host: Machine) -> None:
    with pytest.raises(WrongState, match="no memory"):
        await host.snapshot_create("web", memory=True)
    for name in ("", ".x", "a/b", "x" * 64, "a..b"):
        with pytest.raises(InvalidInput):
            await host.snapshot_create("web", snapshot=name)
    with pytest.raises(InvalidInput, match="description"):
        await host.snapshot_create("web", description="two\nlines")
    with pytest.raises(NotFound):
        await host.snapshot_create("none")
    with pytest.raises(InvalidInput):
        await host.clone("web", "No Name")
    assert host.store.names() == ["web"]
    assert host.layers.ids() == []


async def test_a_vm_gets_no_deeper_than_it_may(host: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "MAX_LAYERS", 2)
    await host.snapshot_create("web")
    await host.snapshot_create("web")
    with pytest.raises(WrongState, match="2 layers already"):
        await host.snapshot_create("web")
    assert len(await host.snapshot_list("web")) == 2


async def test_a_snapshot_that_cant_be_understood_is_removed(host: Machine) -> None:
    await host.snapshot_create("web", snapshot="a")
    await host.snapshot_create("web", snapshot="b")
    (vm(host).path / "snapshots/a/snapshot.json").write_text("{]")
    with pytest.raises(PolyvisorError, match="can't be understood") as caught:
        await host.snapshot_list("web")
    assert caught.value.hint == "remove it: polyvisor snapshot rm web a"
    before = host.layers.ids()
    disks.sweep(host)
    assert host.layers.ids() == before, "what it stands on can't be told"
    await host.snapshot_remove("web", "a")
    assert [each.name for each in await host.snapshot_list("web")] == ["b"]


async def test_a_vm_on_another_file_system_says_so(host: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    with pytest.raises(PolyvisorError, match="another file system"):
        await host.snapshot_create("web")
    monkeypatch.undo()
    await host.snapshot_create("web")


@pytest.mark.parametrize("error", [NotPermitted("no"), PolyvisorError("no")])
async def test_a_snapshot_that_fails_leaves_all_as_it_was(
    host: Machine, monkeypatch: pytest.MonkeyPatch, error: PolyvisorError
) -> None:
    before = host.files("web")

    async def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(images, "create_on_layer", fails)
    with pytest.raises(type(error)):
        await host.snapshot_create("web")
    after = host.files("web")
    assert {name: after[name] for name in before} == before
    disks.sweep(host)
    assert host.layers.ids() == []


async def test_on_xen_a_running_vm_gets_none(host: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Declared, with the reason, before anything is done; at rest it is as anywhere."""
    from polyvisor.drivers.base import Observed
    from polyvisor.drivers.xen.probe import MISSING
    from polyvisor.status import VMState

    async def running(_: object) -> Observed:
        return Observed(state=VMState.RUNNING)

    monkeypatch.setattr(host.drivers.qemu, "inspect", running)
    host.offered = (dataclasses.replace(TCG, missing=MISSING),)
    with pytest.raises(Unsupported, match="stop the VM first"):
        await host.snapshot_create("web")
    monkeypatch.undo()
    await host.snapshot_create("web")


def snapshot(name: str, parent: str | None = None) -> Snapshot:
    return Snapshot(name=name, created_at=0.0, parent=parent)


def test_a_tree_is_drawn_from_its_roots() -> None:
    found = [
        snapshot("a"),
        snapshot("b", "a"),
        snapshot("c"),
        snapshot("d", "a"),
        snapshot("e", "b"),
        snapshot("f", "gone"),
    ]
    drawn = [f"{'-' * depth}{each.name}" for depth, each in tree(found)]
    assert drawn == ["a", "-b", "--e", "-d", "c", "f"]


def test_a_tree_that_is_none_is_drawn_all_the_same() -> None:
    found = [snapshot("a", "b"), snapshot("b", "a"), snapshot("c", "c")]
    assert sorted(each.name for _, each in tree(found)) == ["a", "b", "c"]


def test_a_record_without_layers_is_as_ever() -> None:
    record = Record(id="x", created_at=1.0, spec=SPEC, image_id="i", memory_mib=64)
    assert "layers" not in record_to_json(record) and "generation" not in record_to_json(record)
    for each in (record, dataclasses.replace(record, layers=("l", None), generation=3, snapshot="s", origin="o")):
        assert record_from_json(record_to_json(each)) == each
    assert [dataclasses.replace(record, layers=("l", None)).layer(i) for i in range(3)] == ["l", None, None]
