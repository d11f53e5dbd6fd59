"""A disk that boots by what is on it: GRUB's configuration, Debian's general kernel, and `tiny`'s root for that kernel.

Full Debian takes minutes to boot on an emulated Xen; this one goes the same way and has little to do at its end. The file
system's drivers in its initramfs let the guest change its own GRUB configuration.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path
from uuid import UUID, uuid4

from polyvisor.images import kmod, libraries, tiny, tiny_root
from polyvisor.images.image import Image, ImageFile
from polyvisor.images.mirror import Archive, Package, open_archive
from polyvisor.images.partition import LINUX_ROOT_X86_64, MIB, Partition, gpt
from polyvisor.images.qemu_img import pack
from polyvisor.images.sources import default_mirror
from polyvisor.images.store import ImageStore

CONFIG = "boot/grub/grub.cfg"
_KERNEL = "linux-image-amd64"
_FILE_SYSTEM = ("ext4", "crc32c_generic")
_SIZE = 96 * MIB


async def build_grub_disk(store: ImageStore, cache: Path, name: str, suite: str = "bookworm") -> Image:
    """Put such an image into `store`, which has no kernel beside its disk; `word=first` is on its kernel's command line."""
    archive = await open_archive(default_mirror(), suite, cache)
    package = _kernel_package(archive)
    debs = await archive.fetch([package, *map(archive.package, tiny.PACKAGES)])
    kernel = tiny.read_kernel(debs.pop(package.name), package.name)
    programs = await libraries.complete(archive, debs, tiny.PROGRAMS)
    release = tiny_root.OsRelease(suite=suite, kernel=kernel.version)
    modules = kmod.choose(kernel.modules, [*tiny_root.MODULES, *_FILE_SYSTEM], kernel.builtin)
    initrd = tiny_root.initrd(kernel.version, modules, programs.files, release)
    with store.staging() as staging:
        work = staging / "work"
        # GRUB reads some 100 KB a second on an emulated Xen.
        _write_disk(
            work, {"boot/vmlinuz": kernel.image, "boot/initrd": gzip.compress(initrd), CONFIG: _CONFIG.encode()}
        )
        await pack(work / "disk.raw", staging / "disk.qcow2", _SIZE, lambda _: None)
        shutil.rmtree(work)
        return store.add(staging, _manifest(name), lambda _: None)


_CONFIG = """\
set timeout=0
insmod part_gpt
insmod ext2
if [ "$grub_platform" = xen ]; then
  insmod gzio
  insmod xzio
fi
search --no-floppy --file --set=root /boot/vmlinuz
menuentry 'the kernel on this disk' {
  linux /boot/vmlinuz console=hvc0 word=first
  initrd /boot/initrd
}
"""


def _kernel_package(archive: Archive) -> Package:
    return next(archive.package(each) for each in archive.package(_KERNEL).depends if each.startswith("linux-image-"))


def _write_disk(work: Path, content: dict[str, bytes]) -> None:
    for path, data in content.items():
        (work / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        (work / "root" / path).write_bytes(data)
    root = Partition(number=1, kind=LINUX_ROOT_X86_64, uuid=uuid4(), name="root", start=MIB, size=_SIZE - 2 * MIB)
    begin, end = gpt(UUID(int=1), _SIZE, [root])
    disk = work / "disk.raw"
    with disk.open("wb") as raw:
        raw.truncate(_SIZE)
        raw.write(begin)
        raw.seek(_SIZE - len(end))
        raw.write(end)
    mke2fs = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^metadata_csum_seed,^orphan_file"]
    place = ["-E", f"offset={root.start}", "-d", str(work / "root"), str(disk), f"{root.size // 1024}k"]
    subprocess.run([*mke2fs, *place], check=True)


def _manifest(name: str) -> Image:
    return Image(
        id="",
        name=name,
        created_at=0.0,
        source="a disk for tests",
        disk=ImageFile(name="disk.qcow2", sha256="", size=0),
        disk_size_mib=_SIZE // MIB,
        user="root",
        memory_mib=256,
    )
