"""QEMU options for disks, network cards and displays, in both device models.

Block nodes are named outright, with their drivers and the whole chain of backing files: QEMU never guesses a format and
never follows a name that is written inside an image.
"""

from __future__ import annotations

import itertools
import json
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyvisor.drivers.base import BootDisk, BootNic
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import DeviceModel, Firmware

# Places on the IDE controller of the machine `pc`; `q35` has two more, which nobody is to miss after a change of firmware.
IDE_PLACES = 4
_LOOPBACK = "127.0.0.1"
_NAMES = {"virtio-rng-pci": "rng", "VGA": "vga"}  # of devices without an id
_DISK = re.compile(r"disk([0-9]+)(?:-[0-9]+)?\Z")
_DRIVE = re.compile(r",drive=disk([0-9]+)(?:-[0-9]+)?(?=,|\Z)")


def disk_argv(disk: BootDisk, devices: DeviceModel, firmware: Firmware) -> list[str]:
    """A qcow2 disk, with all that it stands on under it; the first one is booted from."""
    number = disk.number
    boot = ",bootindex=1" if number == 0 else ""
    device = f"ide-hd,{ide_place(number, firmware)}" if devices is DeviceModel.EMULATED else "virtio-blk-pci"
    return ["-blockdev", _json(disk_options(disk)), "-device", f"{device},drive={disk.node},id=disk{number}-dev{boot}"]


def disk_options(disk: BootDisk, *, alone: bool = False) -> dict[str, Any]:
    """A disk as QEMU's blockdev-add takes it; `alone` without what is below it."""
    return {
        "node-name": disk.node,
        "driver": "qcow2",
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(disk.path), "discard": "unmap"},
        "backing": None if alone else _backing([*disk.layers, *([disk.backing] if disk.backing else [])]),
    }


def with_disks(argv: Sequence[str], disks: Sequence[BootDisk]) -> tuple[str, ...]:
    """The arguments `argv` of a VM as they are with `disks` in place of those of the same numbers."""
    words, by_number = list(argv), {disk.number: disk for disk in disks}
    for i, (option, value) in enumerate(itertools.pairwise(argv), 1):
        if option == "-blockdev" and value.startswith("{"):
            if match := _DISK.match(str(json.loads(value).get("node-name", ""))):
                words[i] = _json(disk_options(by_number[int(match[1])]))
        elif option == "-device" and (match := _DRIVE.search(value)):
            words[i] = f"{value[: match.start()]},drive={by_number[int(match[1])].node}{value[match.end() :]}"
    return tuple(words)


def pinned(argv: Sequence[str], slots: Mapping[str, int]) -> list[str]:
    """The arguments `argv` with each device where `slots` says that it is on the PCI bus, unless its place is given already."""
    words = list(argv)
    for i, (option, value) in enumerate(itertools.pairwise(argv), 1):
        if option == "-device" and (slot := slots.get(device_name(value))) is not None and ",addr=" not in value:
            words[i] = f"{value},addr=0x{slot:x}"
    return words


def device_name(value: str) -> str:
    """The name of a device, as in the record's `slots`, by its value of -device."""
    kind, *properties = value.split(",")
    name = next((word.removeprefix("id=") for word in properties if word.startswith("id=")), _NAMES.get(kind, kind))
    return name.removesuffix("-dev")


def ide_place(index: int, firmware: Firmware) -> str:
    """Where disk `index` is attached: `pc` has two IDE buses for two disks each, `q35` SATA ports for one each."""
    return f"bus=ide.{index}" if firmware is Firmware.UEFI else f"bus=ide.{index // 2},unit={index % 2}"


def seed_argv(seed: Path | None, index: int, devices: DeviceModel, firmware: Firmware) -> list[str]:
    """The NoCloud seed, as disk `index`, read-only."""
    if seed is None:
        return []
    file = {"driver": "file", "filename": str(seed), "read-only": True}
    options = {"node-name": "seed", "driver": "raw", "read-only": True, "file": file}
    device = f"ide-cd,{ide_place(index, firmware)}" if devices is DeviceModel.EMULATED else "virtio-blk-pci"
    return ["-blockdev", _json(options), "-device", f"{device},drive=seed,id=seed-dev"]


def nic_argv(nic: BootNic, devices: DeviceModel) -> list[str]:
    """A network card. It carries no boot ROM: nothing boots from the network here, and loading one costs time."""
    model = "e1000" if devices is DeviceModel.EMULATED else "virtio-net-pci"
    device = f"{model},mac={nic.mac},id={nic.name}-dev,romfile="
    if nic.network == "none":
        return ["-device", device]
    return ["-netdev", netdev(nic), "-device", f"{device},netdev={nic.name}"]


def netdev(nic: BootNic) -> str:
    """What a card is plugged into: a private network, or its user network with the ports of the host that lead there."""
    if nic.group is not None:
        return f"socket,id={nic.name},mcast={nic.group},localaddr={_LOOPBACK}"
    forwards = "".join(f",hostfwd={hostfwd(forward)}" for forward in nic.forwards)
    # Each card on a subnet of its own, or the guest would answer by the wrong one; the first has slirp's usual 10.0.2.0.
    subnet = f",net=10.0.{nic.number + 2}.0/24" if nic.number else ""
    return f"user,id={nic.name}{subnet}{forwards}"


def display_argv(devices: DeviceModel) -> list[str]:
    """No window; with emulated devices a VGA card, which some guests need to boot."""
    return ["-display", "none", *(["-device", "VGA"] if devices is DeviceModel.EMULATED else [])]


def hostfwd(forward: Forward) -> str:
    """A port forward as slirp writes it: PROTOCOL:HOST_ADDRESS:HOST_PORT-GUEST_ADDRESS:GUEST_PORT."""
    return f"{forward.protocol}:{forward.host_address}:{forward.host_port}-:{forward.guest_port}"


def groups_for(argv: Sequence[str]) -> list[int]:
    """The groups through which an unprivileged QEMU may open /dev/kvm, and layers of disks that other VMs had.

    Root's own would open more than those.
    """
    groups = {Path("/dev/kvm").stat().st_gid} if "kvm" in argv else set()
    below = [Path(file).stat() for file in backing_files(argv)]
    return sorted((groups | {each.st_gid for each in below if not each.st_mode & stat.S_IROTH}) - {0})


def backing_files(argv: Sequence[str]) -> list[str]:
    """The files that the disks in the arguments `argv` stand on."""
    found = []
    for option, value in itertools.pairwise(argv):
        below = json.loads(value).get("backing") if option == "-blockdev" and value.startswith("{") else None
        while below:
            found.append(str(below["file"]["filename"]))
            below = below["backing"]
    return found


def _backing(paths: Sequence[Path]) -> dict[str, Any] | None:
    """The files `paths`, each above the next."""
    below = None
    for path in reversed(paths):
        file = {"driver": "file", "filename": str(path), "read-only": True}
        below = {"driver": "qcow2", "read-only": True, "backing": below, "file": file}
    return below


def _json(options: dict[str, Any]) -> str:
    return json.dumps(options, separators=(",", ":"))
