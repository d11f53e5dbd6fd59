"""QEMU's command line for a `Boot`: pure functions, checked by golden files.

Relative paths are relative to the VM's directory, in which QEMU runs: the command stays short (a socket's path is
limited to 108 bytes) and reads the same wherever the VM lies.

Options and properties: qemu(1) and `qemu-system-x86_64 -device NAME,help`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polyvisor.drivers.base import Boot, seed_number
from polyvisor.drivers.qemu.devices import disk_argv, display_argv, nic_argv, pinned, seed_argv
from polyvisor.spec.vm import NESTED, DeviceModel, Firmware, Mode, OnReboot

QMP_SOCKET = "run/qmp.sock"
OBSERVE_SOCKET = "run/observe.sock"
CONSOLE_SOCKET = "run/console.sock"
CONSOLE_LOG = "run/console.log"
PID_FILE = "run/qemu.pid"
# Two named pipes, AGENT_PIPE.in and AGENT_PIPE.out: what the host tells the guest, and what that answers.
AGENT_PIPE = "run/agent"

# AMD's virtualization, as TCG emulates it. With SMAP or SMEP Xen's dom0 crashes early, with MONITOR Xen's idle loop does, and
# RDTSCP ends Xen's PVH and HVM guests (QEMU 7.2 reports its intercept as RDTSC's).
NESTED_CPU = "EPYC,-smap,-smep,-monitor,-rdtscp,+svm,+npt"
# Below 16 MiB translation dominates (a boot takes 5 s instead of 3), above 32 nothing is gained.
TCG_BUFFER_MIB = 32
# No vCPU can be plugged in where it is nearly full (`resize.py`), so what may get one has more: a boot of `tiny` fills 90 MiB.
GROWING_BUFFER_MIB = 256
# It is what an emulated fork needs most memory for: of a guest's own it has some 5 MiB, and it translates everything anew.
# Those that are many share the CPUs, and gain less from it.
FORK_BUFFER_MIB, CROWD_BUFFER_MIB, CROWD = 16, 8, 16
RAM = "pc.ram"  # as QEMU itself calls it
SHARED_MEMORY = "memory-backend-memfd"
BALLOON = "balloon"
# Tells the guest that there may be another one like it: each QEMU has a new one, and a guest that goes on in it renews its
# random numbers (docs/specs/vmgenid.rst of QEMU; Linux' drivers/virt/vmgenid.c).
GENERATION_ARGV = ("-device", "vmgenid,guid=auto")
VIRTIO_ARGV = ("-device", "virtio-rng-pci", "-device", f"virtio-balloon-pci,id={BALLOON}")


def build_argv(binary: str, boot: Boot, uefi_code: Path | None = None) -> list[str]:
    """The command that runs `boot` with the QEMU at `binary`; `uefi_code` is the read-only half of UEFI firmware."""
    argv = [
        binary,
        *identity_argv(boot),
        *machine_argv(boot),
        *memory_argv(boot),
        *cpu_argv(boot),
        *firmware_argv(boot, uefi_code),
        *kernel_argv(boot),
        *control_argv(),
        *console_argv(),
        *agent_argv(),
        *GENERATION_ARGV,
        *display_argv(boot.devices),
        *(word for disk in boot.disks for word in disk_argv(disk, boot.devices, boot.firmware)),
        *seed_argv(boot.seed, seed_number(boot.disks), boot.devices, boot.firmware),
        *(word for nic in boot.nics for word in nic_argv(nic, boot.devices)),
        *(VIRTIO_ARGV if boot.devices is DeviceModel.PARAVIRTUAL else []),
    ]
    return pinned(argv, boot.slots)


def identity_argv(boot: Boot) -> list[str]:
    """Who it is, and the sandbox: QEMU may neither gain rights nor start programs (qemu(1), -sandbox)."""
    return [
        *("-name", f"guest={boot.name},process={boot.name}"),
        *("-uuid", boot.id),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-no-user-config", "-nodefaults"),
    ]


def memory_argv(boot: Boot) -> list[str]:
    """Under emulation, memory as a file that QEMU shares, from which forks are made at once (`shared_memory.py`).

    The words make it the same memory to a migration as that of a QEMU without them. Under KVM it would cost huge pages, and
    lists of written pages can be relied on there; a guest that runs guests is never forked.
    """
    if boot.accelerator != "tcg" or boot.cpu == NESTED:
        return []
    size = f"size={boot.resources.memory_max_mib}M"
    return [
        *("-object", f"{SHARED_MEMORY},id={RAM},{size},share=on,x-use-canonical-path-for-ramblock-id=off"),
        *("-machine", f"memory-backend={RAM}"),
    ]


def machine_argv(boot: Boot) -> list[str]:
    """`pc`, which boots quickest and is also what Xen's HVM guests see; `q35` for UEFI."""
    machine = "q35" if boot.firmware is Firmware.UEFI else "pc"
    accelerator = boot.accelerator
    if accelerator == "tcg":
        size_mib = TCG_BUFFER_MIB if boot.vcpus == boot.resources.vcpus_max else GROWING_BUFFER_MIB
        # A guest that runs guests has more code than that: it gets QEMU's own choice.
        accelerator += ",thread=multi" + ("" if boot.cpu == NESTED else f",tb-size={size_mib}")
    return [
        *("-machine", f"{machine},usb=off,vmport=off,dump-guest-core=off"),
        *("-accel", accelerator),
        # All that it may ever have; what it is not to have now is in the balloon.
        *("-m", f"size={boot.resources.memory_max_mib}M"),
    ]


