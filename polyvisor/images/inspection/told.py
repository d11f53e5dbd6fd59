"""Findings as lines for a person: what each is about, and what there is to say of it."""

from __future__ import annotations

from collections.abc import Iterator

from polyvisor.images.inspection.findings import (
    Driver,
    Findings,
    FirmwareFound,
    KernelFound,
    PartitionFound,
    SystemFound,
)

Line = tuple[str, str]


def lines(findings: Findings) -> Iterator[Line]:
    """All that is worth a line."""
    if findings.firmware is not None:
        yield "boot sector", _boot_sector(findings.firmware)
        yield "UEFI", _uefi(findings.firmware)
    yield from (_partition(part) for part in findings.partitions)
    if findings.system is not None:
        yield from _system(findings.system)
    if findings.direct is not None:
        yield from _kernel("kernel beside the disk" if findings.disk else "kernel", findings.direct)
    for index, kernel in enumerate(findings.kernels):
        yield from _kernel("kernel" if index else "default kernel", kernel)
    yield from (("note", text) for text in notes(findings))


def notes(findings: Findings) -> Iterator[str]:
    """What does not keep an image from booting, and is good to know."""
    consoles = findings.direct_consoles if findings.direct else findings.system.consoles if findings.system else ()
    if consoles and "hvc0" not in consoles:
        yield "its kernel says nothing on hvc0, Xen's console in modes pv and pvh (console=hvc0)"
    if consoles and not any(console.startswith("ttyS0") for console in consoles):
        yield "its kernel says nothing on ttyS0, the serial console (console=ttyS0)"
    if not consoles:
        yield "its kernel is not told of any console: it says nothing on the serial one (console=ttyS0, on Xen hvc0)"
    kernel = findings.direct or (findings.kernels[0] if findings.kernels else None)
    for driver, place in (("virtio_net", "QEMU"), ("xen_netfront", "Xen"), ("e1000", "QEMU, emulated")):
        if kernel and kernel.drivers.get(driver) is Driver.MISSING:
            yield f"its kernel has no {driver}: no network on {place}"
    if findings.system is not None and findings.system.cloud_init is False:
        yield "it has no cloud-init: host name and SSH keys don't reach it (image import --seed none)"


def _boot_sector(firmware: FirmwareFound) -> str:
    table = {"gpt": "GPT", "mbr": "MBR", "none": "no partitions"}.get(
        firmware.table, firmware.problem or firmware.table
    )
    bios = ", BIOS boot partition" if firmware.bios_boot else ""
    return f"{table}{bios}; boot code: {firmware.boot_code}"


def _uefi(firmware: FirmwareFound) -> str:
    if not firmware.esp:
        return "no EFI system partition"
    found = [*(["\\EFI\\BOOT\\BOOTX64.EFI"] if firmware.removable else []), *firmware.loaders]
    return ", ".join(found) or firmware.problem or "an EFI system partition without a loader"


def _partition(part: PartitionFound) -> Line:
    words = [part.filesystem or ("nothing that is known here" if not part.problem else "")]
    words += [f"{key}={value}" for key, value in (("LABEL", part.label), ("UUID", part.uuid)) if value]
    size = f"{part.size >> 20} MiB"
    where = f"partition {part.number}" if part.number else "disk"
    said = ", ".join([size, part.kind, " ".join(filter(None, words))]) if part.number else f"{size}, {' '.join(words)}"
    return where, said + (f": {part.problem}" if part.problem else "")


def _system(system: SystemFound) -> Iterator[Line]:
    yield "system", system.name or system.problem or "it does not say what it is"
    if system.name and system.problem:
        yield "system", system.problem
    yield "root", system.root or "not named"
    if system.cmdline is not None:
        yield "command line", f"{system.cmdline} ({system.cmdline_from})"
    if system.devices:
        yield "fstab", f"names {', '.join(system.devices)}"
    yield "GRUB", system.grub_config or "no menu"
    if system.gettys:
        yield "logins", ", ".join(system.gettys)
    if system.cloud_init is not None:
        yield "cloud-init", "yes" if system.cloud_init else "no"


def _kernel(label: str, kernel: KernelFound) -> Iterator[Line]:
    xen = ", ".join(f"{mode} {_told(has)}" for mode, has in (("pv", kernel.xen_pv), ("pvh", kernel.xen_pvh)))
    known = f" ({kernel.known_by})" if kernel.known_by else ""
    said = f"{kernel.path}, {kernel.version or 'version unknown'}, {kernel.architecture}, packed with {kernel.packing}"
    yield label, f"{said}; Xen: {xen}{known}" + (f"; {kernel.problem}" if kernel.problem else "")
    if kernel.initrd:
        by = f", known by {kernel.initrd_known_by}" if kernel.initrd_known_by else ", unknown"
        why = f" ({kernel.initrd_problem})" if kernel.initrd_problem else ""
        yield "initramfs", f"{kernel.initrd}, packed with {kernel.initrd_packing or 'unknown'}{by}{why}"
    else:
        yield "initramfs", "none"
    for place in Driver:
        if names := [name for name, where in kernel.drivers.items() if where is place]:
            yield "drivers", f"{place.value}: {', '.join(names)}"


def _told(has: bool | None) -> str:
    return "unknown" if has is None else "yes" if has else "no"
