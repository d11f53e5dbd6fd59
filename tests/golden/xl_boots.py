"""VMs whose configurations for `xl` are kept as golden files (tests/golden/xl/NAME.cfg)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from polyvisor.drivers.base import BootDisk, BootNic
from polyvisor.drivers.xen.config import build_config
from polyvisor.spec.vm import DeviceModel, Firmware, Mode, OnReboot
from tests.golden.boots import AWKWARD, DEBIAN, TINY

XL_DIRECTORY = Path(__file__).parent / "xl"
VM_DIRECTORY = Path("/var/lib/polyvisor/vms/web-1")

_TINY = replace(TINY, accelerator="xen")
_DISK = BootDisk(path=Path("disks/disk0.qcow2"))
XL_BOOTS = {
    "pv": replace(_TINY, mode=Mode.PV),
    "pvh": _TINY,
    "hvm": replace(DEBIAN, accelerator="xen", firmware=Firmware.BIOS),
    "hvm-kernel": replace(_TINY, mode=Mode.HVM),
    "hvm-emulated": replace(DEBIAN, accelerator="xen", devices=DeviceModel.EMULATED),
    "pv-disks": replace(
        _TINY, mode=Mode.PV, disks=(_DISK, BootDisk(path=Path("disks/disk1.qcow2"))), seed=Path("disks/seed.iso")
    ),
    "pv-loader": replace(_TINY, mode=Mode.PV, kernel=None, initrd=None, cmdline="", disks=(_DISK,)),
    "no-cable": replace(_TINY, nics=(BootNic(mac="52:54:00:aa:bb:01", network="none"),)),
    "no-card": replace(_TINY, nics=()),
    "room-to-grow": replace(
        _TINY, vcpus_max=4, memory_max_mib=1024, cpu_weight=200, cpu_limit=150, cpu_affinity="0-1,3"
    ),
    "reboot-stops": replace(_TINY, on_reboot=OnReboot.STOP),
    "awkward": replace(_TINY, kernel=AWKWARD / "kernel", cmdline='a="b" c=\\n on_crash = "preserve"', disks=(_DISK,)),
}


def configuration(name: str) -> str:
    """The configuration of one of them; guests that are given no kernel get a GRUB where they need one."""
    return build_config(XL_BOOTS[name], VM_DIRECTORY, Path("/usr/lib/grub-xen/grub-x86_64-xen.bin"))


def xl_golden(name: str) -> Path:
    return XL_DIRECTORY / f"{name}.cfg"
