"""What a boot loader is told, and what file systems are mounted: GRUB's menu, boot loader entries, extlinux, fstab.

GRUB's menu is a program; it is not run here. The first `linux` command in it is taken for what boots, as menus that
grub-mkconfig writes mean it unless their user has chosen another entry.
Sources: GRUB's manual; the Boot Loader Specification of uapi-group.org; syslinux, doc/extlinux.txt; fstab(5).
"""

from __future__ import annotations

import re

from polyvisor.values import dataclass

# Blanks are never \s here: it matches newlines too, and a megabyte of them would take hours.
_LINUX = re.compile(r"^[ \t]*linux(?:16|efi)?[ \t]+(\S+)[ \t]*(.*)$", re.MULTILINE)
_INITRD = re.compile(r"^[ \t]*initrd(?:16|efi)?[ \t]+(.*)$", re.MULTILINE)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SET = re.compile(r"^[ \t]*(?:set[ \t]+)?(\w+)=(\"[^\"\n]*\"|'[^'\n]*'|[^\s;]*)", re.MULTILINE)
_DEVICE = re.compile(r"/dev/(sd|vd|xvd|hd|nvme|mmcblk)[a-z0-9]+\Z")
_MAX_WORD = 4096


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is booted: paths of kernel and initramfs files as the loader has them, and the kernel's command line."""

    kernel: str
    initrds: tuple[str, ...] = ()
    cmdline: str = ""


def grub_entry(config: str, environment: str = "") -> Entry | None:
    """The first entry of a grub.cfg; `environment` is the grubenv beside it. None where it names no kernel."""
    match = _LINUX.search(config)
    if match is None:
        return None
    known = {name: value.strip("\"'") for name, value in _SET.findall(environment + "\n" + config[: match.start()])}
    following = config[match.end() : match.end() + _MAX_WORD]
    until = _LINUX.search(following)
    initrd = _INITRD.search(following, 0, until.start() if until else len(following))
    return Entry(
        kernel=_path(_filled(match[1], known)),
        initrds=tuple(map(_path, _filled(initrd[1], known).split())) if initrd else (),
        cmdline=_filled(match[2], known),
    )


def bls_entry(text: str, environment: str = "") -> Entry | None:
    """What one file of loader/entries says."""
    known = dict(_SET.findall(environment))
    keys: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        keys.setdefault(key, []).append(value.strip())
    if not (kernels := keys.get("linux")):
        return None
    initrds = [word for value in keys.get("initrd", []) for word in value.split() if not word.startswith("$")]
    return Entry(
        kernel=_path(kernels[0]),
        initrds=tuple(map(_path, initrds)),
        cmdline=_filled(" ".join(keys.get("options", [])), known),
    )


def extlinux_entry(text: str) -> Entry | None:
    """The first entry of an extlinux.conf that names a kernel."""
    kernel: str | None = None
    initrds: tuple[str, ...] = ()
    cmdline = ""
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        match key.lower():
            case "label" if kernel is not None:
                break
            case "linux" | "kernel":
                kernel = value.strip()
            case "initrd":
                initrds = tuple(value.strip().split(","))
            case "append":
                cmdline = value.strip()
    return None if kernel is None else Entry(kernel=kernel, initrds=initrds, cmdline=cmdline[:_MAX_WORD])


def _path(word: str) -> str:
    """A path without the device that it may begin with: ``($root)/boot/vmlinuz``."""
    return re.sub(r"\A\([^)]*\)", "", word.strip("\"'"))


def _filled(text: str, known: dict[str, str]) -> str:
    """`text` with the variables that are known; others are nothing, as in GRUB."""
    text = text[:_MAX_WORD]
    return " ".join(_VARIABLE.sub(lambda match: known.get(match[1] or match[2], ""), text).split())[:_MAX_WORD]


def root_of(cmdline: str) -> str | None:
    """The root= of a command line; the last one counts."""
    return _last(cmdline, "root=")


def consoles_of(cmdline: str) -> tuple[str, ...]:
    return tuple(word.removeprefix("console=").split(",")[0] for word in cmdline.split() if word.startswith("console="))


def _last(cmdline: str, key: str) -> str | None:
    values = [word.removeprefix(key).strip("\"'") for word in cmdline.split() if word.startswith(key)]
    return values[-1] if values else None


def device_family(root: str) -> str | None:
    """sd, vd, xvd …, where `root` names a disk by its driver's name for it; None for UUID=, LABEL=, LVM and the like."""
    match = _DEVICE.match(root)
    return match[1] if match else None


@dataclass(frozen=True, kw_only=True)
class Mounts:
    """Of an fstab: what / is, and what else by the name of a device without which the system does not come up."""

    root: str | None
    devices: tuple[str, ...]


def read_fstab(text: str) -> Mounts:
    root, devices = None, []
    for line in text.splitlines():
        fields = line.split("#")[0].split()
        if len(fields) < 3 or line.lstrip().startswith("#"):
            continue
        source, place, kind = fields[:3]
        options = fields[3].split(",") if len(fields) > 3 else []
        if place == "/":
            root = root or source
        elif device_family(source) and kind != "swap" and not {"noauto", "nofail"} & set(options):
            devices.append(source)
    return Mounts(root=root, devices=tuple(devices[:20]))
