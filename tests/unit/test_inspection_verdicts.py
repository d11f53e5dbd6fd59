"""What follows from what was found: boot configurations, drivers, verdicts. All pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polyvisor.images.inspection.bootconfig import (
    bls_entry,
    consoles_of,
    device_family,
    extlinux_entry,
    grub_entry,
    read_fstab,
    root_of,
)
from polyvisor.images.inspection.drivers import SETTINGS, Assumed, Known, assumed_from, locate, parse_settings
from polyvisor.images.inspection.findings import (
    Boots,
    Driver,
    Findings,
    FirmwareFound,
    KernelFound,
    PartitionFound,
    SystemFound,
    Target,
    Verdict,
)
from polyvisor.images.inspection.told import lines, notes
from polyvisor.images.inspection.verdicts import verdicts
from polyvisor.spec.parse import convert, unstructure

# Boot configurations


def test_the_first_entry_of_a_grub_menu() -> None:
    config = """\
    set default="0"
    set kernelopts="ro quiet"
    menuentry 'Debian' --class debian {
        linux   ($root)/boot/vmlinuz-6.1 root=UUID=1-2 ${kernelopts} $nothing console=ttyS0,115200
        initrd  /boot/ucode.img /boot/initrd.img-6.1
    }
    menuentry 'older' {
        linux /boot/vmlinuz-5.10 root=/dev/sda1
        initrd /boot/initrd.img-5.10
    }
    """
    entry = grub_entry(config)
    assert entry is not None
    assert (entry.kernel, entry.initrds) == ("/boot/vmlinuz-6.1", ("/boot/ucode.img", "/boot/initrd.img-6.1"))
    assert entry.cmdline == "root=UUID=1-2 ro quiet console=ttyS0,115200"
    assert grub_entry("configfile /grub.cfg\n") is None
    without = grub_entry("linux16 /vmlinuz a\nlinux /vmlinuz2 b\ninitrd /initrd2\n")
    assert without is not None
    assert without.initrds == ()


def test_entries_of_the_boot_loader_specification_and_of_extlinux() -> None:
    text = "title Fedora\nversion 6.1\nlinux /vmlinuz-6.1\ninitrd /initramfs-6.1.img $tuned_initrd\noptions $kernelopts ro\n"
    entry = bls_entry(text, "kernelopts=root=UUID=3\n")
    assert entry is not None
    assert (entry.kernel, entry.initrds, entry.cmdline) == ("/vmlinuz-6.1", ("/initramfs-6.1.img",), "root=UUID=3 ro")
    assert bls_entry("efi /EFI/shell.efi") is None
    entry = extlinux_entry(
        "DEFAULT virt\nLABEL virt\n  LINUX vmlinuz-virt\n  INITRD a,b\n  APPEND root=LABEL=x\nLABEL two\n LINUX o\n"
    )
    assert entry is not None
    assert (entry.kernel, entry.initrds, entry.cmdline) == ("vmlinuz-virt", ("a", "b"), "root=LABEL=x")


def test_a_menu_of_megabytes_costs_no_time() -> None:
    assert grub_entry("linux" * 200_000) is None
    assert grub_entry("set a=" + "$a" * 400_000) is None
    for blank in ("\n", " ", "\t", "set ", "linux ", "linux\n", "a"):
        blanks = blank * (1_000_000 // len(blank))
        grub_entry(f"{blanks}\nlinux /v{blanks}", blanks)
        extlinux_entry(blanks)
        bls_entry(blanks)
        read_fstab(blanks)
        parse_settings(blanks)
        assumed_from([blanks], [blanks], [blanks])
    entry = grub_entry("linux /v " + "$a${b} " * 100_000)
    assert entry is not None
    assert len(entry.cmdline) <= 4096


def test_root_consoles_and_families() -> None:
    cmdline = "root=/dev/sda1 console=tty0 console=hvc0 root=UUID=5 console=ttyS0,115200n8"
    assert root_of(cmdline) == "UUID=5"
    assert consoles_of(cmdline) == ("tty0", "hvc0", "ttyS0")
    named = {"/dev/sda1": "sd", "/dev/vda": "vd", "/dev/xvda2": "xvd", "/dev/hdb1": "hd", "/dev/nvme0n1p1": "nvme"}
    assert {name: device_family(name) for name in named} == named
    for name in ("UUID=1", "/dev/mapper/vg-root", "/dev/disk/by-uuid/1", "/dev/vg/root", "LABEL=x", "/dev/sr0"):
        assert device_family(name) is None


def test_an_fstab() -> None:
    mounts = read_fstab(
        "# /dev/sdz1 / ext4\nUUID=1 / ext4 defaults 0 1\n/dev/sda2 /boot ext4 defaults 0 2\n/dev/sda3 none swap sw 0 0\n"
        "/dev/sdb1 /data ext4 nofail 0 2\n/dev/sr0 /cdrom iso9660 ro,noauto\nhost:/x /y nfs ro\n"
    )
    assert (mounts.root, mounts.devices) == ("UUID=1", ("/dev/sda2",))


# Drivers


def test_where_a_driver_is() -> None:
    config = parse_settings(
        "CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_BLK=m\nCONFIG_VIRTIO_NET=m\n# CONFIG_E1000 is not set\n"
    )
    found = locate(Known(settings=config, initrd=frozenset({"virtio_blk"})))
    wanted = {"virtio_pci": "built in", "virtio_blk": "in the initramfs", "e1000": "missing"}
    assert {name: found[name].value for name in wanted} == wanted
    assert found["virtio_net"] is Driver.LATER
    found = locate(Known(built_in=frozenset({"ata_piix"}), modules=frozenset({"e1000"}), initrd=frozenset()))
    assert [found[name] for name in ("ata_piix", "e1000", "sd_mod")] == [Driver.BUILT_IN, Driver.LATER, Driver.MISSING]
    assert set(locate(Known(initrd=frozenset())).values()) == {Driver.UNKNOWN}
    assert set(locate(Known()).values()) == {Driver.UNKNOWN}


def test_an_initramfs_by_its_configuration() -> None:
    config = dict.fromkeys(SETTINGS.values(), "m")
    most = assumed_from(["# x\nMODULES=dep\n", "MODULES=most\n"], [], [])
    assert most is not None
    assert set(locate(Known(settings=config, assumed=most)).values()) == {Driver.INITRAMFS}
    named = assumed_from(["MODULES=list\n"], ["# comment\nvirtio-blk options=1\nsd_mod\n"], [])
    assert named == Assumed(
        everything=False, listed=frozenset({"virtio_blk", "sd_mod"}), known_by=named.known_by if named else ""
    )
    found = locate(Known(settings=config, assumed=named))
    assert [found[name] for name in ("virtio_blk", "xen_blkfront")] == [Driver.INITRAMFS, Driver.LATER]
    assert assumed_from(["MODULES=dep\n"], [], []) is None
    assert assumed_from([], [], ['hostonly="yes"\n']) is None
    assert assumed_from([], [], []) is None
    generic = assumed_from([], [], ['hostonly="yes"\n', 'hostonly="no"\n'])
    assert generic is not None
    assert generic.everything


# Verdicts

KERNEL = KernelFound(
    path="/boot/vmlinuz-6",
    version="6",
    architecture="x86_64",
    packing="xz",
    xen_pv=True,
    xen_pvh=True,
    known_by="its ELF notes",
    initrd="/boot/initrd.img-6",
    initrd_packing="gzip",
    initrd_known_by="its content",
    drivers=dict.fromkeys(SETTINGS, Driver.INITRAMFS),
)
FIRMWARE = FirmwareFound(table="gpt", boot_code="GRUB", bios_boot=True, esp=True, removable=True)
SYSTEM = SystemFound(
    name="Test",
    root="UUID=1",
    cmdline="root=UUID=1",
    grub_config="/boot/grub/grub.cfg",
    cloud_init=True,
    consoles=("ttyS0",),
)
PART = PartitionFound(number=1, start=0, size=1, kind="x", filesystem="ext4", label="a", uuid="2", partuuid="ab-01")
FOUND = Findings(disk=True, firmware=FIRMWARE, kernels=(KERNEL,), system=SYSTEM)


def judged(found: Findings) -> dict[str, Verdict]:
    return {verdict.target.value: verdict for verdict in verdicts(found)}


def lacking(where: Driver, *drivers: str) -> KernelFound:
    return replace(KERNEL, drivers={**KERNEL.drivers, **dict.fromkeys(drivers, where)})


def test_every_target_gets_a_verdict_in_their_order() -> None:
    assert [verdict.target for verdict in verdicts(FOUND)] == list(Target)


def test_a_disk_with_everything_boots_everywhere_but_directly() -> None:
    found = judged(FOUND)
    assert {name: verdict.boots.value for name, verdict in found.items()} == {
        "qemu-pvh": "no", "qemu-hvm-bios": "yes", "qemu-hvm-uefi": "yes", "xen-pv": "yes", "xen-pvh": "yes", "xen-hvm": "yes",
    }  # fmt: skip
    assert found["qemu-hvm-bios"].devices == ("paravirtual", "emulated")
    assert "no kernel lies beside the disk" in found["qemu-pvh"].reason
    beside = judged(replace(FOUND, direct=KERNEL, direct_root="UUID=1"))
    assert {verdict.boots for verdict in beside.values()} == {Boots.YES}


def changed(**changes: object) -> Findings:
    return replace(FOUND, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "target", "boots", "words"),
    [
        # Firmware
        (changed(firmware=replace(FIRMWARE, boot_code="none")), "qemu-hvm-bios", "no", "no boot code"),
        (changed(firmware=replace(FIRMWARE, boot_code="none")), "xen-hvm", "no", "don't boot by UEFI"),
        (changed(firmware=replace(FIRMWARE, boot_code="unknown")), "qemu-hvm-bios", "unknown", "not known here"),
        (changed(firmware=replace(FIRMWARE, boot_code="GRUB without its core image")), "qemu-hvm-bios", "no", "no core image"),
        (changed(firmware=replace(FIRMWARE, boot_code="unknown", bios_boot=False)), "qemu-hvm-bios", "no", "GPT has no"),
        (changed(firmware=replace(FIRMWARE, esp=False, removable=False)), "qemu-hvm-uefi", "no", "no EFI system partition"),
        (changed(firmware=replace(FIRMWARE, removable=False)), "qemu-hvm-uefi", "no", "has no loader"),
        (
            changed(firmware=replace(FIRMWARE, removable=False, loaders=("\\EFI\\x\\shimx64.efi",))),
            "qemu-hvm-uefi", "no", "only \\EFI\\x\\shimx64.efi",
        ),
        (changed(firmware=replace(FIRMWARE, removable=False, problem="its FAT is odd")), "qemu-hvm-uefi", "unknown", "odd"),
        # Drivers
        (changed(kernels=(lacking(Driver.LATER, "virtio_blk"),)), "qemu-hvm-bios", "yes", "with emulated devices alone"),
        (changed(kernels=(lacking(Driver.LATER, "virtio_blk", "sd_mod"),)), "qemu-hvm-uefi", "no", "lacks virtio_blk"),
        (changed(kernels=(lacking(Driver.MISSING, "ata_piix"),)), "qemu-hvm-bios", "yes", "emulated devices no: its kernel 6"),
        (changed(kernels=(lacking(Driver.UNKNOWN, "ahci"),)), "qemu-hvm-uefi", "yes", "emulated devices unknown"),
        (changed(kernels=(lacking(Driver.UNKNOWN, "ahci", "virtio_pci"),)), "qemu-hvm-uefi", "unknown", "virtio_pci"),
        (changed(kernels=(lacking(Driver.LATER, "xen_blkfront"),)), "xen-pv", "no", "lacks xen_blkfront"),
        (changed(kernels=(lacking(Driver.LATER, "xen_blkfront"),)), "xen-hvm", "no", "lacks xen_blkfront"),
        (changed(kernels=(lacking(Driver.MISSING, "xen_blkfront"),)), "xen-hvm", "yes", "IDE"),
        # Kernels
        (changed(kernels=(replace(KERNEL, xen_pv=False),)), "xen-pv", "no", "CONFIG_XEN_PV"),
        (changed(kernels=(replace(KERNEL, xen_pvh=False),)), "xen-pvh", "no", "CONFIG_XEN_PVH"),
        (changed(kernels=(replace(KERNEL, xen_pv=None, problem="zstd"),)), "xen-pv", "unknown", "zstd"),
        (changed(kernels=(replace(KERNEL, packing="lz4"),)), "xen-pv", "no", "can't unpack lz4"),
        (changed(kernels=(replace(KERNEL, packing="zstd"),)), "xen-pv", "no", "can't unpack zstd"),
        (changed(kernels=(replace(KERNEL, packing="zstd"),)), "xen-pvh", "yes", "GRUB for Xen"),
        (changed(kernels=(replace(KERNEL, packing=None, problem="odd"),)), "xen-pv", "unknown", "odd"),
        (changed(kernels=(replace(KERNEL, architecture="i386"),)), "qemu-hvm-bios", "no", "i386, not x86-64"),
        (changed(kernels=(replace(KERNEL, architecture="unknown", problem="cut off"),)), "xen-pvh", "unknown", "cut off"),
        (changed(kernels=(), system=replace(SYSTEM, problem="LUKS")), "qemu-hvm-bios", "unknown", "LUKS"),
        # Names of disks
        (changed(system=replace(SYSTEM, root="/dev/vda1")), "qemu-hvm-bios", "yes", "emulated devices no: its kernel is told"),
        (changed(system=replace(SYSTEM, root="/dev/vda1")), "xen-pvh", "no", "root=/dev/vda1; the disk would be"),
        (changed(system=replace(SYSTEM, root="/dev/sda1")), "qemu-hvm-bios", "yes", "with emulated devices alone"),
        (changed(system=replace(SYSTEM, root="/dev/xvda1")), "xen-pvh", "yes", "/dev/xvda1"),
        (changed(system=replace(SYSTEM, root="/dev/xvda1")), "qemu-hvm-uefi", "no", "root=/dev/xvda1"),
        (changed(system=replace(SYSTEM, devices=("/dev/xvdb1",))), "qemu-hvm-uefi", "no", "fstab names /dev/xvdb1"),
        (changed(partitions=(PART,)), "xen-pvh", "no", "root=UUID=1, and nothing on the disk has that name"),
        (changed(partitions=(replace(PART, problem="LUKS"),)), "xen-pvh", "yes", "UUID"),
        (changed(partitions=(replace(PART, uuid="1"),)), "xen-pvh", "yes", "UUID"),
        (changed(partitions=(PART,), system=replace(SYSTEM, root="LABEL=b")), "qemu-hvm-bios", "no", "LABEL=b"),
        (changed(partitions=(PART,), system=replace(SYSTEM, root="LABEL=a")), "qemu-hvm-bios", "yes", "LABEL"),
        (changed(partitions=(PART,), system=replace(SYSTEM, root="PARTUUID=AB-01")), "qemu-hvm-uefi", "yes", "PARTUUID"),
        (changed(system=replace(SYSTEM, root=None)), "qemu-hvm-bios", "unknown", "nothing says where its root"),
        # Menus
        (changed(system=replace(SYSTEM, grub_config="/boot/grub2/grub.cfg")), "xen-pv", "no", "/boot/grub2/grub.cfg"),
        (changed(system=replace(SYSTEM, grub_config=None)), "xen-pvh", "no", "no GRUB menu"),
        (changed(system=replace(SYSTEM, grub_config=None, problem="btrfs can't be read")), "xen-pvh", "unknown", "btrfs"),
        (changed(system=replace(SYSTEM, cmdline=None)), "qemu-hvm-bios", "unknown", "no boot menu"),
        # What is handed over
        (changed(direct=KERNEL, direct_root="/dev/sda1"), "qemu-pvh", "no", "root=/dev/sda1"),
        (changed(direct=lacking(Driver.LATER, "virtio_pci"), direct_root="UUID=1"), "qemu-pvh", "no", "lacks virtio_pci"),
        (changed(direct=replace(KERNEL, packing="lz4"), direct_root="UUID=1"), "xen-pv", "yes", "Xen's entry for pv"),
        (Findings(disk=False), "xen-hvm", "no", "neither"),
        (Findings(disk=False), "xen-pv", "no", "neither"),
        (Findings(disk=False, direct=lacking(Driver.UNKNOWN, "virtio_blk")), "qemu-pvh", "yes", "needs no disk"),
        (Findings(disk=False, direct=KERNEL), "qemu-hvm-bios", "no", "no disk to boot from"),
    ],
)  # fmt: skip
def test_each_reason(found: Findings, target: str, boots: str, words: str) -> None:
    verdict = judged(found)[target]
    assert (verdict.boots.value, words in verdict.reason) == (boots, True), verdict
    assert bool(verdict.devices) is (boots != "no")


def test_a_partition_that_could_not_be_read_is_named() -> None:
    part = PartitionFound(number=2, start=0, size=1, kind="x", problem="xfs can't be read here")
    found = judged(Findings(disk=True, firmware=FIRMWARE, partitions=(part,), system=SystemFound(problem="none")))
    for target in ("qemu-hvm-bios", "qemu-hvm-uefi", "xen-pv", "xen-pvh", "xen-hvm"):
        assert found[target].boots is Boots.UNKNOWN
        assert "partition 2: xfs can't be read here" in found[target].reason
    assert found["qemu-pvh"].boots is Boots.NO


def test_what_is_told_and_what_goes_over_the_wire() -> None:
    part = PartitionFound(number=1, start=0, size=1 << 20, kind="x", filesystem="ext4", label="a", uuid="b")
    found = replace(FOUND, partitions=(part,), direct=KERNEL, direct_consoles=("tty0",))
    told = dict(lines(found))
    assert told["boot sector"] == "GPT, BIOS boot partition; boot code: GRUB"
    assert told["partition 1"] == "1 MiB, x, ext4 LABEL=a UUID=b"
    assert "Xen: pv yes, pvh yes (its ELF notes)" in told["default kernel"]
    assert [note.split(",")[0] for note in notes(found)] == [
        "its kernel says nothing on hvc0",
        "its kernel says nothing on ttyS0",
    ]
    bare = replace(
        FOUND, system=replace(SYSTEM, consoles=(), cloud_init=False), kernels=(lacking(Driver.MISSING, "e1000"),)
    )
    assert [note.split(":")[0] for note in notes(bare)] == [
        "its kernel is not told of any console", "its kernel has no e1000", "it has no cloud-init",
    ]  # fmt: skip
    assert convert(unstructure(found), Findings, "") == found
