"""Images in a store, and exported ones, for tests: sound, and damaged member by member."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polyvisor.images.image import Image, ImageFile, Seed
from polyvisor.images.portable import exported
from polyvisor.images.store import ImageStore
from tests.unit.disks import qemu_img, tar

KERNEL = b"\x7fELF" + b"kernel" * 100_001
INITRD = b"070701" + bytes(range(256)) * 999


def add_direct(store: ImageStore, name: str = "direct", *, kernel: bytes = KERNEL) -> Image:
    """Add an image like `tiny`: a kernel and an initrd that takes the seed."""
    image = Image(
        id="",
        name=name,
        created_at=0.0,
        source="a test",
        kernel=_file("vmlinuz"),
        initrd=_file("initrd"),
        cmdline="quiet",
        seed=Seed.INITRD,
    )
    return _add(store, image, {"vmlinuz": kernel, "initrd": INITRD})


def add_full(store: ImageStore, directory: Path, name: str = "full") -> Image:
    """Add an image like `debian-12`, in which no field has its default; its disk is made in `directory`."""
    disk = directory / "made.qcow2"
    qemu_img("create", "-f", "qcow2", disk, "8M")
    qemu_img("bench", "-f", "qcow2", "-w", "-c", "16", "-s", "64k", "--pattern=7", disk)
    image = Image(
        id="",
        name=name,
        created_at=0.0,
        source="built from nothing, für den Test",
        os="Testix 1",
        disk=_file("disk.qcow2"),
        disk_size_mib=8,
        kernel=_file("vmlinuz"),
        initrd=_file("initrd.img"),
        cmdline='root=UUID=1 "a b"',
        firmware=("bios", "uefi"),
        seed=Seed.NOCLOUD,
        user="debian",
        memory_mib=768,
        recipe="0123456789ab",
        agent=True,
    )
    return _add(store, image, {"disk.qcow2": disk.read_bytes(), "vmlinuz": KERNEL, "initrd.img": INITRD})


def _file(name: str) -> ImageFile:
    return ImageFile(name=name, sha256="", size=0)


def _add(store: ImageStore, image: Image, files: dict[str, bytes]) -> Image:
    with store.staging() as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        return store.add(staging, image)


def archive(store: ImageStore, image: Image) -> bytes:
    return b"".join(exported(store, image))


def parts(store: ImageStore, image: Image) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest of an image as plain data, and the contents of its files: to be changed, and `packed` again."""
    directory = store.directory(image)
    manifest: dict[str, Any] = json.loads((directory / "image.json").read_text())
    return manifest, {file.name: (directory / file.name).read_bytes() for file in image.files}


def packed(manifest: object, files: dict[str, bytes]) -> bytes:
    """An archive of these; a manifest that is bytes goes in as it is."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return tar(("image.json", text), *files.items())
