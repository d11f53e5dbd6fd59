"""Disks that look as if they booted, made by mke2fs and sfdisk without root; and kernels that only say what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from polyvisor.images import cpio
from polyvisor.images.fat import fat32
from polyvisor.images.inspection.budget import Budget
from polyvisor.images.inspection.disk import Area

MIB = 1 << 20
ENTRY, XEN_VERSION, GUEST_OS, PHYS32_ENTRY = 1, 5, 6, 18
VERSION = "6.1.0-9-amd64"
ROOT_UUID = "11111111-2222-3333-4444-555555555555"
DRIVERS = (
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "xen-blkfront",
    "xen-netfront",
    "ata_piix",
    "ahci",
    "sd_mod",
    "e1000",
)


# Kernels


def vmlinux(*notes: int, machine: int = 62, padding: int = 0, notes_at: int | None = None) -> bytes:
    """An ELF file with these notes of Xen's."""
    body = b"".join(struct.pack("<III4s8s", 4, 8, kind, b"Xen\0", bytes(8)) for kind in notes)
    body += struct.pack("<III8s4s", 6, 4, 1, b"Linux\0\0\0", bytes(4))
    at = 64 + 56 + padding if notes_at is None else notes_at
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head = ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 4, 0, at, 0, 0, len(body), len(body), 4) + bytes(padding) + body


def packed(data: bytes, packing: str) -> bytes:
    """`data` packed as a kernel's build does it; zstd and LZO only begin so."""
    packers: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "xz": lzma.compress,
        "lzma": lambda raw: lzma.compress(raw, lzma.FORMAT_ALONE),
        "bzip2": bz2.compress,
        "lz4": lz4_frame,
        "none": bytes,
        "zstd": lambda raw: b"\x28\xb5\x2f\xfd" + bytes(64),
        "lzo": lambda raw: b"\x89LZO\0\r\n\x1a\n" + bytes(64),
    }
    return packers[packing](data)


def bzimage(payload: bytes, *, version: str = VERSION, bits_64: bool = True, protocol: int = 0x20F) -> bytes:
    """A kernel's file with `payload`, whose size stands behind it as the kernel's build has it."""
    setup = bytearray(5 * 512)
    setup[0x1F1] = 4
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<H", setup, 0x20E, 0x400)
    setup[0x211] = 1
    struct.pack_into("<H", setup, 0x236, int(bits_64))
    struct.pack_into("<II", setup, 0x248, 64, len(payload) + 4)
    text = f"{version} (builder@host) #1 SMP".encode() + b"\0"
    setup[0x600 : 0x600 + len(text)] = text
    return bytes(setup) + bytes(64) + payload + struct.pack("<I", 1 << 20)


def kernel(packing: str = "xz", *notes: int, version: str = VERSION) -> bytes:
    """A kernel that has Xen's entries for pv and pvh, or these `notes`."""
    inside = vmlinux(*(notes or (ENTRY, XEN_VERSION, GUEST_OS, PHYS32_ENTRY)), padding=5000)
    return bzimage(packed(inside, packing), version=version)


