"""The system on a disk: which of its file systems is the root, its kernels, and how it means to boot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from polyvisor.images.inspection.bootconfig import (
    Entry,
    Mounts,
    bls_entry,
    consoles_of,
    extlinux_entry,
    grub_entry,
    read_fstab,
    root_of,
)
from polyvisor.images.inspection.budget import Budget, Unreadable
from polyvisor.images.inspection.drivers import Assumed, assumed_from, parse_settings
from polyvisor.images.inspection.files import Files, listing, text
from polyvisor.images.inspection.findings import KernelFound, SystemFound
from polyvisor.images.inspection.initrd import MAX_INITRD, listed
from polyvisor.images.inspection.kernel import MAX_KERNEL
from polyvisor.images.inspection.kernels import Beside, describe_kernel, with_drivers
from polyvisor.values import dataclass

_MAX_KERNELS = 4
_MAX_LIST = 4 << 20
_MAX_CONFIGS = 40
_KERNEL = re.compile(r"(vmlinuz|vmlinux|bzImage|kernel)(-|\Z)")
_NO_KERNEL = re.compile(r"(rescue|\.old|\.hmac|\.sig|\.efi|recovery)")
_GETTY = re.compile(r"serial-getty@([\w.-]{1,32})\.service\Z")
_INITTAB = re.compile(r"^[^#\n]*\b((?:ttyS|hvc|xvc)\d+)\b", re.MULTILINE)


@dataclass(frozen=True)
class Place:
    """Where files of /boot are: at `prefix` of a file system."""

    files: Files
    prefix: str


class System:
    """The system on file systems that could be read, as they come; `root` is None where its own is not among them."""

    def __init__(self, readable: Sequence[Files], budget: Budget) -> None:
        self._budget = budget
        self.root = next((files for files in readable if _is_root(files)), None)
        others = [files for files in readable if files is not self.root]
        root = [Place(self.root, "/boot")] if self.root else []
        self.places = [*root, *(Place(files, "") for files in others if _is_boot(files))]
        self.grub_config: str | None = None
        self.entry_from: str | None = None
        self.entry = self._first_entry()

    # How it boots

    def _first_entry(self) -> Entry | None:
        for place in self.places:
            for name in ("grub", "grub2"):
                path = f"{place.prefix}/{name}/grub.cfg"
                if (config := text(place.files, path)) is None:
                    continue
                self.grub_config = self.grub_config or path
                environment = text(place.files, f"{place.prefix}/{name}/grubenv") or ""
                if entry := grub_entry(config, environment) or self._loader_entry(place, environment):
                    self.entry_from = self.entry_from or path
                    return entry
        for place in self.places:
            if entry := self._loader_entry(place, ""):
                self.entry_from = f"{place.prefix}/loader/entries"
                return entry
            for path in ("/extlinux/extlinux.conf", "/extlinux.conf", "/syslinux/syslinux.cfg"):
                config = text(place.files, place.prefix + path)
                if config is not None and (entry := extlinux_entry(config)):
                    self.entry_from = place.prefix + path
                    return entry
        return None

    def _loader_entry(self, place: Place, environment: str) -> Entry | None:
        """The newest entry of the boot loader specification."""
        directory = f"{place.prefix}/loader/entries"
        names = [name for name in listing(place.files, directory) if name.endswith(".conf") and "rescue" not in name]
        for name in sorted(names, key=_version_key, reverse=True)[:_MAX_CONFIGS]:
            entry = bls_entry(text(place.files, f"{directory}/{name}") or "", environment)
            if entry is not None:
                return entry
        return None

    # Kernels

    def kernels(self) -> tuple[KernelFound, ...]:
        """The kernels in /boot, the one that boots by default first."""
        paths = [(place, f"{place.prefix}/{name}") for place in self.places for name in _kernel_names(place)]
        found = list(dict.fromkeys((place, place.files.canonical(path)) for place, path in paths[:_MAX_CONFIGS]))
        default = self._located(self.entry.kernel) if self.entry else None
        found.sort(key=lambda each: _version_key(each[1]), reverse=True)
        if default is not None:
            found = [default, *(each for each in found if each != default)]
        return tuple(self._kernel(place, path, first=not i) for i, (place, path) in enumerate(found[:_MAX_KERNELS]))

    def _located(self, path: str) -> tuple[Place, str] | None:
        """Where a path in a boot loader's configuration leads, which counts from the partition's root, or from /boot."""
        for place in self.places:
            for tried in dict.fromkeys((path, f"{place.prefix}/{path.lstrip('/')}", f"/{path.rpartition('/')[2]}")):
                try:
                    return place, place.files.canonical(tried)
                except Unreadable:
                    continue
        return None

    def _kernel(self, place: Place, path: str, *, first: bool) -> KernelFound:
        try:
            data = place.files.read(path, MAX_KERNEL)
        except Unreadable as error:
            return KernelFound(path=path, version=None, architecture="unknown", packing=None, problem=str(error))
        kernel = describe_kernel(path, data, self._budget)
        version = kernel.version or re.sub(r"\A[^-]*-?", "", path.rpartition("/")[2]) or None
        kernel = replace(kernel, version=version)
        initrd, content, problem = self._initrd(place, version, first=first)
        return with_drivers(kernel, initrd, content, self.beside(version), self._budget, problem)

    def _initrd(self, place: Place, version: str | None, *, first: bool) -> tuple[str | None, bytes | None, str]:
        """Path and content of a kernel's initramfs; without content, why."""
        tried: list[tuple[Place, str]] = []
        if first and self.entry:
            tried += [found for path in self.entry.initrds if (found := self._located(path))]
            tried = [each for each in tried if not re.search("ucode|microcode", each[1])]
        names = (f"initrd.img-{version}", f"initramfs-{version}.img", f"initrd-{version}", f"initrd-{version}.img")
        flavour = (version or "").rpartition("-")[2]  # Alpine's vmlinuz-virt and initramfs-virt
        tried += [
            (place, f"{place.prefix}/{name}") for name in (*names, f"initramfs-{flavour}", f"initramfs-{flavour}.img")
        ]
        for where, path in tried:
            try:
                return path, where.files.read(path, MAX_INITRD), ""
            except Unreadable as error:
                if where.files.exists(path):
                    return path, None, str(error)
        return None, None, ""

    def beside(self, version: str | None) -> Beside:
        """What the disk says of a kernel of that version."""
        if version is None or "/" in version:
            return Beside(assumed=self._assumed())
        settings = self._settings(version)
        base = f"/lib/modules/{version}"
        return Beside(
            settings=settings,
            built_in=self._modules(f"{base}/modules.builtin"),
            modules=self._modules(f"{base}/modules.dep"),
            assumed=self._assumed(),
        )

    def _settings(self, version: str) -> dict[str, str] | None:
        paths = [(place.files, f"{place.prefix}/config-{version}") for place in self.places]
        if self.root:
            paths += [(self.root, f"/lib/modules/{version}/config")]
        for files, path in paths:
            if found := text(files, path):
                return parse_settings(found)
        return None

    def _modules(self, path: str) -> frozenset[str] | None:
        if self.root is None:
            return None
        try:
            raw = self.root.read(path, _MAX_LIST).decode(errors="replace")
        except Unreadable:
            return None
        return listed("\n".join(line.split(":")[0] for line in raw.splitlines()))

    def _assumed(self) -> Assumed | None:
        """What the configuration of the initramfs says of its content."""
        tools = self._texts("/etc/initramfs-tools/initramfs.conf", "/etc/initramfs-tools/conf.d")
        lists = self._texts("/etc/initramfs-tools/modules", "/usr/share/initramfs-tools/modules.d")
        dracut = self._texts("/usr/lib/dracut/dracut.conf.d", "/etc/dracut.conf", "/etc/dracut.conf.d")
        return assumed_from(tools, lists, dracut)

    def _texts(self, *paths: str) -> list[str]:
        """The files of these paths, and those in the directories among them."""
        found: list[str] = []
        if self.root is None:
            return found
        for path in paths:
            names = listing(self.root, path)[:_MAX_CONFIGS]
            files = [f"{path}/{name}" for name in names] if names else [path]
            found += [content for file in files if (content := text(self.root, file)) is not None]
        return found

    # What else there is to know

    def found(self, problem: str | None) -> SystemFound:
        """The system; `problem` says why its root could not be read, where that is so."""
        cmdline = self.entry.cmdline if self.entry else None
        mounts = self._mounts()
        return SystemFound(
            name=self._name(),
            root=(root_of(cmdline) if cmdline else None) or mounts.root,
            cmdline=cmdline,
            cmdline_from=self.entry_from,
            devices=mounts.devices,
            consoles=consoles_of(cmdline or ""),
            gettys=self._gettys(),
            grub_config=self.grub_config,
            cloud_init=self._cloud_init(),
            problem=None
            if self.root
            else problem or "no file system on it holds a system (/etc/os-release, /etc/fstab)",
        )

    def _name(self) -> str | None:
        for path in ("/etc/os-release", "/usr/lib/os-release"):
            content = text(self.root, path) if self.root else None
            if content and (match := re.search(r"^PRETTY_NAME=[\"']?([^\"'\n]{1,100})", content, re.MULTILINE)):
                return match[1]
        return None

    def _mounts(self) -> Mounts:
        return read_fstab((text(self.root, "/etc/fstab") if self.root else None) or "")

    def _gettys(self) -> tuple[str, ...]:
        if self.root is None:
            return ()
        names = listing(self.root, "/etc/systemd/system/getty.target.wants")
        found = [match[1] for name in names if (match := _GETTY.match(name))]
        return tuple(dict.fromkeys([*found, *_INITTAB.findall(text(self.root, "/etc/inittab") or "")]))[:8]

    def _cloud_init(self) -> bool | None:
        if self.root is None:
            return None
        return self.root.exists("/usr/bin/cloud-init") or self.root.exists("/etc/cloud/cloud.cfg")


def _is_root(files: Files) -> bool:
    return any(files.exists(path) for path in ("/etc/os-release", "/usr/lib/os-release", "/etc/fstab"))


def _is_boot(files: Files) -> bool:
    names = listing(files, "/")
    return any(_is_kernel(name) or name in ("grub", "grub2", "extlinux", "loader") for name in names)


def _is_kernel(name: str) -> bool:
    return bool(_KERNEL.match(name)) and not _NO_KERNEL.search(name)


def _kernel_names(place: Place) -> list[str]:
    return [name for name in listing(place.files, place.prefix or "/") if _is_kernel(name)]


def _version_key(name: str) -> list[tuple[int, int, str]]:
    """Versions in their order: numbers as numbers."""
    parts = re.findall(r"\d+|[^\d]+", name)
    return [(1, int(part[:18]), "") if part.isdigit() and part.isascii() else (0, 0, part) for part in parts]
