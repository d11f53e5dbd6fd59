"""The configuration that `xl create` reads (xl.cfg(5)), for a `Boot`: a pure function, checked by golden files.

A configuration is text in a small language of names, strings and lists, parsed by libxl's own scanner (libxlu_cfg_l.l). A
string in double quotes ends at the next double quote or the end of the line and knows backslashes; `quoted` leaves nothing in
it that the scanner would take for anything but itself, so nothing of a spec can add a setting. The words inside a disk are
separated by commas, but `target=` takes all the rest as it is (xl-disk-configuration(5)), and so comes last.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from polyvisor.drivers.base import Boot, BootNic, seed_number
from polyvisor.errors import InvalidInput
from polyvisor.network.nat import BRIDGE, interface_name, private_bridge
from polyvisor.spec.cpus import ALL_CPUS
from polyvisor.spec.resources import NORMAL_WEIGHT, Resources
from polyvisor.spec.vm import DeviceModel, Mode, OnReboot

CONSOLE_SOCKET = "run/console.sock"
CONSOLE_LOG = "run/console.log"
IDE_PLACES = 4
XEN_NORMAL_WEIGHT = 256
_RESOURCES = ("vcpus", "maxvcpus", "memory", "maxmem", "cpu_weight", "cap", "cpus")


def build_config(boot: Boot, directory: Path, loader: Path | None = None) -> str:
    """The text that makes `xl create` start `boot`, whose relative paths are relative to `directory`.

    `loader` boots a guest in mode pv or pvh that is given no kernel from its disk.

    Raises InvalidInput for a path that no such text can carry.
    """
    settings = [
        ("name", quoted(boot.name)),
        ("uuid", quoted(boot.id)),
        ("type", quoted(boot.mode.value)),
        *resource_settings(boot.resources),
        *_kernel(boot, directory, loader),
        *_ends(boot),
        *(_hvm(boot) if boot.mode is Mode.HVM else []),
        ("disk", _list(_disks(boot, directory))),
        ("vif", _list(_card(nic, boot) for nic in boot.nics)),
    ]
    return "".join(f"{name} = {value}\n" for name, value in settings)


def resource_settings(resources: Resources) -> list[tuple[str, str]]:
    """vCPUs, memory and CPU shares; what Xen does by itself is left out (xl.cfg(5), "CPU Allocation", "Memory Allocation")."""
    optional = {
        "maxvcpus": str(resources.vcpus_max) if resources.vcpus_max > resources.vcpus else None,
        "cpu_weight": str(xen_weight(resources.cpu_weight)) if resources.cpu_weight != NORMAL_WEIGHT else None,
        "cap": str(cap) if (cap := xen_cap(resources)) else None,
        "cpus": quoted(resources.cpu_affinity) if resources.cpu_affinity != ALL_CPUS else None,
    }
    return [
        ("vcpus", str(resources.vcpus)),
        ("memory", str(resources.memory_mib)),
        ("maxmem", str(resources.memory_max_mib)),
        *((name, value) for name, value in optional.items() if value is not None),
    ]


def with_resources(config: str, resources: Resources) -> str:
    """The text `config`, which `build_config` made, with other resources."""
    lines = [line for line in config.splitlines() if line.partition(" = ")[0] not in _RESOURCES]
    return "".join(
        f"{line}\n" for line in [*lines, *(f"{name} = {value}" for name, value in resource_settings(resources))]
    )


def has_qemu_disks(config: str) -> bool:
    """Whether a QEMU serves the disks of the guest of `config`, which `build_config` made."""
    return "backendtype=qdisk" in config


def xen_cap(resources: Resources) -> int:
    """The limit as the scheduler's `cap`, which has to be one: 0 stands for none, and so for as much as all vCPUs can use."""
    limit = resources.cpu_limit or 0
    return limit if limit < 100 * resources.vcpus_max else 0


def xen_weight(weight: int) -> int:
    """A spec's weight, of which 100 is the normal one, on the scale of Xen's scheduler: 256 is, out of 1 to 65535 (xl(1))."""
    return max(1, min(65535, round(weight * XEN_NORMAL_WEIGHT / NORMAL_WEIGHT)))


