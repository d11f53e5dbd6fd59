"""From findings to verdicts: pure.

Each target asks a list of questions, each answered by None, which is no doubt, or by a reason for "no" or for "unknown". The
first "no" decides; without one, the first "unknown"; without that the image boots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from polyvisor.images.bzimage import GRUB_UNPACKS
from polyvisor.images.inspection.bootconfig import device_family
from polyvisor.images.inspection.findings import (
    Boots,
    Driver,
    Findings,
    FirmwareFound,
    KernelFound,
    SystemFound,
    Target,
    Verdict,
)
from polyvisor.images.inspection.kernels import CONTENT
from polyvisor.values import dataclass

PARAVIRTUAL, EMULATED = "paravirtual", "emulated"
_GRUB_PATHS = ("/boot/grub/grub.cfg", "/grub/grub.cfg")
"""Where GRUB for Xen (package grub-xen-host) looks for a menu."""
_VIRTIO = ("virtio_pci", "virtio_blk")
_XEN = ("xen_blkfront",)
_IDE = ("ata_piix", "sd_mod")
_SATA = ("ahci", "sd_mod")


@dataclass(frozen=True)
class _Doubt:
    """An answer other than yes."""

    boots: Boots
    reason: str


_Answers = Iterable[_Doubt | None]


def verdicts(findings: Findings) -> tuple[Verdict, ...]:
    """A verdict for each target, in their order."""
    judges: dict[Target, Callable[[Findings], Verdict]] = {
        Target.QEMU_PVH: _qemu_pvh,
        Target.QEMU_BIOS: lambda found: _by_firmware(found, Target.QEMU_BIOS),
        Target.QEMU_UEFI: lambda found: _by_firmware(found, Target.QEMU_UEFI),
        Target.XEN_PV: lambda found: _xen(found, Target.XEN_PV),
        Target.XEN_PVH: lambda found: _xen(found, Target.XEN_PVH),
        Target.XEN_HVM: _xen_hvm,
    }
    return tuple(judge(findings) for judge in judges.values())


def _no(reason: str) -> _Doubt:
    return _Doubt(Boots.NO, reason)


def _unknown(reason: str) -> _Doubt:
    return _Doubt(Boots.UNKNOWN, reason)


def _decided(answers: _Answers) -> _Doubt | None:
    """The doubt that decides, None where there is none."""
    doubts = [answer for answer in answers if answer is not None]
    return next((doubt for doubt in doubts if doubt.boots is Boots.NO), doubts[0] if doubts else None)


def _verdict(target: Target, answers: _Answers, yes: str, device: str = PARAVIRTUAL) -> Verdict:
    doubt = _decided(answers)
    if doubt is None:
        return Verdict(target=target, boots=Boots.YES, reason=yes, devices=(device,))
    devices = (device,) if doubt.boots is Boots.UNKNOWN else ()
    return Verdict(target=target, boots=doubt.boots, reason=doubt.reason, devices=devices)


# QEMU


def _qemu_pvh(found: Findings) -> Verdict:
    target = Target.QEMU_PVH
    if (kernel := found.direct) is None:
        own = next((f": its own, {each.path}, stays on the disk" for each in found.kernels), "")
        return Verdict(target=target, boots=Boots.NO, reason=f"no kernel lies beside the disk to be handed over{own}")
    needed = _disk_drivers(found, kernel, "virtio", _VIRTIO, direct=True)
    answers = [_runs(kernel), *needed, _root(found, found.direct_root, "vd"), *_mounts(found, "vd")]
    return _verdict(
        target, answers, f"its kernel {_named(kernel)} is handed over; {_has(found, 'virtio', direct=True)}"
    )


def _by_firmware(found: Findings, target: Target) -> Verdict:
    """QEMU with firmware: with virtio devices, and with emulated ones, of which either will do."""
    uefi = target is Target.QEMU_UEFI
    start = [_no("it has no disk to boot from")] if not found.disk else [_uefi(found) if uefi else _bios(found)]
    first = "its removable UEFI loader starts" if uefi else f"{_code(found)} starts from its first sector"
    kernel = found.kernels[0] if found.kernels else None
    ways = [
        _verdict(
            target, [*start, *_system(found, kernel, what, drivers, family)], f"{first}; {_has(found, what)}", model
        )
        for what, drivers, family, model in (
            ("virtio", _VIRTIO, "vd", PARAVIRTUAL),
            ("SATA" if uefi else "IDE", _SATA if uefi else _IDE, "sd", EMULATED),
        )
    ]
    return _either(*ways)


def _either(paravirtual: Verdict, emulated: Verdict) -> Verdict:
    """One verdict of those on both device models."""
    best = next(
        (way for wish in (Boots.YES, Boots.UNKNOWN) for way in (paravirtual, emulated) if way.boots is wish), None
    )
    if best is None or paravirtual.boots is emulated.boots is Boots.UNKNOWN:
        return Verdict(
            target=paravirtual.target,
            boots=paravirtual.boots,
            reason=paravirtual.reason,
            devices=(*paravirtual.devices, *emulated.devices),
        )
    if best is emulated:
        reason = (
            f"with emulated devices alone (--devices emulated): {emulated.reason}; with virtio: {paravirtual.reason}"
        )
        return Verdict(target=best.target, boots=best.boots, reason=reason, devices=emulated.devices)
    also = (
        "; with emulated devices too"
        if emulated.boots is Boots.YES
        else f"; with emulated devices {emulated.boots}: {emulated.reason}"
    )
    devices = (*paravirtual.devices, *emulated.devices)
    return Verdict(target=best.target, boots=best.boots, reason=paravirtual.reason + also, devices=devices)


# Xen


def _xen(found: Findings, target: Target) -> Verdict:
    """Modes pv and pvh: a kernel is handed over, that of the image or GRUB, which boots the one on the disk."""
    pv = target is Target.XEN_PV
    entered: Callable[[KernelFound], _Doubt | None] = _entered_pv if pv else _entered_pvh
    if (kernel := found.direct) is not None:
        needed = _disk_drivers(found, kernel, "Xen's", _XEN, direct=True)
        answers = [
            _runs(kernel),
            entered(kernel),
            *needed,
            _root(found, found.direct_root, "xvd"),
            *_mounts(found, "xvd"),
        ]
        return _verdict(
            target,
            answers,
            f"its kernel {_named(kernel)} has Xen's entry for {target.value[4:]}; {_has(found, 'Xen', direct=True)}",
        )
    own = found.kernels[0] if found.kernels else None
    answers = [
        _grub(found),
        *([_runs(own), entered(own), _grub_unpacks(own) if pv else None] if own else []),
        *_system(found, own, "Xen's", _XEN, "xvd"),
    ]
    return _verdict(
        target, answers, f"GRUB for Xen boots its kernel {_named(own)} by its own menu; {_has(found, 'Xen')}"
    )


def _xen_hvm(found: Findings) -> Verdict:
    """Mode hvm: Xen's BIOS reads the emulated disk; a kernel that knows Xen goes on with Xen's own."""
    target = Target.XEN_HVM
    kernel = found.direct if not found.disk else found.kernels[0] if found.kernels else None
    if not found.disk:
        if kernel is None:
            return Verdict(target=target, boots=Boots.NO, reason="it has neither a disk nor a kernel")
        return _verdict(
            target, [_runs(kernel)], f"its kernel {_named(kernel)} is handed over by Xen's QEMU; it needs no disk"
        )
    firmware = found.firmware
    start = _bios(found)
    if start is not None and firmware and (firmware.removable or firmware.loaders):
        start = _Doubt(start.boots, f"{start.reason}, and Polyvisor's Xen guests don't boot by UEFI")
    first = f"{_code(found)} starts from its first sector"
    paravirtual = [start, *_system(found, kernel, "Xen's", _XEN, "xvd")]
    if kernel is not None and kernel.drivers.get("xen_blkfront") is Driver.MISSING:
        return _verdict(
            target, [start, *_system(found, kernel, "IDE", _IDE, "sd")], f"{first}; {_has(found, 'IDE')}", EMULATED
        )
    return _verdict(target, paravirtual, f"{first}; {_has(found, 'Xen')}")


def _entered_pv(kernel: KernelFound) -> _Doubt | None:
    if kernel.xen_pv is None:
        return _unknown(f"whether its kernel has Xen's entry for pv can't be told: {kernel.problem}")
    return None if kernel.xen_pv else _no(f"its kernel {_named(kernel)} has no Xen entry for pv (CONFIG_XEN_PV)")


def _entered_pvh(kernel: KernelFound) -> _Doubt | None:
    if kernel.xen_pvh is None:
        return _unknown(f"whether its kernel has Xen's entry for pvh can't be told: {kernel.problem}")
    return None if kernel.xen_pvh else _no(f"its kernel {_named(kernel)} has no Xen entry for pvh (CONFIG_XEN_PVH)")


def _grub(found: Findings) -> _Doubt | None:
    """Whether GRUB for Xen finds a menu on the disk."""
    if not found.disk:
        return _no("it has neither a kernel nor a disk")
    path = found.system.grub_config if found.system else None
    if path in _GRUB_PATHS:
        return None
    if path:
        return _no(f"its GRUB menu is {path}; GRUB for Xen looks for {' and '.join(_GRUB_PATHS)}")
    if unread := _unread(found):
        return _unknown(f"no GRUB menu was found, but {unread}")
    return _no("it has no GRUB menu (/boot/grub/grub.cfg) that GRUB for Xen could read, and no kernel beside its disk")


def _grub_unpacks(kernel: KernelFound) -> _Doubt | None:
    if kernel.packing is None:
        return _unknown(f"how its kernel is packed can't be told: {kernel.problem}")
    if kernel.packing in GRUB_UNPACKS:
        return None
    return _no(f"in mode pv GRUB itself unpacks the kernel, and can't unpack {kernel.packing}")


# What both ask


def _bios(found: Findings) -> _Doubt | None:
    firmware = _firmware(found)
    if firmware.boot_code == "none":
        return _no("its first sector holds no boot code")
    if firmware.boot_code.startswith("GRUB without"):
        return _no("GRUB's boot code leads to no core image")
    if firmware.table == "gpt" and not firmware.bios_boot and firmware.boot_code != "GRUB":
        return _no("its GPT has no partition that the boot code could go on to")
    if firmware.boot_code == "unknown":
        return _unknown("its first sector holds boot code of a loader that is not known here")
    return None


def _uefi(found: Findings) -> _Doubt | None:
    firmware = _firmware(found)
    if firmware.removable:
        return None
    if firmware.loaders:
        return _no(
            f"it has only {firmware.loaders[0]}, and no \\EFI\\BOOT\\BOOTX64.EFI: a new VM's firmware does not know of it"
        )
    if firmware.problem:
        return _unknown(firmware.problem)
    if not firmware.esp:
        return _no("it has no EFI system partition")
    return _no("its EFI system partition has no loader (\\EFI\\BOOT\\BOOTX64.EFI)")


def _system(
    found: Findings, kernel: KernelFound | None, what: str, drivers: tuple[str, ...], family: str
) -> list[_Doubt | None]:
    """Whether the system on the disk finds its disk as `drivers` and `family` have it."""
    if kernel is None:
        unread = _unread(found) or "no kernel was found in /boot"
        return [_unknown(unread)]
    system = found.system or SystemFound()
    if system.cmdline is None:
        return [_unknown(_unread(found) or "no boot menu was found that boots its kernel")]
    return [
        _runs(kernel),
        *_disk_drivers(found, kernel, what, drivers, direct=False),
        _root(found, system.root, family),
        *_mounts(found, family),
    ]


def _runs(kernel: KernelFound) -> _Doubt | None:
    """Whether it is a kernel for a 64-bit PC."""
    if kernel.architecture == "x86_64":
        return None
    if kernel.architecture == "unknown":
        return _unknown(
            f"its kernel {kernel.path} can't be read: {kernel.problem or 'it does not say of what kind it is'}"
        )
    return _no(f"its kernel {kernel.path} is for {kernel.architecture}, not x86-64")


def _disk_drivers(
    found: Findings, kernel: KernelFound, what: str, drivers: tuple[str, ...], *, direct: bool
) -> list[_Doubt | None]:
    """Whether the root file system's disk is driven; a system that lives in its initramfs has none."""
    if direct and not found.disk:
        return []
    return [_driver(kernel, what, driver) for driver in drivers]


