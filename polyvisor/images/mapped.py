"""An image's kernel in the form that QEMU maps into its memory instead of copying it there.

A bzImage, packed and with a header that QEMU fills in, is read into each QEMU's own memory, twice in part. The kernel inside,
an ELF file, is mapped, and those who map the same file share it: what a fork never boots by, unless its guest reboots, costs it
next to nothing. So the kernel is unpacked once an image, beside the image's files:

    <images>/store/<id>/vmlinux     the kernel inside; empty where it can't be had, or QEMU can't enter it

QEMU enters an ELF kernel by its PVH note (hw/i386/x86.c, load_elfboot). Linux has no random place in memory then (KASLR), since
what gives it one is what unpacks it: so this is for forks alone, whose place is their source's in any case.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from polyvisor.files import storage_errors, write_atomic
from polyvisor.images.image import Image
from polyvisor.images.inspection.budget import Budget, Spent, Unreadable
from polyvisor.images.inspection.kernel import MAX_KERNEL, inside, read_kernel
from polyvisor.images.store import ImageStore

NAME = "vmlinux"


def mapped_kernel(store: ImageStore, image: Image) -> Path | None:
    """The file to hand to QEMU in place of the image's kernel, made where it is not there; None where it can't be had.

    Unpacking takes some seconds. Raises NotPermitted, StorageFull, PolyvisorError.
    """
    if image.kernel is None:
        return None
    path = store.directory(image) / NAME
    with storage_errors(f"unpacking the kernel of image '{image.name}'"):
        if not path.exists():
            write_atomic(path, _elf(store.file(image, image.kernel)) or b"", mode=0o444)
        return path if path.stat().st_size else None


def _elf(kernel: Path) -> bytes | None:
    """The ELF file in the kernel at this path, where it has the note by which QEMU enters it."""
    if kernel.stat().st_size > MAX_KERNEL:
        return None
    with contextlib.suppress(Unreadable, Spent):
        elf = b"".join(inside(kernel.read_bytes(), Budget()))
        found = read_kernel(elf, Budget())
        if found.xen_pvh and found.architecture == "x86_64":
            return elf
    return None