def quoted(text: str) -> str:
    """`text` as a string of the configuration language; raises InvalidInput for what does not print.

    Inside double quotes, the scanner unescapes backslash and whatever follows, and ends at a double quote or a line's end.
    """
    if not text.isprintable():
        raise InvalidInput("configuration", text, "holds characters that xl's configuration can't")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _list(strings: Iterable[str]) -> str:
    items = [quoted(string) for string in strings]
    return f"[ {', '.join(items)} ]" if items else "[ ]"


def _kernel(boot: Boot, directory: Path, loader: Path | None) -> list[tuple[str, str]]:
    if boot.kernel is None:
        return [] if loader is None or boot.mode is Mode.HVM else [("kernel", quoted(str(loader)))]
    settings = [("kernel", quoted(str(directory / boot.kernel)))]
    if boot.initrd is not None:
        settings.append(("ramdisk", quoted(str(directory / boot.initrd))))
    return [*settings, ("cmdline", quoted(boot.cmdline))]


def _ends(boot: Boot) -> list[tuple[str, str]]:
    """What xl does when the guest ends: it stays for as long as the VM is meant to, and says why it ended in its log."""
    restart = boot.on_reboot is OnReboot.RESTART
    return [
        ("on_poweroff", quoted("destroy")),
        ("on_reboot", quoted("restart" if restart else "destroy")),
        ("on_watchdog", quoted("destroy")),
        ("on_crash", quoted("destroy")),
    ]


def _hvm(boot: Boot) -> list[tuple[str, str]]:
    """An HVM guest's emulated hardware: a serial port on a socket, with a log, and neither screen nor tablet.

    Xen's own QEMU runs in the directory in which xl does, which keeps the socket's name short.
    """
    console = f"socket,id=console,path={CONSOLE_SOCKET},server=on,wait=off,logfile={CONSOLE_LOG},logappend=on"
    return [
        *([] if boot.kernel else [("boot", quoted("c"))]),
        ("serial", quoted("chardev:console")),
        ("device_model_args_hvm", _list(("-chardev", console))),
        ("vnc", "0"),
        ("sdl", "0"),
        ("usb", "0"),
        ("xen_platform_pci", "0" if boot.devices is DeviceModel.EMULATED else "1"),
    ]


def _disks(boot: Boot, directory: Path) -> Iterable[str]:
    """Disks by Xen's paravirtual protocol, served by its QEMU, which can read qcow2; the seed is the last, read-only.

    A firmware boots from emulated IDE alone: there, `hd*` is both, until the guest's driver unplugs the emulated one. The
    guest calls them xvda, xvdb, … in either case.
    """
    firmware = boot.mode is Mode.HVM and boot.kernel is None
    disks = [(disk.number, disk.path, "qcow2", "rw") for disk in boot.disks]
    if boot.seed is not None:
        disks.append((seed_number(boot.disks), boot.seed, "raw", "ro"))
    for i, path, form, access in disks:
        emulated = (firmware or boot.devices is DeviceModel.EMULATED) and boot.mode is Mode.HVM and i < IDE_PLACES
        device = f"{'hd' if emulated else 'xvd'}{chr(ord('a') + i)}"
        yield f"format={form},vdev={device},access={access},backendtype=qdisk,target={directory / path}"


def _card(nic: BootNic, boot: Boot) -> str:
    """A network card; one without a cable hangs on no bridge: the script that does nothing is `/bin/true`."""
    bridge = bridge_of(nic)
    place = f"bridge={bridge},vifname={interface_name(nic.mac, bridge)}" if bridge else "script=/bin/true"
    emulated = boot.mode is Mode.HVM and boot.devices is DeviceModel.EMULATED
    return f"mac={nic.mac},{place}" + (
        ",type=ioemu,model=e1000" if emulated else ",type=vif" if boot.mode is Mode.HVM else ""
    )


def bridge_of(nic: BootNic) -> str | None:
    """The host's bridge that a card hangs on."""
    if nic.group is not None:
        return private_bridge(nic.group)
    return BRIDGE if nic.network == "user" else None
