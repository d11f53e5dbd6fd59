"""From a record to a `Boot`: every choice that the user left to Polyvisor, made here and nowhere else.

Pure functions: what they need to know of the host is handed to them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from polyvisor.drivers.base import Boot, BootDisk, BootNic
from polyvisor.drivers.qemu.devices import IDE_PLACES
from polyvisor.errors import InvalidInput, Unsupported
from polyvisor.host.record import Launch, Record, disk_name, nic_name, resources_of
from polyvisor.images.image import Image, Seed
from polyvisor.network.ports import chosen_forwards, wanted_forwards
from polyvisor.network.private import multicast_group
from polyvisor.spec.cpus import ALL_CPUS, parse_cpus, show_cpus
from polyvisor.spec.forward import Forward
from polyvisor.spec.resources import NORMAL_WEIGHT
from polyvisor.spec.vm import NESTED, DeviceModel, Disk, Firmware, Hypervisor, Mode, VMSpec, check_most
from polyvisor.status import Accelerator, Capabilities

_NO_XEN = Accelerator(name="xen", available=False, reason="this is no Xen host: it has not been booted by Xen")
SEED_DISK = Path("disks/seed.iso")
SEEDED_INITRD = Path("disks/initrd")
# A fork's own, beside the image's initrd, which forks share: see `shares_initrd`.
FORK_SEED = Path("disks/seed.cpio")
UEFI_VARIABLES = Path("disks/uefi-vars.fd")


def disk_path(index: int, generation: int = 0) -> Path:
    """Where disk `index` of a VM is, in the VM's directory: what it writes to now."""
    return Path(f"disks/disk{index}{f'-{generation}' if generation else ''}.qcow2")


def disk_count(spec: VMSpec, image: Image) -> int:
    """How many disks a VM has, without its seed: those of the spec, and the image's in any case."""
    return max(len(spec.disks), int(image.disk is not None))


def choose_accelerator(spec: VMSpec, *drivers: Capabilities) -> Accelerator:
    """What runs the guest, of what `drivers` offer, the preferred first.

    Raises Unsupported, with the reason, where what the spec asks for does not work here.
    """
    offered = [accelerator for driver in drivers for accelerator in _offered(spec, driver)]
    if spec.hypervisor is not Hypervisor.AUTO:
        chosen = next((each for each in offered if each.name == spec.hypervisor.value), _NO_XEN)
        if chosen.available:
            return chosen
        raise Unsupported(f"hypervisor: {chosen.name} does not work here: {chosen.reason}", hint="use hypervisor: auto")
    for accelerator in offered:
        if accelerator.available:
            return accelerator
    raise Unsupported(f"no hypervisor works here: {offered[0].reason}", hint="polyvisor doctor")


def _offered(spec: VMSpec, driver: Capabilities) -> tuple[Accelerator, ...]:
    """The accelerators of `driver`, those that can't nest as not available where `spec` wants that."""
    missing = {"kvm": driver.missing.get("nested-kvm"), "xen": driver.missing.get("nested")}
    return tuple(
        replace(each, available=False, reason=reason)
        if spec.cpu == NESTED and each.available and (reason := missing.get(each.name))
        else each
        for each in driver.accelerators
    )


def explain_choice(chosen: Accelerator, *drivers: Capabilities) -> str:
    """Why `chosen` was chosen, in one line."""
    better = [a for driver in drivers for a in driver.accelerators if not a.available]
    if chosen.name == "tcg" and better:
        return f"{better[0].name} does not work here: {better[0].reason}"
    return chosen.reason


def choose_mode(spec: VMSpec, image: Image, xen: Capabilities | None = None) -> Mode:
    """How the VM boots: by its own disk where that can be booted from, so that the guest's own kernel runs.

    `xen` is what Xen's driver can do, where the VM runs on Xen. Raises InvalidInput where the image can't boot so.
    """
    if xen is not None:
        return _choose_xen_mode(spec, image, xen)
    if spec.mode is Mode.PV:
        raise InvalidInput("mode", "pv", "paravirtualized guests need Xen", hint="use pvh or hvm")
    if spec.mode is Mode.PVH and image.kernel is None:
        raise InvalidInput("mode", "pvh", f"image '{image.name}' has no kernel to boot directly", hint="use mode: hvm")
    if spec.mode is Mode.HVM and image.disk is None:
        raise InvalidInput("mode", "hvm", f"image '{image.name}' has no disk to boot from", hint="use mode: pvh")
    if spec.mode is not Mode.AUTO:
        return spec.mode
    return Mode.HVM if image.disk is not None else Mode.PVH


