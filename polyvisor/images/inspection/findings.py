"""What was found in an image, and what follows from it: plain values, which go over the wire and into `--json` as they are."""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from polyvisor.values import dataclass


class Target(StrEnum):
    """A hypervisor with a way to boot. `QEMU_PVH` is handed a kernel; the disk's firmware or GRUB boots the others."""

    QEMU_PVH = "qemu-pvh"
    QEMU_BIOS = "qemu-hvm-bios"
    QEMU_UEFI = "qemu-hvm-uefi"
    XEN_PV = "xen-pv"
    XEN_PVH = "xen-pvh"
    XEN_HVM = "xen-hvm"


class Boots(StrEnum):
    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an image boots in `target`; `devices` are the device models with which it (perhaps) does."""

    target: Target
    boots: Boots
    reason: str
    devices: tuple[str, ...] = ()


class Driver(StrEnum):
    """Where a driver is when the root file system is looked for: in the kernel, in the initramfs, too late, nowhere."""

    BUILT_IN = "built in"
    INITRAMFS = "in the initramfs"
    LATER = "a module outside of the initramfs"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class PartitionFound:
    """A partition, or (number 0) a whole disk without any; `start` and `size` in bytes. `problem`: why it was not read."""

    number: int
    start: int
    size: int
    kind: str
    partuuid: str | None = None
    name: str | None = None
    filesystem: str | None = None
    label: str | None = None
    uuid: str | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class FirmwareFound:
    """What firmware finds on a disk: `table` is gpt, mbr or none; `boot_code` whose code the first sector has (none, grub …).

    `removable` is \\EFI\\BOOT\\BOOTX64.EFI, the one loader that firmware starts that has never seen the disk; `loaders` are
    others on the EFI system partition. `problem` says why that partition could not be read.
    """

    table: str
    boot_code: str
    bios_boot: bool = False
    esp: bool = False
    removable: bool = False
    loaders: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class KernelFound:
    """A kernel with its initramfs. `packing` is how the kernel proper is compressed, "none" for one that is not.

    `xen_pv` and `xen_pvh`: whether it has Xen's entry points for these modes, None where it can't be told; `known_by` says
    what told. `drivers` are by the kernel's names. `initrd_problem`: why the initramfs could not be looked into; what is in
    it was then taken from what made it (`initrd_known_by`), or is unknown.
    """

    path: str
    version: str | None
    architecture: str
    packing: str | None
    xen_pv: bool | None = None
    xen_pvh: bool | None = None
    known_by: str = ""
    initrd: str | None = None
    initrd_packing: str | None = None
    initrd_known_by: str = ""
    initrd_problem: str | None = None
    drivers: dict[str, Driver] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class SystemFound:
    """The system on a disk, or what is known of it. `root` is the kernel's root=, `devices` what else names disks by device.

    `problem` says why the root file system could not be read.
    """

    name: str | None = None
    root: str | None = None
    cmdline: str | None = None
    cmdline_from: str | None = None
    devices: tuple[str, ...] = ()
    consoles: tuple[str, ...] = ()
    gettys: tuple[str, ...] = ()
    grub_config: str | None = None
    cloud_init: bool | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that was found. `direct` is the kernel beside the disk, which is handed over; `kernels` are those on the disk."""

    disk: bool
    direct: KernelFound | None = None
    direct_root: str | None = None
    direct_consoles: tuple[str, ...] = ()
    firmware: FirmwareFound | None = None
    partitions: tuple[PartitionFound, ...] = ()
    kernels: tuple[KernelFound, ...] = ()
    system: SystemFound | None = None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """`image` (a name, or a path) and what it can boot in."""

    image: str
    verdicts: tuple[Verdict, ...]
    findings: Findings
