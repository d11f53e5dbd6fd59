"""What the user wants: the spec of a VM.

Each setting is declared once, here: its name and type give the key in a spec file, its metadata (`setting`) gives the
flag of the command line and the line in the documentation. Values that can't be meant are refused when a spec is made.
"""

from __future__ import annotations

import re
from dataclasses import field
from enum import StrEnum
from typing import Any

from polyvisor.errors import InvalidInput
from polyvisor.spec.cpus import ALL_CPUS, parse_cpus
from polyvisor.spec.forward import parse_forward
from polyvisor.spec.resources import NORMAL_WEIGHT
from polyvisor.values import dataclass

MAX_VCPUS = 255
MIN_MEMORY_MIB = 16
MAX_MEMORY_MIB = 16 << 20
MAX_WEIGHT = 10_000
MAX_LIMIT = 100 * MAX_VCPUS
MAX_IOPS = 10_000_000
MAX_RATE_MIB = 1 << 20
MAX_DISK_GIB = 64 << 10
MAX_DISKS = 16
MAX_NICS = 8
MAX_USER_DATA = 512 << 10

NESTED = "nested"

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_CPU = re.compile(r"(?!help\Z)[A-Za-z0-9][A-Za-z0-9._+-]{0,63}\Z")
_PRIVATE = re.compile(r"private:[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?\Z")
_MAC = re.compile(r"[0-9a-f][02468ace](?::[0-9a-f]{2}){5}\Z")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?\Z")
_SSH_KEY = re.compile(r"(?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]+(?: [^\r\n\0]*)?\Z")


class Hypervisor(StrEnum):
    """What runs the guest's instructions; `AUTO` takes the best that was proved to work on the host."""

    AUTO = "auto"
    KVM = "kvm"
    XEN = "xen"
    TCG = "tcg"


class Mode(StrEnum):
    """Virtualization mode; on QEMU `PVH` is direct kernel boot and `HVM` firmware boot."""

    AUTO = "auto"
    PV = "pv"
    PVH = "pvh"
    HVM = "hvm"


class DeviceModel(StrEnum):
    """Devices that the guest sees: virtio or Xen front-ends, or emulated hardware (IDE, e1000, VGA)."""

    PARAVIRTUAL = "paravirtual"
    EMULATED = "emulated"


class Firmware(StrEnum):
    AUTO = "auto"
    BIOS = "bios"
    UEFI = "uefi"


class OnReboot(StrEnum):
    """What a reboot inside the guest does to the VM."""

    RESTART = "restart"
    STOP = "stop"


def setting(about: str, **details: Any) -> dict[str, Any]:
    """Metadata of a setting: `about` documents it; `flag` is its command-line flag, where not --name-with-dashes."""
    return {"about": about, **details}


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A disk: the first one is the image's, where that has one, grown to `size_gib`; others are blank."""

    size_gib: int | None = field(default=None, metadata=setting("size in GiB; by default the image's, or 1"))

    def __post_init__(self) -> None:
        if self.size_gib is not None:
            _check_range("size_gib", self.size_gib, 1, MAX_DISK_GIB, "GiB")


def disk_size(size_gib: int | None) -> str:
    """What a spec says of a disk's size, for people."""
    return f"{size_gib} GiB" if size_gib else "as the image"


@dataclass(frozen=True, kw_only=True)
class Nic:
    """A network card, on a network that needs no rights.

    On `user` the guest reaches out, and `forwards` lead in. On `private:NAME` are the VMs of this home that ask for it, with
    addresses of their own choice, and nobody else.
    """

    network: str = field(
        default="user",
        metadata=setting("the network it is on: user, private:NAME, or none for a card without a cable"),
    )
    mac: str | None = field(default=None, metadata=setting("MAC address; by default derived from the VM's id"))
    forwards: tuple[str, ...] = field(
        default=(), metadata=setting("ports of the host that lead to the guest, as 2222:22")
    )

    def __post_init__(self) -> None:
        if self.network not in ("user", "none") and not _PRIVATE.match(self.network):
            hint = "use user, none, or private:NAME (a-z 0-9 -, at most 32)"
            raise InvalidInput("network", self.network, "is not a network of this host", hint=hint)
        if self.mac is not None and not _MAC.match(self.mac):
            raise InvalidInput("mac", self.mac, "is not a unicast MAC address", hint="write it as 52:54:00:12:34:56")
        for i, text in enumerate(self.forwards):
            parse_forward(text, f"forwards[{i}]")
        if self.forwards and self.network != "user":
            raise InvalidInput(
                "forwards",
                list(self.forwards),
                f"network '{self.network}' has no port forwards",
                hint="use network: user",
            )