def _choose_xen_mode(spec: VMSpec, image: Image, xen: Capabilities) -> Mode:
    """PVH for a kernel that is known, PV for one on a CPU without virtualization, HVM for what boots by firmware."""
    auto = (
        next((mode for mode in (Mode.PVH, Mode.PV) if mode.value in xen.modes), Mode.PV) if image.kernel else Mode.HVM
    )
    mode = auto if spec.mode is Mode.AUTO else spec.mode
    if mode.value not in xen.modes:
        raise InvalidInput("mode", mode.value, xen.missing.get(mode.value, "this Xen does not offer it"))
    if mode is Mode.HVM or image.kernel is not None:
        return mode
    if reason := xen.missing.get(f"disk-{mode}"):
        raise InvalidInput("mode", mode.value, f"image '{image.name}' has no kernel beside its disk, and {reason}")
    return mode


def as_booted(spec: VMSpec, image: Image, mode: Mode, xen: Capabilities | None, packing: str | None) -> Image:
    """The image as a VM boots from it: without its kernel where, on Xen, GRUB boots the one on the VM's own disk.

    `packing` says how the image's kernel is packed: one that GRUB can't unpack in mode pv is handed over. So it is where the
    spec has words for the kernel's command line, which otherwise stands on the disk.
    """
    if xen is None or mode is Mode.HVM or image.disk is None or f"disk-{mode}" in xen.missing or spec.cmdline:
        return image
    from polyvisor.images.bzimage import GRUB_UNPACKS

    if mode is Mode.PV and image.kernel is not None and packing not in GRUB_UNPACKS:
        return image
    return replace(image, kernel=None, initrd=None)


def explain_mode(mode: Mode, spec: VMSpec, image: Image, booted: Image, xen: Capabilities) -> str:
    """Why a VM of Xen got `mode`, and which kernel it boots, in one line; `booted` is `image` as it boots."""
    if spec.mode is not Mode.AUTO:
        why = "asked for"
    elif mode is Mode.PV:
        why = xen.missing.get("pvh", "this Xen has no pvh")
    else:
        why = "the image has a kernel" if mode is Mode.PVH else "the image has no kernel of its own"
    if mode is Mode.HVM or image.disk is None:
        return f"mode {mode}: {why}"
    if booted.kernel is None:
        return f"mode {mode}: {why}; GRUB boots the kernel on the VM's disk"
    return f"mode {mode}: {why}; the image's kernel is handed over: {_why_handed_over(mode, spec, xen)}"


def _why_handed_over(mode: Mode, spec: VMSpec, xen: Capabilities) -> str:
    if spec.cmdline:
        return "its command line has words of the spec"
    return xen.missing.get(f"disk-{mode}", "GRUB can't unpack it in mode pv")


def boots_directly(image: Image, mode: Mode) -> bool:
    """Whether the hypervisor is given the image's kernel, rather than firmware its disk."""
    return image.kernel is not None and (mode is not Mode.HVM or image.disk is None)


def shares_initrd(image: Image, mode: Mode) -> bool:
    """Whether a fork boots by the image's own initrd, and gets its seed by another way, should its guest ever reboot."""
    return image.seed is Seed.INITRD and image.agent and image.initrd is not None and boots_directly(image, mode)


def choose_firmware(spec: VMSpec, image: Image, mode: Mode, xen: Capabilities | None = None) -> Firmware:
    """BIOS where the image boots by it, UEFI where it boots by that alone; AUTO stands for none, in mode pvh."""
    if mode is not Mode.HVM:
        if spec.firmware is not Firmware.AUTO:
            raise InvalidInput("firmware", spec.firmware.value, "mode pvh boots without firmware", hint="use mode: hvm")
        return Firmware.AUTO
    firmware = spec.firmware
    if firmware is Firmware.AUTO:
        firmware = Firmware.UEFI if image.firmware == ("uefi",) else Firmware.BIOS
    if xen is not None and firmware is Firmware.UEFI:
        raise InvalidInput("firmware", "uefi", xen.missing["uefi"])
    return firmware


def check_devices(spec: VMSpec, image: Image) -> None:
    """Raise InvalidInput where emulated hardware has no place for all the disks."""
    disks = disk_count(spec, image) + int(image.seed is Seed.NOCLOUD)
    if spec.devices is DeviceModel.EMULATED and disks > IDE_PLACES:
        hint = f"use at most {IDE_PLACES} (cloud-init's seed is one), or devices: paravirtual"
        raise InvalidInput("disks", disks, "are too many for emulated IDE", hint=hint)