def _driver(kernel: KernelFound, what: str, driver: str) -> _Doubt | None:
    match kernel.drivers.get(driver, Driver.UNKNOWN):
        case Driver.BUILT_IN | Driver.INITRAMFS:
            return None
        case Driver.LATER:
            return _no(f"its initramfs lacks {driver}, so it does not find {what} disks")
        case Driver.MISSING:
            return _no(f"its kernel {_named(kernel)} has no driver {driver} for {what} disks")
    if kernel.initrd_known_by == CONTENT or kernel.initrd is None:
        return _unknown(f"whether its kernel {_named(kernel)} has {driver} built in can't be told")
    return _unknown(f"whether its initramfs has {driver} can't be told: {kernel.initrd_problem}")


def _root(found: Findings, root: str | None, family: str) -> _Doubt | None:
    """Whether the root file system is named in a way that holds where disks are called `family`, and is there."""
    if root is None:
        return _unknown("nothing says where its root file system is (root=)") if found.disk else None
    if device_family(root) not in (None, family):
        return _no(f"its kernel is told root={root}; the disk would be called /dev/{family}a")
    if found.partitions and _is_nowhere(found, root):
        return _no(f"its kernel is told root={root}, and nothing on the disk has that name")
    return None


def _is_nowhere(found: Findings, root: str) -> bool:
    """Whether a root named by UUID, label or PARTUUID is not on the disk, all of which could be read."""
    if any(part.problem for part in found.partitions):
        return False
    key, _, value = root.partition("=")
    names = {
        "UUID": [part.uuid for part in found.partitions],
        "LABEL": [part.label for part in found.partitions],
        "PARTUUID": [part.partuuid for part in found.partitions],
    }
    return key in names and "/" not in value and value.lower() not in [name.lower() for name in names[key] if name]


