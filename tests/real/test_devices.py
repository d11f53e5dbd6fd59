"""QEMU takes the devices as they are written for it: what golden files say is worth nothing if it refuses them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from polyvisor.drivers.base import BootDisk
from polyvisor.drivers.qemu.devices import IDE_PLACES, disk_argv, display_argv, seed_argv
from polyvisor.spec.vm import DeviceModel, Firmware

pytestmark = pytest.mark.qemu


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