def check_networks(spec: VMSpec, capabilities: Capabilities) -> None:
    """Raise Unsupported where the driver has no such network: `missing` names them by their kind."""
    for nic in spec.nics:
        if reason := capabilities.missing.get(nic.network.partition(":")[0]):
            raise Unsupported(f"network: {nic.network}: {reason}", hint="use network: none")


def check_resources(spec: VMSpec, memory_mib: int, capabilities: Capabilities, total_mib: int) -> None:
    """Raise InvalidInput, Unsupported where a host of `total_mib`, with such a driver, can't give what is asked."""
    wanted = resources_of(spec, memory_mib)
    check_most("memory_mib", memory_mib, wanted.memory_max_mib)
    for key in ("memory_mib", "memory_max_mib"):
        if (asked := getattr(spec, key)) is not None and asked > total_mib:
            raise InvalidInput(key, asked, f"this host has {total_mib} MiB", hint="ask for less")
    if spec.devices is DeviceModel.EMULATED and wanted.memory_max_mib > memory_mib:
        problem = "emulated devices have no balloon, through which memory changes"
        raise InvalidInput(
            "memory_max_mib", wanted.memory_max_mib, problem, hint="leave it out, or devices: paravirtual"
        )
    for key, differs in (
        ("cpu_weight", wanted.cpu_weight != NORMAL_WEIGHT),
        ("cpu_limit", wanted.cpu_limit is not None),
        ("cpu_affinity", wanted.cpu_affinity != ALL_CPUS),
        ("disk_iops_limit", wanted.disk_iops_limit is not None),
        ("disk_rate_limit_mib", wanted.disk_rate_limit_mib is not None),
    ):
        if differs and (reason := capabilities.refusal(key.replace("_", "-"))):
            raise Unsupported(f"{key}: {getattr(wanted, key)}: {reason}", hint=f"leave {key} as it is by default")
    if wanted.cpu_affinity == ALL_CPUS or not capabilities.cpus:
        return
    if lacking := parse_cpus(wanted.cpu_affinity) - parse_cpus(capabilities.cpus):
        problem = f"this host has no CPU {show_cpus(lacking)}"
        raise InvalidInput("cpu_affinity", wanted.cpu_affinity, problem, hint=f"it has {capabilities.cpus}")


def build_boot(
    record: Record,
    image: Image,
    image_directory: Path,
    accelerator: str,
    last: Launch | None = None,
    place: str = "",
    xen: Capabilities | None = None,
    packing: str | None = None,
    layers: Sequence[Sequence[Path]] = (),
) -> Boot:
    """The `Boot` of a VM: `image_directory` holds the image's files, `last` is how it was last started.

    `place` tells apart private networks of the same name; `xen` is as for `choose_mode`, `packing` as for `as_booted`,
    `layers` as for `boot_disks`.

    Raises InvalidInput where a port is taken.
    """
    spec = record.spec
    mode = choose_mode(spec, image, xen)
    firmware = choose_firmware(spec, image, mode, xen)
    image = as_booted(spec, image, mode, xen, packing)
    direct = boots_directly(image, mode)
    return Boot(
        name=spec.name,
        id=record.id,
        vcpus=spec.vcpus,
        memory_mib=record.memory_mib,
        cpu=spec.cpu,
        mode=mode,
        devices=spec.devices,
        firmware=firmware,
        on_reboot=spec.on_reboot,
        accelerator=accelerator,
        kernel=image_directory / image.kernel.name if direct and image.kernel else None,
        initrd=_initrd(image, image_directory) if direct else None,
        cmdline=_cmdline(spec, image, on_xen=xen is not None and mode is not Mode.HVM) if direct else "",
        disks=boot_disks(record, image, image_directory, layers),
        nics=boot_nics(record, last, place),
        seed=SEED_DISK if image.seed is Seed.NOCLOUD else None,
        uefi_vars=UEFI_VARIABLES if firmware is Firmware.UEFI else None,
        vcpus_max=spec.vcpus_max,
        memory_max_mib=spec.memory_max_mib,
        cpu_weight=spec.cpu_weight,
        cpu_limit=spec.cpu_limit,
        cpu_affinity=spec.cpu_affinity,
        disk_iops_limit=spec.disk_iops_limit,
        disk_rate_limit_mib=spec.disk_rate_limit_mib,
        slots=record.slots or {},
    )


def _cmdline(spec: VMSpec, image: Image, *, on_xen: bool) -> str:
    """The kernel's command line: the image's, the user's, and before that Xen's console for guests without a serial port.

    The last console is where /dev/console leads, and Linux takes a serial port for there that PV guests don't have.
    """
    return " ".join(filter(None, (image.cmdline, "console=hvc0" if on_xen else "", spec.cmdline)))


