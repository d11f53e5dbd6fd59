"""Which drivers a kernel has when it looks for its root file system: pure, from what was read elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from polyvisor.images.inspection.findings import Driver
from polyvisor.values import dataclass

# The kernel's names of the drivers that matter here, and the settings that build them.
SETTINGS = {
    "virtio_pci": "CONFIG_VIRTIO_PCI",
    "virtio_blk": "CONFIG_VIRTIO_BLK",
    "virtio_net": "CONFIG_VIRTIO_NET",
    "xen_blkfront": "CONFIG_XEN_BLKDEV_FRONTEND",
    "xen_netfront": "CONFIG_XEN_NETDEV_FRONTEND",
    "ata_piix": "CONFIG_ATA_PIIX",
    "ahci": "CONFIG_SATA_AHCI",
    "sd_mod": "CONFIG_BLK_DEV_SD",
    "e1000": "CONFIG_E1000",
}
XEN_PV, XEN_PVH, XEN_PVHVM = "CONFIG_XEN_PV", "CONFIG_XEN_PVH", "CONFIG_XEN_PVHVM"
_SETTING = re.compile(r"^(CONFIG_\w+)=(.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What an initramfs that can't be looked into should hold by its configuration: all modules, or those listed."""

    everything: bool
    listed: frozenset[str]
    known_by: str


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a kernel's drivers; None where it is not.

    `settings`: its configuration; `built_in`: modules.builtin; `modules`: all its modules on the root file system;
    `initrd`: the modules in its initramfs, empty where it has none.
    """

    settings: Mapping[str, str] | None = None
    built_in: frozenset[str] | None = None
    modules: frozenset[str] | None = None
    initrd: frozenset[str] | None = None
    assumed: Assumed | None = None


def parse_settings(text: str) -> dict[str, str]:
    """A kernel's configuration: setting → y, m or a value; what is not set is left out."""
    return dict(_SETTING.findall(text))


def locate(known: Known) -> dict[str, Driver]:
    """Where each driver is."""
    return {driver: _where(driver, setting, known) for driver, setting in SETTINGS.items()}


def _where(driver: str, setting: str, known: Known) -> Driver:
    built = known.settings.get(setting) if known.settings is not None else None
    if built == "y" or driver in (known.built_in or ()):
        return Driver.BUILT_IN
    if known.initrd is not None and driver in known.initrd:
        return Driver.INITRAMFS
    is_module = built == "m" or driver in (known.modules or ())
    absent = (known.settings is not None and built is None) or (
        known.modules is not None and known.built_in is not None
    )
    if absent and not is_module:
        return Driver.MISSING
    if known.initrd is None:
        if known.assumed is None:
            return Driver.UNKNOWN
        if driver in known.assumed.listed or (known.assumed.everything and is_module):
            return Driver.INITRAMFS
        return Driver.LATER if is_module and not known.assumed.everything else Driver.UNKNOWN
    if is_module:
        return Driver.LATER
    return Driver.UNKNOWN


def assumed_from(initramfs_tools: Sequence[str], lists: Sequence[str], dracut: Sequence[str]) -> Assumed | None:
    """What configurations say of an initramfs: of initramfs-tools and its lists of modules, or of dracut, in their order.

    None where they say that it fits the machine on which it was made, which nobody knows here.
    """
    if initramfs_tools:
        mode = _last_value(initramfs_tools, "MODULES") or "most"
        named = _listed(lists)
        if mode == "most":
            return Assumed(everything=True, listed=named, known_by="MODULES=most in /etc/initramfs-tools")
        if mode == "list":
            return Assumed(everything=False, listed=named, known_by="the modules that /etc/initramfs-tools lists")
    if dracut and _last_value(dracut, "hostonly") == "no":
        return Assumed(everything=True, listed=frozenset(), known_by="hostonly=no in dracut's configuration")
    return None


def _last_value(texts: Sequence[str], key: str) -> str | None:
    found = [value for text in texts for value in re.findall(rf"^[ \t]*{key}=[\"']?([\w-]*)", text, re.MULTILINE)]
    return found[-1] if found else None


def _listed(texts: Sequence[str]) -> frozenset[str]:
    """The modules in lists: one a line, with options behind it."""
    lines = (line.split("#")[0].split() for text in texts for line in text.splitlines())
    return frozenset(words[0].replace("-", "_") for words in lines if words)
