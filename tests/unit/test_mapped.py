"""The kernel inside an image's, which QEMU maps; the real one is that of `tiny` (tests/contract/test_fork.py)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyvisor.images.image import Image, ImageFile
from polyvisor.images.inspection.kernel import MAX_KERNEL
from polyvisor.images.mapped import mapped_kernel
from polyvisor.images.store import ImageStore
from tests.unit.bootable import ENTRY, GUEST_OS, PHYS32_ENTRY, bzimage, packed, vmlinux

INSIDE = vmlinux(ENTRY, GUEST_OS, PHYS32_ENTRY, padding=5000)


def stored(store: ImageStore, kernel: bytes | None) -> Image:
    with store.staging() as staging:
        (staging / "initrd").write_bytes(b"initrd")
        if kernel is not None:
            (staging / "vmlinuz").write_bytes(kernel)
        file = ImageFile(name="vmlinuz", sha256="", size=0) if kernel is not None else None
        initrd = ImageFile(name="initrd", sha256="", size=0)
        return store.add(staging, Image(id="", name="made", created_at=0.0, source="test", kernel=file, initrd=initrd))


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path)


@pytest.mark.parametrize("packing", ["none", "gzip", "xz", "lzma", "bzip2", "lz4"])
def test_it_is_what_was_packed(store: ImageStore, packing: str) -> None:
    image = stored(store, bzimage(packed(INSIDE, packing)))
    before = os.umask(0o077)
    try:
        path = mapped_kernel(store, image)
    finally:
        os.umask(before)
    assert path == store.directory(image) / "vmlinux"
    assert path is not None and path.read_bytes()[: len(INSIDE)] == INSIDE
    assert path.stat().st_mode & 0o777 == 0o444, "whoever runs a VM maps it, and nobody changes it"


def test_one_that_is_not_packed_at_all(store: ImageStore) -> None:
    path = mapped_kernel(store, stored(store, INSIDE))
    assert path is not None and path.read_bytes() == INSIDE


def test_it_is_made_once(store: ImageStore) -> None:
    image = stored(store, bzimage(packed(INSIDE, "xz")))
    first = mapped_kernel(store, image)
    assert first is not None
    before = first.stat().st_ino
    assert mapped_kernel(store, image) == first
    assert first.stat().st_ino == before


@pytest.mark.parametrize(
    "kernel",
    [
        bzimage(packed(vmlinux(ENTRY, GUEST_OS), "xz")),
        bzimage(packed(vmlinux(GUEST_OS, PHYS32_ENTRY, machine=183), "xz")),
        bzimage(packed(INSIDE, "zstd")),
        bzimage(packed(INSIDE, "xz")[:-40]),
        bzimage(b"packed by something unknown"),
        b"no kernel",
        bytes(MAX_KERNEL + 1),
    ],
    ids=["no PVH entry", "another machine", "can't be unpacked", "cut off", "unknown", "none at all", "too large"],
)
def test_what_can_not_be_had_is_not_tried_again(store: ImageStore, kernel: bytes) -> None:
    image = stored(store, kernel)
    assert mapped_kernel(store, image) is None
    assert (store.directory(image) / "vmlinux").read_bytes() == b""
    assert mapped_kernel(store, image) is None


def test_an_image_without_a_kernel(store: ImageStore) -> None:
    image = stored(store, None)
    assert mapped_kernel(store, image) is None
    assert not (store.directory(image) / "vmlinux").exists()


def test_it_goes_with_the_image(store: ImageStore) -> None:
    image = stored(store, bzimage(packed(INSIDE, "gzip")))
    path = mapped_kernel(store, image)
    store.remove("made", lambda _: [])
    assert path is not None and not path.parent.exists()
