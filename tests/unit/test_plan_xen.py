"""What a Xen host makes of a spec: what runs it, in which mode, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.drivers.xen.probe import MISSING
from polyvisor.drivers.xen.xl import missing_modes
from polyvisor.errors import InvalidInput, Unsupported
from polyvisor.host.plan import (
    as_booted,
    boots_directly,
    build_boot,
    check_networks,
    choose_accelerator,
    choose_firmware,
    choose_mode,
    explain_mode,
)
from polyvisor.host.record import Record
from polyvisor.images.image import Image, ImageFile
from polyvisor.spec.vm import Firmware, Hypervisor, Mode, Nic, VMSpec
from polyvisor.status import Accelerator, Capabilities

FILE = ImageFile(name="x", sha256="", size=0)
KERNEL = Image(id="a", name="tiny", created_at=0.0, source="", kernel=FILE, initrd=FILE)
DISK = Image(id="b", name="debian", created_at=0.0, source="", disk=FILE, firmware=("bios", "uefi"))
FULL = replace(DISK, kernel=FILE, initrd=FILE, cmdline="root=a")
QEMU = Capabilities(
    driver="qemu",
    version="7.2",
    accelerators=(
        Accelerator(name="kvm", available=False, reason="no kvm"),
        Accelerator(name="tcg", available=True, reason="emulation"),
    ),
    modes=("pvh", "hvm"),
)


def xen(*modes: str) -> Capabilities:
    works = Accelerator(name="xen", available=True, reason="virt_caps: x")
    missing = {**MISSING, **missing_modes(modes)}
    return Capabilities(driver="xen", version="4.17", accelerators=(works,), modes=modes, missing=missing)


def spec(**values: object) -> VMSpec:
    return VMSpec(name="a", image="tiny", **values)  # type: ignore[arg-type]


WHOLE, OLD = xen("pvh", "hvm", "pv"), xen("pv")
BARE = replace(
    WHOLE, missing={**WHOLE.missing, "disk-pv": "this host has no GRUB", "disk-pvh": "this host has no GRUB"}
)


@pytest.mark.parametrize(
    ("offered", "image", "mode", "reason"),
    [
        (WHOLE, KERNEL, Mode.PVH, "mode pvh: the image has a kernel"),
        (OLD, KERNEL, Mode.PV, "mode pv: the CPU offers Xen no hardware virtualization (no hvm in virt_caps)"),
        (WHOLE, DISK, Mode.HVM, "mode hvm: the image has no kernel of its own"),
    ],
)
def test_mode_auto(offered: Capabilities, image: Image, mode: Mode, reason: str) -> None:
    assert choose_mode(spec(), image, offered) is mode
    assert explain_mode(mode, spec(), image, image, offered) == reason
    assert boots_directly(image, mode) is (image is KERNEL)


@pytest.mark.parametrize("mode", [Mode.PV, Mode.PVH, Mode.HVM])
def test_a_mode_that_was_asked_for(mode: Mode) -> None:
    assert choose_mode(spec(mode=mode), KERNEL, WHOLE) is mode
    assert boots_directly(KERNEL, mode), "its kernel is handed over in every mode: it has no disk"


@pytest.mark.parametrize(
    ("offered", "image", "mode", "match"),
    [
        (OLD, KERNEL, Mode.PVH, "no hardware virtualization"),
        (OLD, DISK, Mode.AUTO, "no hardware virtualization"),
        (xen("pvh", "hvm"), KERNEL, Mode.PV, "built without"),
        (BARE, DISK, Mode.PV, "no kernel beside its disk, and this host has no GRUB"),
        (BARE, DISK, Mode.PVH, "no kernel beside its disk, and this host has no GRUB"),
    ],
)
def test_a_mode_that_can_not_be(offered: Capabilities, image: Image, mode: Mode, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        choose_mode(spec(mode=mode), image, offered)


@pytest.mark.parametrize(
    ("offered", "mode", "packing", "why"),
    [
        (WHOLE, Mode.PVH, "zstd", None),
        (WHOLE, Mode.PV, "xz", None),
        (WHOLE, Mode.PV, "zstd", "GRUB can't unpack it in mode pv"),
        (WHOLE, Mode.PV, None, "GRUB can't unpack it in mode pv"),
        (BARE, Mode.PV, "xz", "this host has no GRUB"),
        (BARE, Mode.PVH, "xz", "this host has no GRUB"),
    ],
)
def test_a_disk_boots_by_its_own_kernel_where_grub_can(
    offered: Capabilities, mode: Mode, packing: str | None, why: str | None
) -> None:
    booted = as_booted(spec(mode=mode), FULL, mode, offered, packing)
    assert (booted.kernel is None) is (why is None)
    expected = "GRUB boots the kernel on the VM's disk" if why is None else f"the image's kernel is handed over: {why}"
    assert explain_mode(mode, spec(mode=mode), FULL, booted, offered) == f"mode {mode}: asked for; {expected}"
    record = Record(id="c", created_at=0.0, spec=spec(mode=mode, nics=()), image_id="b", memory_mib=128)
    boot = build_boot(record, FULL, Path("/images"), "xen", xen=offered, packing=packing)
    assert (boot.kernel, boot.initrd, boot.cmdline) == (
        (None, None, "") if why is None else (Path("/images/x"), Path("/images/x"), "root=a console=hvc0")
    )


def test_who_adds_words_to_the_command_line_gets_the_kernel_of_the_image() -> None:
    asked = spec(mode=Mode.PVH, cmdline="quiet")
    booted = as_booted(asked, FULL, Mode.PVH, WHOLE, None)
    assert booted is FULL
    assert explain_mode(Mode.PVH, asked, FULL, booted, WHOLE).endswith("its command line has words of the spec")


def test_an_image_without_a_kernel_boots_in_any_mode_by_its_disk() -> None:
    assert [choose_mode(spec(mode=mode), DISK, WHOLE) for mode in (Mode.PV, Mode.PVH)] == [Mode.PV, Mode.PVH]
    assert as_booted(spec(), DISK, Mode.PV, WHOLE, None) == DISK
    assert as_booted(spec(), FULL, Mode.HVM, WHOLE, None) is FULL
    assert as_booted(spec(), FULL, Mode.PVH, None, None) is FULL, "on QEMU"


def test_on_a_xen_host_xen_is_preferred_and_others_can_be_had() -> None:
    assert choose_accelerator(spec(), WHOLE, QEMU).name == "xen"
    assert choose_accelerator(spec(hypervisor=Hypervisor.TCG), WHOLE, QEMU).name == "tcg"
    assert choose_accelerator(spec(cpu="nested"), WHOLE, QEMU).name == "tcg"
    with pytest.raises(Unsupported, match="can't run VMs"):
        choose_accelerator(spec(cpu="nested", hypervisor=Hypervisor.XEN), WHOLE, QEMU)
    with pytest.raises(Unsupported, match="no Xen host"):
        choose_accelerator(spec(hypervisor=Hypervisor.XEN), QEMU)


def test_networks_and_firmware_that_xen_has_not() -> None:
    check_networks(spec(nics=(Nic(network="none"),)), WHOLE)
    bare = replace(WHOLE, missing={**WHOLE.missing, "user": "it takes nftables", "private": "it takes nftables"})
    for network in ("user", "private:lab"):
        check_networks(spec(nics=(Nic(network=network),)), WHOLE)
        with pytest.raises(Unsupported, match="it takes nftables"):
            check_networks(spec(nics=(Nic(network=network),)), bare)
    with pytest.raises(InvalidInput, match="UEFI"):
        choose_firmware(spec(firmware=Firmware.UEFI), DISK, Mode.HVM, WHOLE)
    assert choose_firmware(spec(), DISK, Mode.HVM, WHOLE) is Firmware.BIOS


@pytest.mark.parametrize(
    ("mode", "on", "cmdline"),
    [
        (Mode.PV, WHOLE, "quiet console=hvc0 mine"),
        (Mode.PVH, WHOLE, "quiet console=hvc0 mine"),
        (Mode.HVM, WHOLE, "quiet mine"),
        (Mode.PVH, None, "quiet mine"),
    ],
)
def test_the_console_of_a_guest_without_a_serial_port(mode: Mode, on: Capabilities | None, cmdline: str) -> None:
    image = replace(KERNEL, cmdline="quiet")
    record = Record(id="c", created_at=0.0, spec=spec(mode=mode, cmdline="mine", nics=()), image_id="a", memory_mib=128)
    assert build_boot(record, image, Path("/images"), "xen" if on else "tcg", xen=on).cmdline == cmdline
