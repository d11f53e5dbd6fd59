"""QEMU takes the devices as they are written for it: what golden files say is worth nothing if it refuses them."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.drivers.base import BootDisk, BootNic
from polyvisor.drivers.qemu.argv import build_argv
from polyvisor.drivers.qemu.devices import IDE_PLACES, disk_argv, display_argv, seed_argv
from polyvisor.host.plan import numbered
from polyvisor.host.record import Record
from polyvisor.images.image import Image, ImageFile, Seed
from polyvisor.spec.vm import DeviceModel, Disk, Firmware, Nic, VMSpec
from tests.golden.boots import BOOTS

pytestmark = pytest.mark.qemu
BOOT = BOOTS["debian-bios-tcg"]


@pytest.mark.parametrize("devices", DeviceModel)
@pytest.mark.parametrize(("machine", "firmware"), [("pc", Firmware.BIOS), ("q35", Firmware.UEFI)])
def test_as_many_disks_as_are_allowed(tmp_path: Path, machine: str, firmware: Firmware, devices: DeviceModel) -> None:
    disks = [BootDisk(path=tmp_path / f"disk{i}.qcow2", backing=None) for i in range(IDE_PLACES - 1)]
    for disk in disks:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk.path, "1M"], check=True)
    (tmp_path / "seed.iso").write_bytes(bytes(65536))
    argv = ["qemu-system-x86_64", "-machine", machine, "-accel", "tcg", "-nodefaults", "-S", "-monitor", "stdio"]
    argv += display_argv(devices)
    for disk in disks:
        argv += disk_argv(disk, devices, firmware)
    argv += seed_argv(tmp_path / "seed.iso", len(disks), devices, firmware)
    done = subprocess.run(argv, input="info block\nquit\n", capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"disk{i}" in done.stdout for i in range(len(disks)))


@pytest.mark.parametrize("devices", DeviceModel)
@pytest.mark.parametrize("firmware", [Firmware.BIOS, Firmware.UEFI])
def test_devices_are_where_they_are_written_down_to_be(
    tmp_path: Path, firmware: Firmware, devices: DeviceModel
) -> None:
    """Before the first change QEMU chooses their places: the record gets the same; and said outright, they are there."""
    image = Image(
        id="i", name="x", created_at=0, source="", disk=ImageFile(name="d", sha256="", size=0), seed=Seed.NOCLOUD
    )
    spec = VMSpec(name="a", image="x", devices=devices, firmware=firmware, disks=(Disk(), Disk()), nics=(Nic(), Nic()))
    record = numbered(Record(id=BOOT.id, created_at=0.0, spec=spec, image_id="i", memory_mib=128), image)
    assert record.slots is not None
    disks = tuple(BootDisk(path=tmp_path / f"disk{i}.qcow2") for i in range(2))
    for disk in disks:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk.path, "1M"], check=True)
    for name in ("seed", "code", "vars"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    boot = replace(
        BOOT,
        disks=disks,
        nics=tuple(BootNic(mac=f"52:54:00:aa:bb:0{i}", network="none", number=i) for i in range(2)),
        seed=tmp_path / "seed",
        uefi_vars=tmp_path / "vars" if firmware is Firmware.UEFI else None,
        firmware=firmware,
        devices=devices,
    )
    (tmp_path / "run").mkdir()
    for end in ("in", "out"):
        os.mkfifo(tmp_path / f"run/agent.{end}")
    asked = "".join(f'{{"execute": "{command}"}}\n' for command in ("qmp_capabilities", "query-pci", "quit"))
    for slots in ({}, record.slots):
        argv = build_argv("qemu-system-x86_64", replace(boot, slots=slots), tmp_path / "code")
        words = [*argv, "-S", "-qmp", "stdio"]
        done = subprocess.run(words, cwd=tmp_path, input=asked, capture_output=True, text=True, check=False, timeout=60)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        [buses] = [each["return"] for each in answers if isinstance(each.get("return"), list)]
        places = {each["slot"]: each["qdev_id"].removesuffix("-dev") for bus in buses for each in bus["devices"]}
        for name, slot in record.slots.items():
            assert places.get(slot) == ("" if name in ("rng", "vga") else name), (name, places)