def lz4_frame(data: bytes) -> bytes:
    """A legacy frame of LZ4: literals, and matches that overlap themselves (runs of one byte), in blocks of 8 MiB."""
    blocks = [lz4_block(data[at : at + (8 << 20)]) for at in range(0, len(data), 8 << 20)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def lz4_block(data: bytes) -> bytes:
    out, literals = bytearray(), bytearray()
    for match in re.finditer(rb"(?s)(.)\1*", data):
        run = len(match[0])
        if run >= 20 and match.end() < len(data):
            literals += match[1]
            _sequence(out, bytes(literals), run - 1)
            literals.clear()
        else:
            literals += match[0]
    _sequence(out, bytes(literals), None)
    return bytes(out)


def _sequence(out: bytearray, literals: bytes, match: int | None) -> None:
    lengths = [len(literals), 0 if match is None else match - 4]
    out.append(min(lengths[0], 15) << 4 | min(lengths[1], 15))
    _more(out, lengths[0])
    out += literals
    if match is not None:
        out += struct.pack("<H", 1)
        _more(out, lengths[1])


def _more(out: bytearray, length: int) -> None:
    if length >= 15:
        rest = length - 15
        out += b"\xff" * (rest // 255) + bytes([rest % 255])


def initramfs(modules: tuple[str, ...] = DRIVERS, *, version: str = VERSION) -> bytes:
    """An archive with these modules."""
    entries = [cpio.file(f"usr/lib/modules/{version}/kernel/drivers/{name}.ko.xz", b"x") for name in modules]
    return cpio.archive(entries)


# Disks


def ext(path: Path, files: Mapping[str, bytes | str | Path], *options: str, mib: int = 16, kind: str = "ext4") -> Path:
    """A file system made by mke2fs at `path`; a file's content is bytes, or text, or a Path: a symbolic link there."""
    tree = path.with_name(path.name + ".tree")
    for name, content in files.items():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            target.symlink_to(content)
        else:
            target.write_bytes(content.encode() if isinstance(content, str) else content)
    tree.mkdir(exist_ok=True)
    argv = ["mke2fs", "-q", "-F", "-t", kind, "-U", ROOT_UUID, "-d", str(tree), *options, str(path), f"{mib}M"]
    subprocess.run(argv, check=True, capture_output=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    return path


def sfdisk(path: Path, script: str, *, mib: int = 64) -> Path:
    """A disk with a partition table made by sfdisk."""
    with path.open("wb") as file:
        file.truncate(mib * MIB)
    argv = ["sfdisk", "-q", "--no-reread", "--no-tell-kernel", str(path)]
    subprocess.run(
        argv, input=script, check=True, capture_output=True, text=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    )
    return path


CMDLINE = f"root=UUID={ROOT_UUID} ro console=ttyS0"


def system(
    packing: str = "xz", cmdline: str = CMDLINE, modules: tuple[str, ...] = DRIVERS
) -> dict[str, bytes | str | Path]:
    """The files of a Debian that boots from its own disk."""
    return {
        "etc/os-release": 'PRETTY_NAME="Test OS 1"\nID=test\n',
        "etc/fstab": f"UUID={ROOT_UUID} / ext4 defaults 0 1\n/dev/sr0 /media/cdrom udf,iso9660 user,noauto 0 0\n",
        "etc/cloud/cloud.cfg": "",
        "usr/lib/modules/x": "",
        "lib": Path("usr/lib"),
        "boot/grub/grub.cfg": f"menuentry 'Test' {{\n  linux /vmlinuz {cmdline}\n  initrd /initrd.img\n}}\n",
        "vmlinuz": Path(f"boot/vmlinuz-{VERSION}"),
        "initrd.img": Path(f"/boot/initrd.img-{VERSION}"),
        f"boot/vmlinuz-{VERSION}": kernel(packing),
        f"boot/initrd.img-{VERSION}": gzip.compress(initramfs(modules)),
    }


LOADERS = {"EFI/BOOT/BOOTX64.EFI": b"MZ", "EFI/debian/grub.cfg": b"configfile\n"}


def disk(
    path: Path, files: Mapping[str, bytes | str | Path], loaders: Mapping[str, bytes] = LOADERS, *, bios: bool = True
) -> Path:
    """A GPT disk of a root file system, an EFI system partition and, with `bios`, GRUB's boot code."""
    script = "label: gpt\n1: start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649\n"
    script += "2: start=4096, size=81920, type=U\n3: start=86016, size=32768, type=L, name=root\n"
    sfdisk(path, script)
    root = ext(path.with_name(path.name + ".root"), files).read_bytes()
    with path.open("r+b") as file:
        if bios:
            file.write(b"\xeb\x63\x90".ljust(0x5C, b"\0") + struct.pack("<Q", 2048) + b"....GRUB ")
            file.seek(2048 * 512)
            file.write(b"core".ljust(512, b"."))
        file.seek(4096 * 512)
        file.write(fat32(81920 * 512, loaders))
        file.seek(86016 * 512)
        file.write(root)
    return path


def area(data: bytes | Path, budget: Budget | None = None) -> Area:
    """Bytes, or a file's, as an area of a disk."""
    raw = data.read_bytes() if isinstance(data, Path) else data
    file = io.BytesIO(raw)

    def read(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    return Area(read, 0, len(raw), budget or Budget(seconds=30))