@dataclass(frozen=True, kw_only=True)
class VMSpec:
    """A VM as its user wants it.

    Raises InvalidInput, naming the field, for values that can't be meant.
    """

    name: str = field(metadata=setting("name of the VM, and its host name: a-z 0-9 -, at most 63"))
    image: str = field(metadata=setting("image that it boots, from the image store or the catalogue"))
    vcpus: int = field(
        default=1, metadata=setting("number of virtual CPUs", flag="--vcpus", short="-c", aliases=["--cpus"])
    )
    memory_mib: int | None = field(
        default=None,
        metadata=setting(
            "memory in MiB; by default what the image recommends", flag="--memory", short="-m", unit="MiB"
        ),
    )
    vcpus_max: int | None = field(
        default=None, metadata=setting("how many virtual CPUs it can have while it runs; by default what it has")
    )
    memory_max_mib: int | None = field(
        default=None,
        metadata=setting(
            "how much memory it can have while it runs, in MiB; by default what it has", flag="--memory-max", unit="MiB"
        ),
    )
    cpu_weight: int = field(
        default=NORMAL_WEIGHT,
        metadata=setting(
            "share of the host's CPUs where they are scarce, 1 to 10000: twice the weight, twice the time"
        ),
    )
    cpu_limit: int | None = field(
        default=None, metadata=setting("most CPU time in percent of one of the host's CPUs; by default no limit")
    )
    cpu_affinity: str = field(
        default=ALL_CPUS, metadata=setting("CPUs of the host that it runs on, as 0-3,6; by default all")
    )
    disk_iops_limit: int | None = field(
        default=None,
        metadata=setting("most requests a second, reads and writes, of all its disks together; by default no limit"),
    )
    disk_rate_limit_mib: int | None = field(
        default=None,
        metadata=setting(
            "most MiB a second, read and written, of all its disks together; by default no limit",
            flag="--disk-rate-limit",
            unit="MiB/s",
        ),
    )
    hypervisor: Hypervisor = field(default=Hypervisor.AUTO, metadata=setting("auto, kvm, xen or tcg"))
    mode: Mode = field(
        default=Mode.AUTO,
        metadata=setting("virtualization mode: auto, pv (Xen alone), pvh (direct kernel) or hvm (firmware)"),
    )
    firmware: Firmware = field(default=Firmware.AUTO, metadata=setting("in mode hvm: auto, bios or uefi"))
    devices: DeviceModel = field(
        default=DeviceModel.PARAVIRTUAL, metadata=setting("device model: paravirtual or emulated")
    )
    cpu: str = field(
        default="auto",
        metadata=setting("CPU model: auto, nested (the guest can run VMs), or a name that the hypervisor knows"),
    )
    cmdline: str = field(default="", metadata=setting("words to add to the kernel's command line, in mode pvh"))
    disks: tuple[Disk, ...] = field(default=(), metadata=setting("disks, in order", flag="--disk"))
    nics: tuple[Nic, ...] = field(default=(Nic(),), metadata=setting("network cards, in order", flag="--nic"))
    ssh_keys: tuple[str, ...] = field(
        default=(), metadata=setting("public SSH keys, or files that hold them, allowed to log in", flag="--ssh-key")
    )
    user_data: str | None = field(default=None, metadata=setting("cloud-init user data", flag="--user-data", file=True))
    on_reboot: OnReboot = field(
        default=OnReboot.RESTART, metadata=setting("a reboot inside the guest: restart or stop")
    )
    labels: dict[str, str] = field(default_factory=dict, metadata=setting("labels, as key: value", flag="--label"))

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_range("vcpus", self.vcpus, 1, MAX_VCPUS, "")
        if self.memory_mib is not None:
            _check_range("memory_mib", self.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB, "MiB")
        self._check_resources()
        self._check_texts()
        _check_count("disks", self.disks, MAX_DISKS)
        _check_count("nics", self.nics, MAX_NICS)
        for key, value in self.labels.items():
            if not _LABEL.match(key):
                raise InvalidInput("labels", key, "is not a label", hint="use 1 to 63 of A-Z a-z 0-9 . _ / -")
            if len(value) > 255 or not value.isprintable():
                raise InvalidInput(
                    f"labels.{key}", value, "is not a label's value", hint="use at most 255 printable characters"
                )

    def _check_resources(self) -> None:
        if self.vcpus_max is not None:
            _check_range("vcpus_max", self.vcpus_max, 1, MAX_VCPUS, "")
            check_most("vcpus", self.vcpus, self.vcpus_max)
        if self.memory_max_mib is not None:
            _check_range("memory_max_mib", self.memory_max_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB, "MiB")
            check_most("memory_mib", self.memory_mib or 0, self.memory_max_mib)
        _check_range("cpu_weight", self.cpu_weight, 1, MAX_WEIGHT, "")
        if self.cpu_limit is not None:
            _check_range("cpu_limit", self.cpu_limit, 1, MAX_LIMIT, "percent of one CPU")
        if self.disk_iops_limit is not None:
            _check_range("disk_iops_limit", self.disk_iops_limit, 1, MAX_IOPS, "requests a second")
        if self.disk_rate_limit_mib is not None:
            _check_range("disk_rate_limit_mib", self.disk_rate_limit_mib, 1, MAX_RATE_MIB, "MiB a second")
        if self.cpu_affinity != ALL_CPUS:
            parse_cpus(self.cpu_affinity)

    def _check_texts(self) -> None:
        if not self.image or not self.image.isprintable() or len(self.image) > 4096:
            raise InvalidInput("image", self.image, "is not the name of an image", hint="polyvisor image ls shows them")
        if not _CPU.match(self.cpu):
            raise InvalidInput(
                "cpu", self.cpu, "is not a CPU model", hint="use auto, or see qemu-system-x86_64 -cpu help"
            )
        if len(self.cmdline) > 1024 or not self.cmdline.isprintable():
            raise InvalidInput(
                "cmdline", self.cmdline, "is not a kernel command line", hint="at most 1024 printable characters"
            )
        if self.user_data is not None:
            _check_user_data(self.user_data)
        for i, key in enumerate(self.ssh_keys):
            if not _SSH_KEY.match(key) or not key.isprintable():
                raise InvalidInput(
                    f"ssh_keys[{i}]", key, "is not a public SSH key", hint="ssh-keygen -t ed25519 makes a pair"
                )


