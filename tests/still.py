"""An image whose guest halts as soon as it has the CPU: for tests of what happens around a guest, with a real QEMU.

In all else it is `tiny`: a kernel, an initrd and a seed. An emulated boot of `tiny` takes a CPU for some seconds, which tests
that start a thousand VMs and ask nothing of them would otherwise spend on nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

from polyvisor.images.image import Image, ImageFile
from polyvisor.images.store import ImageStore

NAME = "still"
_SECTOR = 512


def kernel() -> bytes:
    """A kernel by the boot protocol (Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header") that halts."""
    setup = bytearray(2 * _SECTOR)
    setup[0x1F1] = 1  # one sector follows the first
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x200:0x202] = b"\xeb\x7e"  # jmp 0x280
    setup[0x202:0x206] = b"HdrS"
    setup[0x206:0x208] = (0x020C).to_bytes(2, "little")
    setup[0x211] = 1  # loaded high
    setup[0x22C:0x230] = (0x7FFFFFFF).to_bytes(4, "little")  # where the initrd may end
    setup[0x238:0x23C] = (2047).to_bytes(4, "little")  # length of the command line
    setup[0x280:0x284] = b"\xfa\xf4\xeb\xfd"  # cli; hlt; jmp to the hlt
    return bytes(setup) + bytes(_SECTOR)


def add_still(store: ImageStore, tiny: Image) -> Image:
    """Add the image to a store that has `tiny`."""
    assert tiny.kernel is not None and tiny.initrd is not None
    with store.staging() as staging:
        (staging / tiny.kernel.name).write_bytes(kernel())
        shutil.copyfile(store.file(tiny, tiny.initrd), staging / tiny.initrd.name)
        made = replace(tiny, id="", name=NAME, kernel=ImageFile(name=tiny.kernel.name, sha256="", size=0))
        return store.add(staging, made)