def _mounts(found: Findings, family: str) -> list[_Doubt | None]:
    devices = found.system.devices if found.system else ()
    wrong = [device for device in devices if device_family(device) != family]
    return [_no(f"its /etc/fstab names {wrong[0]}; the disk would be called /dev/{family}a")] if wrong else []


def _firmware(found: Findings) -> FirmwareFound:
    return found.firmware or FirmwareFound(table="none", boot_code="none")


def _unread(found: Findings) -> str | None:
    """Why something that matters may have been overlooked."""
    problems = [f"partition {part.number}: {part.problem}" for part in found.partitions if part.problem]
    if problems:
        return problems[0]
    return found.system.problem if found.system else None


def _named(kernel: KernelFound | None) -> str:
    return (kernel.version or kernel.path) if kernel else "(unknown)"


def _code(found: Findings) -> str:
    return _firmware(found).boot_code


def _has(found: Findings, what: str, *, direct: bool = False) -> str:
    """What makes it a yes, in a few words; `direct` where the kernel beside the disk is what boots."""
    if not found.disk:
        return "it needs no disk"
    kernel = found.direct if direct else next(iter(found.kernels), None)
    root = found.direct_root if direct else found.system.root if found.system else None
    by = kernel.initrd_known_by if kernel else ""
    drivers = f"drivers, by {by}," if by not in ("", CONTENT) else "drivers"
    return f"it has {what} {drivers} and finds its root by {(root or '').partition('=')[0]}"