def boot_disks(
    record: Record, image: Image, image_directory: Path, layers: Sequence[Sequence[Path]] = ()
) -> tuple[BootDisk, ...]:
    """The disks of a VM; `layers` are the files that each stands on, the uppermost first, above the image's."""
    return tuple(
        BootDisk(
            path=disk_path(record.disk_number(i), record.generation),
            layers=tuple(layers[i]) if i < len(layers) else (),
            backing=image_directory / image.disk.name if i == 0 and image.disk else None,
        )
        for i in range(disk_count(record.spec, image))
    )


def boot_nics(record: Record, last: Launch | None, place: str) -> tuple[BootNic, ...]:
    """The network cards, ports chosen; raises InvalidInput where a port is taken."""
    wanted: list[list[Forward]] = []
    for i, nic in enumerate(record.spec.nics):
        # One forward to SSH is enough: the first card on a user network has it.
        first = all(other.network != "user" for other in record.spec.nics[:i])
        wanted.append(wanted_forwards(nic.forwards, ssh=first) if nic.network == "user" else [])
    # All cards share the host's ports, so these are chosen together.
    chosen = iter(chosen_forwards(chain.from_iterable(wanted), last.forwards if last else ()))
    return tuple(
        replace(boot_nic(record, i, place), forwards=tuple(islice(chosen, len(wanted[i]))))
        for i in range(len(record.spec.nics))
    )


def boot_nic(record: Record, index: int, place: str) -> BootNic:
    """The network card at `index` of the spec, without any ports."""
    network = record.spec.nics[index].network
    return BootNic(
        mac=mac_of(record, index),
        network=network,
        group=multicast_group(place, network) if network.startswith("private:") else None,
        number=record.nic_number(index),
    )


def numbered(record: Record, image: Image) -> Record:
    """The record with every disk and card in its spec, each with a number, and every device with its place."""
    if record.slots is not None:
        return record
    spec = replace(record.spec, disks=record.spec.disks or (Disk(),) * disk_count(record.spec, image))
    disks, nics = tuple(range(len(spec.disks))), tuple(range(len(spec.nics)))
    made = replace(record, spec=spec, disk_numbers=disks, nic_numbers=nics)
    return replace(made, slots=first_slots(made, image))


def first_slots(record: Record, image: Image) -> dict[str, int]:
    """Where the devices of a VM are on the PCI bus whose disks and cards are as it was made: where QEMU puts them itself.

    It takes the next free place each time, `pc` from the second on and `q35` from the first; what is emulated has IDE disks.
    """
    spec = record.spec
    if spec.devices is DeviceModel.EMULATED:
        names = ["vga"]
    else:
        names = [disk_name(record.disk_number(i)) for i in range(disk_count(spec, image))]
        names += ["seed"] if image.seed is Seed.NOCLOUD else []
    names += [nic_name(record.nic_number(i)) for i in range(len(spec.nics))]
    names += ["rng", "balloon"] if spec.devices is DeviceModel.PARAVIRTUAL else []
    return {name: i for i, name in enumerate(names, first_slot(spec, image))}


def first_slot(spec: VMSpec, image: Image) -> int:
    """The first place on the PCI bus that is free in the machine of a VM, were it to run on QEMU."""
    return 1 if is_uefi(spec, image) else 2


def is_uefi(spec: VMSpec, image: Image) -> bool:
    """Whether a VM boots by UEFI, were it to run on QEMU: then its machine is another one."""
    if image.disk is None or spec.mode not in (Mode.AUTO, Mode.HVM):
        return False
    return spec.firmware is Firmware.UEFI or (spec.firmware is Firmware.AUTO and image.firmware == ("uefi",))


def mac_of(record: Record, index: int) -> str:
    """The MAC address of the network card at `index` of the spec."""
    return record.spec.nics[index].mac or derived_mac(record.id, record.nic_number(index))


def mac_addresses(record: Record) -> tuple[str, ...]:
    """Those of all cards in the spec, in its order."""
    return tuple(mac_of(record, i) for i in range(len(record.spec.nics)))


def derived_mac(vm_id: str, index: int) -> str:
    """A MAC address that is always the same for a VM's network card: QEMU's prefix and a hash (locally administered)."""
    digest = zlib.crc32(f"{vm_id}/{index}".encode()).to_bytes(4, "big")
    return ":".join(f"{byte:02x}" for byte in (0x52, 0x54, 0x00, *digest[:3]))


def _initrd(image: Image, directory: Path) -> Path | None:
    if image.initrd is None:
        return None
    return SEEDED_INITRD if image.seed is Seed.INITRD else directory / image.initrd.name