def _check_user_data(text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidInput("user_data", text, "can't be written in UTF-8", hint="leave half characters out") from error
    if size > MAX_USER_DATA:
        raise InvalidInput("user_data", text, "is larger than 512 KiB", hint="let it fetch what is large")


def check_name(name: str) -> str:
    """`name`, where it may name a VM; raises InvalidInput otherwise."""
    if not _NAME.match(name):
        raise InvalidInput(
            "name",
            name,
            "is not a VM name",
            hint="use 1 to 63 of a-z 0-9 -, beginning and ending with a letter or a digit",
        )
    return name


def check_most(key: str, value: int, most: int) -> None:
    """Raise InvalidInput where `most`, the largest value that setting `key` may have while the VM runs, is below `value`."""
    if most < value:
        base, _, unit = key.partition("_")
        hint = f"use at least {value}, or {'fewer' if base == 'vcpus' else 'less'} {base}"
        raise InvalidInput(f"{base}_max{'_' if unit else ''}{unit}", most, f"is less than {key} ({value})", hint=hint)


def _check_range(key: str, value: int, lowest: int, highest: int, unit: str) -> None:
    if not lowest <= value <= highest:
        suffix = f" {unit}" if unit else ""
        raise InvalidInput(key, value, "is out of range", hint=f"use {lowest} to {highest}{suffix}")


def _check_count(key: str, values: tuple[Any, ...], highest: int) -> None:
    if len(values) > highest:
        raise InvalidInput(key, len(values), "are too many", hint=f"use at most {highest}")