def cpu_argv(boot: Boot) -> list[str]:
    models = {"auto": "max", NESTED: NESTED_CPU} if boot.accelerator == "tcg" else {"auto": "host", NESTED: "host"}
    return [
        *("-cpu", models.get(boot.cpu, boot.cpu)),
        *("-smp", smp(boot.vcpus, boot.resources.vcpus_max)),
        # Restored from a file, an emulated Xen would spend minutes catching up with a clock that has gone on.
        *(["-rtc", "clock=vm"] if boot.cpu == NESTED and boot.accelerator == "tcg" else []),
    ]


def smp(vcpus: int, most: int) -> str:
    """The value of -smp: one socket, whose cores beyond `vcpus` can be plugged in later."""
    return f"cpus={vcpus}{f',maxcpus={most}' if most > vcpus else ''},sockets=1,cores={most},threads=1"


def firmware_argv(boot: Boot, code: Path | None) -> list[str]:
    """UEFI as two flash chips: the code, shared and read-only, and the VM's own variables."""
    reboot = [] if boot.on_reboot is OnReboot.RESTART else ["-action", "reboot=shutdown"]
    if boot.firmware is not Firmware.UEFI:
        return reboot
    return [
        *reboot,
        *_blockdev(node="uefi-code", driver="raw", read_only=True, file=_file(code)),
        *_blockdev(node="uefi-vars", driver="raw", file=_file(boot.uefi_vars)),
        *("-machine", "pflash0=uefi-code,pflash1=uefi-vars"),
    ]


def kernel_argv(boot: Boot) -> list[str]:
    if boot.mode is not Mode.PVH:
        return []
    argv = ["-kernel", str(boot.kernel)]
    if boot.initrd is not None:
        argv += ["-initrd", str(boot.initrd)]
    return [*argv, "-append", boot.cmdline] if boot.cmdline else argv


def control_argv() -> list[str]:
    """Two monitors: QMP serves one client at a time, and whoever only looks must not wait for a long verb."""
    return [
        *("-chardev", f"socket,id=qmp,path={QMP_SOCKET},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=observe,path={OBSERVE_SOCKET},server=on,wait=off"),
        *("-mon", "chardev=observe,mode=control"),
        *("-pidfile", PID_FILE),
    ]


def console_argv() -> list[str]:
    chardev = f"socket,id=console,path={CONSOLE_SOCKET},server=on,wait=off,logfile={CONSOLE_LOG},logappend=on"
    return ["-chardev", chardev, "-serial", "chardev:console"]


def agent_argv() -> list[str]:
    """The second serial port, by which a guest that takes part is told who it is: any guest has a driver for it.

    Named pipes keep what is written while nobody listens, and who writes need not stay. QEMU opens both for reading and
    writing, so neither ever ends (qemu(1), -chardev pipe).
    """
    return ["-chardev", f"pipe,id=agent,path={AGENT_PIPE}", "-serial", "chardev:agent"]


def _blockdev(*, node: str, driver: str, file: dict[str, Any], read_only: bool = False) -> list[str]:
    options = {"node-name": node, "driver": driver, "read-only": read_only, "file": file}
    return ["-blockdev", json.dumps(options, separators=(",", ":"))]


def _file(path: Path | None) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}
