"""The disks of a QEMU that runs: what it is told so that it writes to others, and its arguments with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyvisor.drivers.base import BootDisk
from polyvisor.drivers.qemu.argv import build_argv
from polyvisor.drivers.qemu.devices import backing_files, disk_argv, groups_for, with_disks
from polyvisor.drivers.qemu.disks import forget, switch, written_nodes
from polyvisor.drivers.qemu.qmp import QMPRefused, connected
from polyvisor.spec.vm import DeviceModel, Firmware
from tests.golden.boots import BOOTS
from tests.unit.test_qmp import FakeQemu, listening

IMAGE, LAYER = Path("/images/x/disk.qcow2"), Path("/layers/l/disk.qcow2")
OLD = (BootDisk(path=Path("disks/disk0.qcow2"), backing=IMAGE), BootDisk(path=Path("disks/disk1.qcow2")))
NEW = (
    BootDisk(path=Path("disks/disk0-1.qcow2"), layers=(LAYER,), backing=IMAGE),
    BootDisk(path=Path("disks/disk1-1.qcow2"), layers=(Path("/layers/m/disk.qcow2"),)),
)


class Blocks:
    """A QEMU with two disks; `refuses` names a command that it refuses."""

    def __init__(self, refuses: str | None = None) -> None:
        self.nodes = ["disk0", "disk1", "seed"]
        self.written = ["disk0", "disk1"]
        self.refuses = refuses

    async def __call__(self, command: dict[str, Any]) -> dict[str, Any]:
        name, arguments = command["execute"], command.get("arguments", {})
        if name == self.refuses:
            return {"error": {"class": "GenericError", "desc": "no"}}
        if name == "query-block":
            qdevs = ["/machine/peripheral/disk0-dev/virtio-backend", "disk1-dev"]
            disks = [{"qdev": q, "inserted": {"node-name": n}} for q, n in zip(qdevs, self.written, strict=True)]
            return {"return": [*disks, {"qdev": "seed-dev", "inserted": {"node-name": "seed"}}, {"device": "floppy"}]}
        if name == "query-named-block-nodes":
            return {"return": [{"node-name": node} for node in self.nodes]}
        if name == "blockdev-add":
            assert arguments["backing"] is None
            self.nodes.append(arguments["node-name"])
        if name == "blockdev-del":
            self.nodes.remove(arguments["node-name"])
        if name == "transaction":
            for action in arguments["actions"]:
                assert action["type"] == "blockdev-snapshot"
                self.written[self.written.index(action["data"]["node"])] = action["data"]["overlay"]
        return {"return": {}}


async def told(tmp_path: Path, blocks: Blocks, verb: Callable[..., Any] = switch) -> list[str]:
    """The commands by which it is told to change."""
    fake = FakeQemu(blocks)
    try:
        async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
            await verb(monitor, NEW)
    finally:
        looks = ("qmp_capabilities", "query-block", "query-named-block-nodes")
        said = [command["execute"] for command in fake.seen if command["execute"] not in looks]
    return said


async def test_all_disks_are_switched_at_once(tmp_path: Path) -> None:
    blocks = Blocks()
    assert await told(tmp_path, blocks) == ["blockdev-add", "blockdev-add", "transaction"]
    assert blocks.written == ["disk0-1", "disk1-1"]
    assert await told(tmp_path, blocks) == []


async def test_what_a_killed_command_has_added_is_used(tmp_path: Path) -> None:
    blocks = Blocks()
    blocks.nodes.append("disk0-1")
    assert await told(tmp_path, blocks) == ["blockdev-add", "transaction"]
    assert blocks.written == ["disk0-1", "disk1-1"]


async def test_what_was_refused_is_forgotten(tmp_path: Path) -> None:
    blocks = Blocks(refuses="transaction")
    with pytest.raises(QMPRefused):
        await told(tmp_path, blocks)
    assert blocks.written == ["disk0", "disk1"]
    assert await told(tmp_path, blocks, forget) == ["blockdev-del", "blockdev-del"]
    assert blocks.nodes == ["disk0", "disk1", "seed"]


async def test_what_is_written_to_is_not_forgotten(tmp_path: Path) -> None:
    blocks = Blocks()
    await told(tmp_path, blocks)
    assert await told(tmp_path, blocks, forget) == []


async def test_disks_are_told_by_their_devices(tmp_path: Path) -> None:
    fake = FakeQemu(Blocks())
    async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
        assert await written_nodes(monitor) == {0: "disk0", 1: "disk1"}


def argv(disks: tuple[BootDisk, ...]) -> list[str]:
    return [
        *("qemu", "-append", "-blockdev"),
        *[word for d in disks for word in disk_argv(d, DeviceModel.PARAVIRTUAL, Firmware.BIOS)],
        *("-blockdev", '{"node-name":"seed","driver":"raw"}', "-device", "virtio-blk-pci,drive=seed,id=seed-dev"),
    ]


def test_the_arguments_with_other_disks_are_those_of_a_start_with_them() -> None:
    assert list(with_disks(argv(OLD), NEW)) == argv(NEW)
    assert list(with_disks(argv(NEW), OLD)) == argv(OLD)


@pytest.mark.parametrize("name", sorted(BOOTS))
def test_the_arguments_with_the_same_disks_are_the_same(name: str) -> None:
    boot = BOOTS[name]
    words = build_argv("qemu", boot, Path("/code") if boot.firmware is Firmware.UEFI else None)
    assert list(with_disks(words, boot.disks)) == list(words)


def test_a_chain_is_named_outright() -> None:
    [_, text, _, device] = disk_argv(NEW[0], DeviceModel.PARAVIRTUAL, Firmware.BIOS)
    options = json.loads(text)
    assert device == "virtio-blk-pci,drive=disk0-1,id=disk0-dev,bootindex=1"
    below = options["backing"]
    assert (below["file"]["filename"], below["read-only"]) == (str(LAYER), True)
    assert (below["backing"]["file"]["filename"], below["backing"]["backing"]) == (str(IMAGE), None)
    assert backing_files(argv(NEW)) == [str(LAYER), str(IMAGE), "/layers/m/disk.qcow2"]


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: groups of layers, which are root's to give")
def test_a_process_may_read_what_other_vms_froze(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("image", "layer", "other")]
    for path, group, mode in zip(paths, (1_900_000_001, 1_900_000_002, 0), (0o444, 0o440, 0o440), strict=True):
        path.touch()
        os.chown(path, 0, group)
        path.chmod(mode)
    disk = BootDisk(path=Path("disks/disk0.qcow2"), layers=(paths[2], paths[1]), backing=paths[0])
    assert groups_for(argv((disk,))) == [1_900_000_002]
