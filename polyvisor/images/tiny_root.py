"""The root file system of `tiny`: what lies where in its initramfs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources

from polyvisor.errors import ImageRefused
from polyvisor.images import cpio, kmod, reseed
from polyvisor.values import dataclass

# Both families of paravirtual drivers: one image boots on QEMU and on Xen.
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "xen_blkfront", "xen_netfront")
OPTIONAL_MODULES = (
    "virtio_scsi",
    "virtio_console",
    "virtio_balloon",
    "virtio_rng",
    "ata_piix",
    "ahci",
    "sd_mod",
    "sr_mod",
    "e1000",
    "e1000e",
    "8139cp",
    "vmxnet3",
    "isofs",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "button",
    "evdev",
    "qemu_fw_cfg",
)
DIRECTORIES = {
    "dev": 0o755,
    "etc/acpi/PWRF": 0o755,
    "etc/dropbear": 0o700,
    "etc/polyvisor": 0o755,
    "home": 0o755,
    "mnt": 0o755,
    "proc": 0o555,
    "root/.ssh": 0o700,
    "run": 0o755,
    "sys": 0o555,
    "tmp": 0o1777,
    "usr/lib": 0o755,
    "usr/share": 0o755,
    "usr/local/bin": 0o755,
    "var/log": 0o755,
    "var/lib": 0o755,
}
LINKS = {
    "sbin": "bin",
    "usr/bin": "../bin",
    "usr/sbin": "../bin",
    "usr/lib/sftp-server": "openssh/sftp-server",  # where dropbear looks
    "bin/ssh": "dbclient",
    "var/run": "../run",
    "etc/mtab": "../proc/self/mounts",
}
# Files of the package's data, by the path that they get.
SCRIPTS = {
    "init": "init",
    "etc/polyvisor/boot": "boot",
    "etc/polyvisor/dhcp": "dhcp",
    "etc/polyvisor/hotplug": "hotplug",
    "etc/polyvisor/late": "late",
    "etc/polyvisor/lease": "lease",
    "etc/acpi/PWRF/00000080": "power-button",
}
# The images share it.
AGENT = "debian/rootfs/usr/lib/polyvisor/agent"
TEXTS = {"etc/inittab": "inittab", "etc/issue": "issue", "etc/profile": "profile", "etc/os-release": "os-release"}
# The empty password is in shadow: busybox does not find a user by number whose field in passwd is empty.
PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"  # noqa: S105
SHADOW = "root::19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n"
GROUP = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"


@dataclass(frozen=True)
class OsRelease:
    """What the guest says of itself in /etc/os-release."""

    suite: str
    kernel: str


def initrd(version: str, modules: Sequence[kmod.Module], programs: Mapping[str, bytes], release: OsRelease) -> bytes:
    """The initramfs, padded so that a seed can be appended. `programs` by path; `version` is the kernel's."""
    files = {**_programs(programs), **_modules(version, modules), **_texts(release)}
    links = {**LINKS, **{f"bin/{applet}": "busybox" for applet in applets(programs["bin/busybox"])}}
    links = {path: target for path, target in links.items() if path not in files}
    return cpio.padded(cpio.archive(_entries(files, links)))


def applets(busybox: bytes) -> list[str]:
    """The names of busybox's applets, from the table in the program itself (a list sorted, each ending in NUL)."""
    at = busybox.find(b"[\0[[\0")
    end = busybox.find(b"\0\0", at)
    names = busybox[at:end].decode("ascii", "replace").split("\0") if at >= 0 and end >= 0 else []
    if not {"sh", "init", "modprobe", "udhcpc", "getty"} <= set(names):
        raise ImageRefused("busybox lacks programs that the image needs")
    return [name for name in names if re.fullmatch(r"[\w.\[-]+", name)]


def _programs(programs: Mapping[str, bytes]) -> dict[str, cpio.Entry]:
    """Programs go to /bin (sbin, usr/bin and usr/sbin are links to it); libraries and the like stay where they are."""
    paths = {path: re.sub(r"\A(usr/)?s?bin/", "bin/", path) for path in programs}
    return {paths[path]: cpio.file(paths[path], data, 0o755) for path, data in programs.items()}


def _modules(version: str, modules: Sequence[kmod.Module]) -> dict[str, cpio.Entry]:
    base = f"lib/modules/{version}"
    contents = {f"{base}/{module.file}": module.data for module in modules}
    contents[f"{base}/modules.dep"] = kmod.dep_index(modules).encode()
    contents[f"{base}/modules.alias"] = kmod.alias_index(modules).encode()
    return {path: cpio.file(path, data) for path, data in contents.items()}


def _texts(release: OsRelease) -> dict[str, cpio.Entry]:
    package = resources.files("polyvisor.images") / "data"
    data = package / "tiny"
    entries = {path: cpio.file(path, (data / name).read_bytes(), 0o755) for path, name in SCRIPTS.items()}
    texts = {path: (data / name).read_text() for path, name in TEXTS.items()}
    texts["etc/os-release"] = (
        texts["etc/os-release"].replace("@SUITE@", release.suite).replace("@KERNEL@", release.kernel)
    )
    texts |= {"etc/passwd": PASSWD, "etc/group": GROUP, "etc/shells": "/bin/sh\n"}
    entries["etc/polyvisor/agent"] = cpio.file("etc/polyvisor/agent", (package / AGENT).read_bytes(), 0o755)
    entries["bin/reseed"] = cpio.file("bin/reseed", reseed.program(), 0o755)
    entries["etc/shadow"] = cpio.file("etc/shadow", SHADOW.encode(), 0o600)
    return entries | {path: cpio.file(path, text.encode()) for path, text in texts.items()}


def _entries(files: Mapping[str, cpio.Entry], links: Mapping[str, str]) -> list[cpio.Entry]:
    """All members, sorted by path: so a directory comes before what is in it, and the archive is reproducible."""
    entries = {**files, **{path: cpio.symlink(path, target) for path, target in links.items()}}
    entries["dev/console"] = cpio.character_device("dev/console", 5, 1)
    for path in [*entries, *DIRECTORIES]:
        parts = path.split("/")
        for depth in range(1, len(parts) + (path in DIRECTORIES)):
            parent = "/".join(parts[:depth])
            entries.setdefault(parent, cpio.directory(parent, DIRECTORIES.get(parent, 0o755)))
    entries["root"] = cpio.directory("root", 0o700)
    return [entries[path] for path in sorted(entries, key=lambda path: path.split("/"))]
