"""The image `tiny`: Debian's cloud kernel and a busybox initramfs that boots in seconds, even under emulation.

Made in seconds from Debian's packages: they are fetched and verified (`mirror`), read (`deb`) and packed (`cpio`) in
Python, so that it works without root and on hosts that aren't Debian. The same packages give the same image.
See docs/design/tiny-image.md.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from pathlib import Path

from polyvisor.errors import ImageRefused
from polyvisor.images import kmod, libraries, tiny_root
from polyvisor.images.deb import read_deb
from polyvisor.images.image import Image, ImageFile, Seed
from polyvisor.images.mapped import mapped_kernel
from polyvisor.images.mirror import Archive, Package, open_archive
from polyvisor.images.sources import default_mirror
from polyvisor.images.store import ImageStore, check_image_name
from polyvisor.operation import Progress, Step, silent
from polyvisor.values import dataclass

KERNEL = "linux-image-cloud-amd64"
PACKAGES = ("busybox-static", "dropbear-bin", "openssh-sftp-server", "openssh-client")
PROGRAMS = (
    "bin/busybox",
    "usr/sbin/dropbear",
    "usr/bin/dbclient",
    "usr/bin/dropbearkey",
    "usr/lib/openssh/sftp-server",  # for scp of OpenSSH 9 and newer
    "usr/bin/scp",  # for older ones, and scp -O
)
# hvc0 is Xen's console, ttyS0 everybody else's; the last one that exists is /dev/console.
# The kernel's tests of its own ciphers take 0.2 s of a boot under emulation. That of its timer fails there where the host is so
# busy that ticks come late, and it panics; on KVM and Xen it leaves it out by itself.
CMDLINE = "console=hvc0 console=ttyS0 quiet cryptomgr.notests no_timer_check"
MEMORY_MIB = 128
_KERNEL_PATH = re.compile(r"boot/vmlinuz-(?P<version>[\w.+~-]+)\Z")


@dataclass(frozen=True)
class Kernel:
    """A kernel out of its package: the bootable image, its modules by path, and the names of those built in."""

    version: str
    image: bytes
    modules: dict[str, bytes]
    builtin: frozenset[str]


async def build_tiny(
    store: ImageStore,
    cache: Path,
    *,
    name: str = "tiny",
    suite: str = "bookworm",
    mirror: str | None = None,
    keyring: Path | None = None,
    progress: Progress = silent,
) -> Image:
    """Build the image from `suite` of Debian and put it into `store` under `name`.

    `mirror` is a URL such as "http://host/debian" (default: that of this host's apt, else Debian's own); `keyring`
    replaces the keys of Debian's archive. Raises DownloadFailed, Unavailable (no gpgv), ImageRefused, InvalidInput,
    NotFound (the suite lacks a package), StorageFull.
    """
    check_image_name(name)
    archive = await open_archive(mirror or default_mirror(), suite, cache, keyring=keyring, progress=progress)
    packages = [kernel_package(archive), *map(archive.package, PACKAGES)]
    debs = await archive.fetch(packages, progress)
    progress(Step("unpack"))
    kernel, programs = await asyncio.gather(
        asyncio.to_thread(read_kernel, debs.pop(packages[0].name), packages[0].name),
        libraries.complete(archive, debs, PROGRAMS, progress),
    )
    progress(Step("pack"))
    release = tiny_root.OsRelease(suite=archive.release.codename, kernel=kernel.version)
    initrd = await asyncio.to_thread(tiny_root.initrd, kernel.version, chosen_modules(kernel), programs.files, release)
    with store.staging() as directory:
        (directory / "vmlinuz").write_bytes(kernel.image)
        (directory / "initrd").write_bytes(initrd)
        image = _manifest(name, archive.release.codename, [*packages, *programs.packages])
        image = await asyncio.to_thread(store.add, directory, image, progress)
    await asyncio.to_thread(mapped_kernel, store, image)  # or the first fork would wait for it
    return image


def kernel_package(archive: Archive) -> Package:
    """The package that KERNEL, which is empty itself, stands for."""
    for name in archive.package(KERNEL).depends:
        if name.startswith("linux-image-"):
            return archive.package(name)
    raise ImageRefused(f"{KERNEL} names no kernel package")


def read_kernel(deb: bytes, name: str) -> Kernel:
    """The kernel in package `name`; raises ImageRefused."""
    files = read_deb(deb, _of_kernel, name)
    images = [(match["version"], path) for path in files if (match := _KERNEL_PATH.match(path))]
    if len(images) != 1:
        raise ImageRefused(f"{name}: it holds {len(images)} kernels instead of one")
    version, path = images[0]
    modules = {path: file.data for path, file in files.items() if kmod.module_name(path)}
    builtin = next((file.data for path, file in files.items() if path.endswith("/modules.builtin")), b"")
    names = (kmod.module_name(line) for line in builtin.decode().splitlines())
    return Kernel(version, files[path].data, modules, frozenset(filter(None, names)))


def _of_kernel(path: str) -> bool:
    return bool(_KERNEL_PATH.match(path)) or path.endswith("/modules.builtin") or kmod.module_name(path) is not None


def chosen_modules(kernel: Kernel) -> list[kmod.Module]:
    """The modules that `tiny` carries; of the optional ones those that this kernel has."""
    names = {kmod.module_name(path) for path in kernel.modules}
    optional = [name for name in tiny_root.OPTIONAL_MODULES if name in names]
    return kmod.choose(kernel.modules, [*tiny_root.MODULES, *optional], kernel.builtin)


def _manifest(name: str, suite: str, packages: Iterable[Package]) -> Image:
    versions = ", ".join(f"{package.name} {package.version}" for package in packages)
    return Image(
        id="",
        name=name,
        created_at=0.0,
        source=f"Debian {suite}: {versions}",
        os=f"Polyvisor tiny (Debian {suite} kernel)",
        kernel=ImageFile(name="vmlinuz", sha256="", size=0),
        initrd=ImageFile(name="initrd", sha256="", size=0),
        cmdline=CMDLINE,
        seed=Seed.INITRD,
        user="root",
        memory_mib=MEMORY_MIB,
        agent=True,
    )
