"""What a VM's directory says about it: its record (`vm.json`) and its launch record (`launch.json`).

The record is the intent: the spec as the user gave it, with what was fixed when the VM was made. The launch record is
how the VM was last started: exact arguments, versions, ports. Both are JSON that people can read; neither holds status.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyvisor.spec.forward import Forward
from polyvisor.spec.parse import structure, unstructure
from polyvisor.spec.resources import Resources
from polyvisor.spec.vm import VMSpec
from polyvisor.values import dataclass

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """A VM as it was made.

    `image_id` is the image that its disks stand on; `user` the numeric user that its QEMU runs as (None: the caller's
    own); `created_at` in seconds since the epoch.

    `layers` are the frozen layers that its disks stand on, in their order (None, or missing: the image, or nothing);
    `generation` is how often its disks have got new overlays, which have it in their names; `snapshot` is the one that these
    began with. `origin` is the id of the VM that it was cloned from: then its disks hold that one's identity.

    Where disks or cards were added or removed after the VM was made, `disk_numbers` and `nic_numbers` are the numbers of those
    in the spec, in its order, by which they keep their names, and `slots` says where each device is on the PCI bus, so
    that none moves when another one comes or goes. Otherwise they are missing: disks and cards are numbered from 0.
    """

    id: str
    created_at: float
    spec: VMSpec
    image_id: str
    memory_mib: int
    user: int | None = None
    layers: tuple[str | None, ...] = ()
    generation: int = 0
    snapshot: str | None = None
    origin: str | None = None
    disk_numbers: tuple[int, ...] = ()
    nic_numbers: tuple[int, ...] = ()
    slots: dict[str, int] | None = None

    def disk_number(self, index: int) -> int:
        """The number of the disk that is at `index` in the spec."""
        return self.disk_numbers[index] if index < len(self.disk_numbers) else index

    def nic_number(self, index: int) -> int:
        """The number of the network card that is at `index` in the spec."""
        return self.nic_numbers[index] if index < len(self.nic_numbers) else index

    def layer(self, index: int) -> str | None:
        """The frozen layer that disk `index` stands on."""
        return self.layers[index] if index < len(self.layers) else None


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Disks and network cards, each by its name: what the spec says of its size in GiB, or which network it is on."""

    disks: dict[str, int | None]
    nics: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a VM was last started. `boot_id` is the host's boot; after another boot the VM can't be running.

    `resources` are what its hypervisor was last told to give it, `devices` its disks and cards (None where an older Polyvisor
    has started it); `template` is the id of that whose memory it began with.
    """

    started_at: float
    boot_id: str
    hypervisor: str
    reason: str
    version: str
    mode: str
    argv: tuple[str, ...]
    forwards: tuple[Forward, ...] = ()
    resources: Resources | None = None
    template: str | None = None
    devices: Devices | None = None


def devices_of(record: Record) -> Devices:
    """The disks and cards that the spec of a record names, with their numbers: an image's own disk may be missing in it."""
    spec = record.spec
    return Devices(
        disks={disk_name(record.disk_number(i)): disk.size_gib for i, disk in enumerate(spec.disks)},
        nics={nic_name(record.nic_number(i)): nic.network for i, nic in enumerate(spec.nics)},
    )


def disk_name(number: int) -> str:
    return f"disk{number}"


def nic_name(number: int) -> str:
    return f"nic{number}"


def kind_of(name: str) -> str:
    """What kind of device has this name: disk, or nic."""
    return name.rstrip("0123456789")


def number_of(name: str) -> int:
    return int(name.removeprefix(kind_of(name)))


def resources_of(spec: VMSpec, memory_mib: int) -> Resources:
    """What a VM of `spec` is started with; `memory_mib` is what it has where the spec leaves that to its image."""
    return Resources(
        vcpus=spec.vcpus,
        vcpus_max=spec.vcpus_max or spec.vcpus,
        memory_mib=memory_mib,
        memory_max_mib=spec.memory_max_mib or memory_mib,
        cpu_weight=spec.cpu_weight,
        cpu_limit=spec.cpu_limit,
        cpu_affinity=spec.cpu_affinity,
        disk_iops_limit=spec.disk_iops_limit,
        disk_rate_limit_mib=spec.disk_rate_limit_mib,
    )


def record_to_json(record: Record) -> str:
    plain = {**{key: getattr(record, key) for key in _RECORD_KEYS}, "spec": unstructure(record.spec)}
    plain |= {key: value for key in _OPTIONAL_KEYS if (value := getattr(record, key))}
    return json.dumps({"format": FORMAT, **plain}, indent=2) + "\n"


def record_from_json(text: str | bytes) -> Record:
    """The record that `record_to_json` wrote; raises ValueError or InvalidInput for anything else."""
    return structure(checked(text), Record)


def launch_to_json(launch: Launch) -> str:
    return json.dumps({"format": FORMAT, **asdict(launch)}, indent=2) + "\n"


def launch_from_json(text: str | bytes) -> Launch:
    """The launch record that `launch_to_json` wrote; raises ValueError or InvalidInput for anything else."""
    return structure(checked(text), Launch)


def new_id() -> str:
    """A random UUID (RFC 9562, version 4); the standard library's module for them costs more to import than this."""
    raw = bytearray(os.urandom(16))
    raw[6], raw[8] = raw[6] & 0x0F | 0x40, raw[8] & 0x3F | 0x80
    digits = raw.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def boot_id() -> str:
    """The kernel's identifier of this machine's present boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


_RECORD_KEYS = ("id", "created_at", "image_id", "memory_mib", "user")
_OPTIONAL_KEYS = ("layers", "generation", "snapshot", "origin", "disk_numbers", "nic_numbers", "slots")


def checked(text: str | bytes) -> dict[str, Any]:
    """The members of a file of ours, which is JSON and says its format; raises ValueError."""
    try:
        raw = json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    if not isinstance(raw, dict):
        raise ValueError("it is no JSON object")
    if (version := raw.pop("format", None)) != FORMAT:
        raise ValueError(f"its format is {version}; this Polyvisor reads {FORMAT}")
    return raw
