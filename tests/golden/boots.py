"""A dozen VMs whose command lines are kept as golden files, one argument a line.

After a wanted change: `uv run python -m tests.golden.regenerate`, and look at what it changed.
"""

from dataclasses import replace
from pathlib import Path

from polyvisor.drivers.base import Boot, BootDisk, BootNic
from polyvisor.drivers.qemu.argv import build_argv
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import DeviceModel, Firmware, Mode, OnReboot

DIRECTORY = Path(__file__).parent
QEMU = "/usr/bin/qemu-system-x86_64"
UEFI_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
IMAGE = Path("/var/lib/polyvisor/images/store/0123456789ab")
SSH = Forward(host_port=40001, guest_port=22)

TINY = Boot(
    name="web-1",
    id="6f4d0a54-1f0a-4b5e-9d0e-2b7f6a1c9e11",
    vcpus=1,
    memory_mib=128,
    cpu="auto",
    mode=Mode.PVH,
    devices=DeviceModel.PARAVIRTUAL,
    firmware=Firmware.AUTO,
    on_reboot=OnReboot.RESTART,
    accelerator="tcg",
    kernel=IMAGE / "kernel",
    initrd=Path("disks/initrd"),
    cmdline="console=ttyS0 quiet",
    nics=(BootNic(mac="52:54:00:aa:bb:01", network="user", forwards=(SSH,)),),
)
DEBIAN = replace(
    TINY,
    name="db",
    vcpus=4,
    memory_mib=4096,
    mode=Mode.HVM,
    firmware=Firmware.BIOS,
    accelerator="kvm",
    kernel=None,
    initrd=None,
    cmdline="",
    disks=(BootDisk(path=Path("disks/disk0.qcow2"), backing=IMAGE / "disk.qcow2"),),
    seed=Path("disks/seed.iso"),
)
# Characters that separate or end options where QEMU, JSON or the kernel's command line are not given them as data.
AWKWARD = Path('/srv/a,readonly=off b=c"d\\e\u00e9:f%s/store/0123456789ab')

BOOTS = {
    "nested-tcg": replace(
        DEBIAN,
        accelerator="tcg",
        cpu="nested",
        nics=(*TINY.nics, BootNic(mac="52:54:00:77:01:01", network="private:lab", group="239.192.1.2:20345", number=1)),
    ),
    "nested-kvm": replace(DEBIAN, cpu="nested"),
    "tiny-pvh-tcg": TINY,
    "pvh-kvm-no-initrd": replace(TINY, accelerator="kvm", initrd=None, cmdline="", cpu="EPYC-v4"),
    "pvh-with-disk": replace(TINY, disks=DEBIAN.disks),
    "debian-bios-kvm": DEBIAN,
    "debian-bios-tcg": replace(DEBIAN, accelerator="tcg"),
    "debian-uefi-kvm": replace(DEBIAN, firmware=Firmware.UEFI, uefi_vars=Path("disks/uefi-vars.fd")),
    "debian-uefi-tcg-emulated": replace(
        DEBIAN,
        accelerator="tcg",
        devices=DeviceModel.EMULATED,
        firmware=Firmware.UEFI,
        uefi_vars=Path("disks/uefi-vars.fd"),
    ),
    "emulated": replace(DEBIAN, accelerator="tcg", devices=DeviceModel.EMULATED),
    "several-disks": replace(
        DEBIAN,
        seed=None,
        disks=(*DEBIAN.disks, *(BootDisk(path=Path(f"disks/disk{i}.qcow2")) for i in (1, 2))),
    ),
    "several-cards": replace(
        TINY,
        nics=(
            BootNic(mac="52:54:00:aa:bb:01", network="none"),
            BootNic(mac="52:54:00:aa:bb:02", network="user", forwards=(SSH,), number=1),
            BootNic(mac="52:54:00:aa:bb:03", network="user", number=2),
        ),
    ),
    "changed-devices": replace(
        DEBIAN,
        disks=(*DEBIAN.disks, BootDisk(path=Path("disks/disk2-1.qcow2"), layers=(Path("/l/disk.qcow2"),))),
        nics=(BootNic(mac="52:54:00:aa:bb:03", network="user", forwards=(SSH,), number=2),),
        slots={"disk0": 2, "seed": 3, "rng": 5, "balloon": 6, "disk2": 8, "nic2": 4},
    ),
    "no-card": replace(TINY, nics=()),
    "room-to-grow": replace(TINY, vcpus=2, vcpus_max=4, memory_max_mib=1024, cpu_affinity="0-1"),
    "forwards": replace(
        TINY,
        nics=(
            BootNic(
                mac="52:54:00:aa:bb:01",
                network="user",
                forwards=(
                    SSH,
                    Forward(host_port=8080, guest_port=80, host_address="0.0.0.0"),
                    Forward(host_port=5353, guest_port=53, protocol="udp"),
                ),
            ),
        ),
    ),
    "reboot-stops": replace(TINY, on_reboot=OnReboot.STOP),
    "awkward-paths": replace(
        TINY,
        kernel=AWKWARD / "kernel",
        initrd=AWKWARD / "initrd",
        cmdline='console=ttyS0 a="b,c" d=e,,f',
        disks=(BootDisk(path=Path("disks/disk0.qcow2"), backing=AWKWARD / "disk.qcow2"),),
    ),
}


def golden(name: str) -> Path:
    """The golden file of boot `name`."""
    return DIRECTORY / f"{name}.argv"


def rendered(boot: Boot) -> str:
    """The command line of `boot`: one argument a line, options' values indented."""
    code = UEFI_CODE if boot.firmware is Firmware.UEFI else None
    words = build_argv(QEMU, boot, code)
    assert all("\n" not in word for word in words)
    return "".join(f"{'' if word.startswith('-') or word == QEMU else '    '}{word}\n" for word in words)
