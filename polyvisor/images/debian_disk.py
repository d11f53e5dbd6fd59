"""The disk of the image `debian`: what stands where, what boots it, and the guest's files that depend on it."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID, uuid4

from polyvisor.images import grub
from polyvisor.images.fat import fat32
from polyvisor.images.flavours import Flavour
from polyvisor.images.partition import BIOS_BOOT, EFI_SYSTEM, LINUX_ROOT_X86_64, MIB, Partition, gpt
from polyvisor.values import dataclass

CONSOLES = "console=tty0 console=hvc0 console=ttyS0,115200"
"""Kernel messages on all that exist (hvc0 on Xen in modes pv and pvh); the last is /dev/console, logins are on every one."""
KERNEL_OPTIONS = f"{CONSOLES} no_timer_check"
"""With what keeps an emulated guest on a busy host from a panic (see `tiny.CMDLINE`)."""
XEN_CONSOLES = "console=tty0 console=hvc0"
"""The same for a dom0, whose serial port is Xen's."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """The disk to be: its size in bytes, its partitions by number as Debian's own cloud images number them."""

    size: int
    root: Partition
    bios: Partition
    efi: Partition

    @property
    def root_uuid(self) -> UUID:
        """Of the root file system; its partition has another."""
        return self.root.uuid

    @property
    def partitions(self) -> tuple[Partition, ...]:
        return (self.root, self.bios, self.efi)


def plan_disk(size: int) -> Disk:
    """BIOS boot and EFI partitions first, then the root file system to the end, where it can grow."""
    efi_start = 2 * MIB
    root_start = efi_start + 64 * MIB
    return Disk(
        size=size,
        root=Partition(
            number=1,
            kind=LINUX_ROOT_X86_64,
            uuid=uuid4(),
            name="root",
            start=root_start,
            size=size - root_start - MIB,  # the last MiB holds the second partition table
        ),
        bios=Partition(number=14, kind=BIOS_BOOT, uuid=uuid4(), name="bios", start=MIB, size=MIB),
        efi=Partition(number=15, kind=EFI_SYSTEM, uuid=uuid4(), name="efi", start=efi_start, size=64 * MIB),
    )


def cmdline(disk: Disk, options: str = KERNEL_OPTIONS) -> str:
    """The kernel's command line, for GRUB and for direct boot."""
    return f"root=UUID={disk.root_uuid} ro {options}"


def generated_files(disk: Disk, flavour: Flavour) -> dict[str, str]:
    """The files that depend on the disk. `rootfs` is copied before the kernel is installed, `boot` after."""
    generated = {
        "rootfs/etc/fstab": f"UUID={disk.root_uuid} / ext4 errors=remount-ro 0 1\n"
        f"PARTUUID={disk.efi.uuid} /boot/efi vfat noauto,umask=0077 0 0\n",
        "rootfs/etc/grub.d/01_serial": f"#!/bin/sh\ncat <<'EOF'\n{grub.SERIAL}EOF\n",
        "boot/early.cfg": grub.early_config(disk.root_uuid),
        "boot/grub.cfg": flavour.grub_config(
            disk.root_uuid, cmdline(disk, XEN_CONSOLES if flavour.xen else KERNEL_OPTIONS)
        ),
    }
    if flavour.xen is not None:
        generated["rootfs/etc/default/grub.d/polyvisor-xen.cfg"] = grub.xen_defaults(flavour.xen, XEN_CONSOLES)
    return generated


def write_boot(work: Path, disk: Disk) -> None:
    """Write partition table, boot sector, GRUB and the EFI partition around the file system in `work`/disk.raw."""

    def read(name: str) -> bytes:
        return (work / name).read_bytes()

    begin, end = gpt(uuid4(), disk.size, disk.partitions)
    esp = {
        # Secure Boot: firmware trusts shim, shim trusts Debian's GRUB (which it looks for beside itself by this name).
        "EFI/BOOT/BOOTX64.EFI": read("shim.efi"),
        "EFI/BOOT/grubx64.efi": read("grub.efi"),
        "EFI/debian/grub.cfg": grub.efi_config(disk.root_uuid).encode(),
    }
    core = grub.embedded_core(read("core.img"), disk.bios.start, disk.bios.size)
    with (work / "disk.raw").open("r+b") as raw:
        raw.write(grub.boot_sector(read("boot.img"), begin, disk.bios.start) + begin[grub.SECTOR :])
        _write_at(raw.fileno(), disk.bios.start, core)
        _write_at(raw.fileno(), disk.efi.start, fat32(disk.efi.size, esp, serial=disk.efi.uuid.fields[0]))
        _write_at(raw.fileno(), disk.size - len(end), end)


def _write_at(fd: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
