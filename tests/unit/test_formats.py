"""Disk image formats: recognised by content; refused where they are unsound or reach outside the file."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyvisor.errors import ImageRefused, InvalidInput
from polyvisor.images.formats import Compression, Disk, Format, Reader, compression_of, parse_format
from polyvisor.images.formats.firmware import firmware_of
from polyvisor.images.formats.guest import GuestDisk
from tests.unit.disks import (
    MIB,
    boot_sector,
    converted,
    hash_block,
    inspected,
    ovf,
    patched,
    qemu_img,
    raw_disk,
    tar,
    tar_header,
)

SOUND = {
    "qcow2": ("qcow2", ()),
    "qcow2-v2": ("qcow2", ("compat=0.10",)),
    "qcow2-small": ("qcow2", ("cluster_size=512",)),
    "qcow2-zstd": ("qcow2", ("compression_type=zstd",)),
    "qcow2-extended": ("qcow2", ("extended_l2=on", "cluster_size=128k")),
    "qcow2-full": ("qcow2", ("preallocation=full",)),
    "vmdk": ("vmdk", ()),
    "vmdk-stream": ("vmdk", ("subformat=streamOptimized",)),
    "vhd": ("vpc", ("force_size=on",)),
    "vhd-fixed": ("vpc", ("subformat=fixed", "force_size=on")),
    "vhdx": ("vhdx", ()),
    "vhdx-fixed": ("vhdx", ("subformat=fixed",)),
    "vdi": ("vdi", ()),
    "vdi-static": ("vdi", ("static=on",)),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One disk of 8 MiB in all formats, made by qemu-img."""
    directory = tmp_path_factory.mktemp("images")
    raw = raw_disk(directory / "raw")
    made = {name: converted(raw, directory / name, driver, *options) for name, (driver, options) in SOUND.items()}
    return {"raw": raw, **made}


@pytest.mark.parametrize("name", ["raw", *SOUND])
def test_sound_images_are_recognised_by_their_content(images: dict[str, Path], name: str) -> None:
    disk = inspected(images[name])
    assert disk.format == name.partition("-")[0]
    assert disk.virtual_size == 8 * MIB
    assert (disk.offset, disk.size, disk.member) == (0, images[name].stat().st_size, None)


@pytest.mark.parametrize("name", ["qcow2", "vmdk", "vmdk-stream", "vhd", "vhdx", "vdi"])
def test_a_file_cut_off_in_its_headers_is_refused(images: dict[str, Path], name: str) -> None:
    data = images[name].read_bytes()
    for length in (1, 8, 70, 100, 511, 512, 600):
        with pytest.raises(ImageRefused):
            inspected(data[:length])


@pytest.mark.parametrize("name", ["vhd", "vhd-fixed", "vdi", "vdi-static"])
def test_a_file_cut_off_in_its_data_is_refused(images: dict[str, Path], name: str) -> None:
    data = images[name].read_bytes()
    cut = data[: 3 * MIB // 2]
    if name == "vhd-fixed":
        cut += data[-512:]
    with pytest.raises(ImageRefused, match="shorter than its disk"):
        inspected(cut)


def test_what_the_user_says_must_fit_and_raw_is_always_data(images: dict[str, Path]) -> None:
    assert inspected(images["qcow2"], Format.QCOW2).format is Format.QCOW2
    with pytest.raises(ImageRefused, match="this is qcow2, not vmdk"):
        inspected(images["qcow2"], Format.VMDK)
    data = images["qcow2"].read_bytes()
    assert inspected(data, Format.RAW) == Disk(format=Format.RAW, virtual_size=len(data), size=len(data))
    assert inspected(b"x", Format.RAW).virtual_size == 512
    assert parse_format("vpc") is Format.VHD
    with pytest.raises(InvalidInput, match="'exe': is not a disk format"):
        parse_format("exe")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (bytes(4096), "no boot signature"),
        (b"<!DOCTYPE html><html><title>404</title></html>", "a web page"),
        (b"\n  <HTML>moved</HTML>", "a web page"),
        (b"Not found, sorry.\n", "a text file"),
        (b'{"error": "no such key"}', "a text file"),
        (b"PK\x03\x04" + bytes(600), "a zip archive"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(600), "7-Zip"),
        (b"LUKS\xba\xbe\0\x02" + bytes(600), "encrypted"),
        (b"QED\0" + bytes(600), "QED"),
        (b"\x7fELF" + bytes(600), "a program"),
        (bytes(32768) + b"\x01CD001" + bytes(600), "a CD image"),
        (b"COWD" + bytes(600), "ESX sparse"),
        (b"# Disk DescriptorFile\nversion=1\n", "in other files"),
        (b"# disk descriptorfile\nRW 4 FLAT \"/etc/shadow\" 0\n", "in other files"),
        (b"QFI\xfb\0\0\0\x01" + bytes(600), "qcow version 1"),
    ],
)  # fmt: skip
def test_what_is_no_disk_is_named(data: bytes, words: str) -> None:
    with pytest.raises(ImageRefused, match=words) as caught:
        inspected(data)
    assert "\n" not in caught.value.message


def test_compressed_files_are_recognised() -> None:
    def kind(data: bytes) -> Compression | None:
        import io

        return compression_of(Reader(io.BytesIO(data), "test"))

    assert kind(b"\x1f\x8b\x08rest") is Compression.GZIP
    assert kind(b"BZh9") is Compression.BZIP2
    assert kind(b"\xfd7zXZ\0") is Compression.XZ
    assert kind(b"\x28\xb5\x2f\xfd") is Compression.ZSTD
    assert kind(boot_sector()) is None


# qcow2


def test_qcow2_that_names_other_files_is_refused(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", tmp_path / "backed", "8M")
    backed_by_json = 'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}'
    qemu_img("create", "-f", "qcow2", "-u", "-b", backed_by_json, "-F", "raw", tmp_path / "json", "8M")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", tmp_path / "split", "8M")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/d2,data_file_raw=on", tmp_path / "rawsplit", "8M")
    for name, words in {"backed": "backing", "json": "backing", "split": "data file", "rawsplit": "data file"}.items():
        with pytest.raises(ImageRefused, match=words) as caught:
            inspected(tmp_path / name)
        assert caught.value.hint
        assert "/etc" not in caught.value.message


@pytest.mark.parametrize(
    ("offset", "new", "words"),
    [
        (8, struct.pack(">Q", 1), "backing"),
        (16, struct.pack(">I", 5), "backing"),
        (20, struct.pack(">I", 8), "clusters of"),
        (20, struct.pack(">I", 31), "clusters of"),
        (24, struct.pack(">Q", 0), "no size"),
        (24, struct.pack(">Q", 1 << 62), "TiB"),
        (24, struct.pack(">Q", 1 << 45), "too small"),
        (32, struct.pack(">I", 2), "encrypted"),
        (36, struct.pack(">I", 0), "too small"),
        (36, struct.pack(">I", 0xFFFFFFFF), "absurd"),
        (40, struct.pack(">Q", 1 << 40), "past its end"),
        (40, struct.pack(">Q", 0), "odd place"),
        (40, struct.pack(">Q", 65537), "odd place"),
        (48, struct.pack(">Q", 1 << 40), "past its end"),
        (56, struct.pack(">I", 0xFFFFFFFF), "absurd"),
        (56, struct.pack(">I", 0), "no reference counts"),
        (60, struct.pack(">I", 1 << 31), "absurd"),
        (72, struct.pack(">Q", 2), "marked as corrupt"),
        (72, struct.pack(">Q", 4), "data file"),
        (72, struct.pack(">Q", 1 << 5), "not known here .0x20"),
        (72, struct.pack(">Q", 1 << 63), "not known"),
        (88, struct.pack(">Q", 2), "data file"),
        (96, struct.pack(">I", 7), "reference counts of"),
        (100, struct.pack(">I", 96), "header of 96"),
        (100, struct.pack(">I", 1 << 20), "header of"),
        (112, struct.pack(">II", 0x44415441, 0), "data file"),
        (112, struct.pack(">II", 0x0537BE77, 16), "encrypted"),
        (112, struct.pack(">II", 0x12345678, 0xFFFFFFFF), "longer than"),
    ],
)  # fmt: skip
def test_qcow2_headers_that_lie_are_refused(images: dict[str, Path], offset: int, new: bytes, words: str) -> None:
    data = images["qcow2"].read_bytes()
    assert struct.unpack_from(">I", data, 100)[0] == 112
    with pytest.raises(ImageRefused, match=words):
        inspected(patched(data, offset, new))


def test_qcow2_extensions_behind_others_are_found(images: dict[str, Path]) -> None:
    data = images["qcow2"].read_bytes()
    chain = struct.pack(">II8s", 0x12345678, 5, b"hello") + struct.pack(">II8s", 0x44415441, 6, b"/etc/x")
    with pytest.raises(ImageRefused, match="names another file"):
        inspected(patched(data, 112, chain))


# VMDK


def test_vmdk_in_several_files_is_refused(tmp_path: Path) -> None:
    qemu_img("create", "-f", "vmdk", "-o", "subformat=monolithicFlat", tmp_path / "flat.vmdk", "8M")
    qemu_img("create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", tmp_path / "two.vmdk", "3G")
    qemu_img("create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", tmp_path / "twoflat.vmdk", "8M")
    qemu_img("create", "-f", "vmdk", tmp_path / "parent.vmdk", "8M")
    qemu_img("create", "-f", "vmdk", "-b", tmp_path / "parent.vmdk", "-F", "vmdk", tmp_path / "child.vmdk")
    for name in ("flat", "two", "twoflat", "two-s001", "child"):
        with pytest.raises(ImageRefused, match=r"other file|another file"):
            inspected(tmp_path / f"{name}.vmdk")


def descriptor(text: str) -> bytes:
    """Twenty sectors of embedded description."""
    return text.encode().ljust(20 * 512, b"\0")


HEAD = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n"


@pytest.mark.parametrize(
    "text",
    [
        HEAD + 'createType="monolithicFlat"\nRW 16384 FLAT "/etc/shadow" 0\n',
        HEAD + 'createType="monolithicSparse"\nRW 16384 FLAT "/etc/shadow" 0\n',
        HEAD + 'createType="monolithicSparse"\nRW 16384 SPARSE "/etc/shadow"\n',
        HEAD + 'createType="monolithicSparse"\nRW 16384 SPARSE "nbd:host:1"\n',
        HEAD + 'createType="monolithicSparse"\nRW 16384 SPARSE "a"\nRW 1 SPARSE "b"\n',
        HEAD + 'createType="monolithicSparse"\nRW 16384 SPARSE "a"\nRDONLY 1 VMFS "b"\n',
        HEAD + 'createType="monolithicSparse"\n',
        HEAD + 'createType="streamOptimized"\nparentFileNameHint="/etc/shadow"\nRW 1 SPARSE "a"\n',
        HEAD + 'createType="streamOptimized"\nRW 1 SPARSE "a"\n\0parentFileNameHint="/etc/shadow"\n',
        HEAD.replace("ffffffff", "12345678") + 'createType="monolithicSparse"\nRW 1 SPARSE "a"\n',
        HEAD + 'RW 1 SPARSE "a"\n',
        "",
    ],
)
def test_vmdk_descriptions_that_name_files_are_refused(images: dict[str, Path], text: str) -> None:
    data = images["vmdk"].read_bytes()
    with pytest.raises(ImageRefused, match=r"file"):
        inspected(patched(data, 512, descriptor(text)))


def test_vmdk_hint_hides_neither_where_qemu_looks_nor_where_the_header_points(images: dict[str, Path]) -> None:
    data = images["vmdk"].read_bytes()
    # The header points to a harmless copy; what qemu reads for a parent stays at sector 1.
    moved = data + data[512 : 21 * 512]
    moved = patched(moved, 28, struct.pack("<QQ", len(data) // 512, 20))
    assert inspected(moved).format is Format.VMDK
    with pytest.raises(ImageRefused, match="parent"):
        inspected(patched(moved, 512 + 19 * 512, b'parentFileNameHint="/etc/shadow"'))


@pytest.mark.parametrize(
    ("offset", "new", "words"),
    [
        (4, struct.pack("<I", 9), "version 9"),
        (12, struct.pack("<Q", 0), "in other files"),
        (12, struct.pack("<Q", 1 << 60), "absurd|TiB"),
        (20, struct.pack("<Q", 3), "absurd"),
        (20, struct.pack("<Q", 1 << 40), "absurd"),
        (28, struct.pack("<Q", 0), "in other files"),
        (28, struct.pack("<Q", 1 << 54), "cut off"),
        (36, struct.pack("<Q", 0), "absurd"),
        (36, struct.pack("<Q", 1 << 40), "absurd"),
        (44, struct.pack("<I", 0), "absurd"),
        (56, struct.pack("<Q", 1 << 50), "cut off"),
        (56, struct.pack("<Q", 0xFFFFFFFFFFFFFFFF), "end of the stream"),
        (64, struct.pack("<Q", 1 << 50), "before its data"),
        (73, b"\n\n\r\n", "as text"),
        (77, struct.pack("<H", 7), "compression 7"),
    ],
)  # fmt: skip
def test_vmdk_headers_that_lie_are_refused(images: dict[str, Path], offset: int, new: bytes, words: str) -> None:
    with pytest.raises(ImageRefused, match=words):
        inspected(patched(images["vmdk"].read_bytes(), offset, new))


def test_the_footer_of_a_vmdk_stream_is_checked_like_its_header(images: dict[str, Path]) -> None:
    data = images["vmdk-stream"].read_bytes()
    data += bytes(-len(data) % 512)
    at_end = patched(data, 56, struct.pack("<Q", 0xFFFFFFFFFFFFFFFF))
    marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    end = bytes(512)
    good = at_end + marker + data[:512] + end
    assert inspected(good).virtual_size == 8 * MIB
    for lie in (
        at_end + marker + patched(data[:512], 12, struct.pack("<Q", 0)) + end,
        at_end + marker + at_end[:512] + end,
        at_end + marker + data[:512] + struct.pack("<QII", 0, 0, 1).ljust(512, b"\0"),
        good + b"x",
        good[:-512],
    ):
        with pytest.raises(ImageRefused):
            inspected(lie)


# VHD, VHDX, VDI


def vhd_sum(block: bytes, position: int) -> bytes:
    cleared = patched(block, position, bytes(4))
    return patched(block, position, struct.pack(">I", ~sum(cleared) & 0xFFFFFFFF))


def test_differencing_vhd_is_refused(images: dict[str, Path]) -> None:
    data = images["vhd"].read_bytes()
    footer = vhd_sum(patched(data[:512], 60, struct.pack(">I", 4)), 64)
    with pytest.raises(ImageRefused, match="differencing"):
        inspected(footer + data[512:])
    with pytest.raises(ImageRefused, match="checksum"):
        inspected(patched(data, 60, struct.pack(">I", 4)))
    for offset, new in ((40, b"p" * 16), (64, "/etc".encode("utf-16-be")), (576, b"W2ku")):
        header = vhd_sum(patched(data[512:1536], offset, new), 36)
        with pytest.raises(ImageRefused, match="parent"):
            inspected(data[:512] + header + data[1536:])


def test_vhd_tables_that_lie_are_refused(images: dict[str, Path]) -> None:
    data = images["vhd"].read_bytes()
    for offset, new in (
        (0, b"conectix"),
        (16, struct.pack(">Q", 1 << 50)),
        (28, struct.pack(">I", 1)),
        (28, struct.pack(">I", 0xFFFFFFFF)),
        (32, struct.pack(">I", 3)),
        (32, struct.pack(">I", 0)),
    ):
        header = vhd_sum(patched(data[512:1536], offset, new), 36)
        with pytest.raises(ImageRefused):
            inspected(data[:512] + header + data[1536:])


def test_differencing_vhdx_is_refused(images: dict[str, Path]) -> None:
    data = images["vhdx"].read_bytes()
    region = data.index(b"metadata")
    parameters = region + 0x10000
    assert struct.unpack_from("<I", data, parameters)[0] >= MIB
    with pytest.raises(ImageRefused, match="differencing"):
        inspected(patched(data, parameters + 4, struct.pack("<I", 2)))
    locator = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")
    with pytest.raises(ImageRefused, match="differencing"):
        inspected(patched(data, region + 32 + 32 * 4, locator))
    with pytest.raises(ImageRefused, match="region table"):
        inspected(patched(data, 192 << 10, b"rege"))
    with pytest.raises(ImageRefused, match="blocks of"):
        inspected(patched(data, parameters, struct.pack("<I", 5)))


@pytest.mark.parametrize(
    ("offset", "new", "words"),
    [
        (68, struct.pack("<I", 0x00020001), "version 2.1"),
        (76, struct.pack("<I", 4), "differencing"),
        (424, b"x" * 16, "differencing"),
        (440, b"x" * 16, "differencing"),
        (376, struct.pack("<I", 512), "absurd"),
        (368, struct.pack("<Q", 1 << 60), "TiB"),
        (368, struct.pack("<Q", 1 << 34), "too small"),
        (384, struct.pack("<I", 0xFFFFFFFF), "absurd"),
        (340, struct.pack("<I", 0xFFFFFF00), "cut off"),
        (512, struct.pack("<I", 999), "past its blocks"),
    ],
)
def test_vdi_headers_that_lie_are_refused(images: dict[str, Path], offset: int, new: bytes, words: str) -> None:
    with pytest.raises(ImageRefused, match=words):
        inspected(patched(images["vdi"].read_bytes(), offset, new))


# OVA


def test_an_appliance_leads_to_its_disk(images: dict[str, Path]) -> None:
    disk = images["vmdk-stream"].read_bytes()
    data = tar(("a.ovf", ovf("a-disk1.vmdk")), ("a.mf", b"SHA256..."), ("a-disk1.vmdk", disk))
    found = inspected(data)
    assert (found.format, found.virtual_size, found.member) == (Format.VMDK, 8 * MIB, "a-disk1.vmdk")
    assert data[found.offset : found.offset + found.size] == disk


def test_appliances_with_anything_but_plain_files_are_refused(images: dict[str, Path]) -> None:
    disk = images["vmdk-stream"].read_bytes()
    good = [("a.ovf", ovf("d")), ("d", disk)]
    hostile = {
        "unsafe name": tar(*good, ("../../etc/cron.d/x", b"")),
        "unsafe name, ./root": tar(*good, ("/root/x", b"")),
        "unsafe name, .d.": tar(*good, ("d", b"twice")),
        "not a plain file": tar_header(b"d", 0, b"2", b"/etc/shadow") + tar(*good),
        "which is not a plain": tar_header(b"d", 0, b"1", b"/etc/shadow") + tar(*good),
        "'s', which is not": tar_header(b"s", 0, b"S") + tar(*good),
        "more than 100 files": tar(*[(f"f{i}", b"") for i in range(101)]),
        "cut off": tar(*good)[:-20000],
        "0 .ovf files": tar(("d", disk)),
        "2 .ovf files": tar(*good, ("b.ovf", b"")),
        "2 disks": tar(("a.ovf", ovf("d", "e")), ("d", disk), ("e", disk)),
        "0 disks": tar(("a.ovf", ovf()), ("d", disk)),
        "not in it": tar(("a.ovf", ovf("/etc/shadow")), ("d", disk)),
        "compressed or split": tar(("a.ovf", ovf("d", extra='ovf:compression="gzip"')), ("d", disk)),
        "can't be read": tar(("a.ovf", b"<Envelope>"), ("d", disk)),
        "document type": tar(("a.ovf", b'<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>'), ("d", disk)),
        "in other files": tar(("a.ovf", ovf("d")), ("d", b"# Disk DescriptorFile\nRW 1 FLAT \"/etc/shadow\" 0\n")),
        "unknown format": tar(("a.ovf", ovf("d")), ("d", tar(*good))),
        "rename or resize": tar_header(b"x", 512, b"x") + b"17 path=/etc/pw\n".ljust(512, b"\0") + tar(*good),
        "header of absurd": tar_header(b"x", 8 << 20, b"x") + bytes(8 << 20) + tar(*good),
    }  # fmt: skip
    for words, data in hostile.items():
        with pytest.raises(ImageRefused, match=words):
            inspected(data)


def test_harmless_archive_headers_are_passed_over(images: dict[str, Path]) -> None:
    times = tar_header(b"x", 26, b"x") + b"26 mtime=1700000000.12345\n".ljust(512, b"\0")
    data = times + tar(("a.ovf", ovf("d")), ("d", images["vmdk-stream"].read_bytes()))
    assert inspected(data).member == "d"


# What qemu-img made, read in Python


@pytest.mark.parametrize("options", [(), ("cluster_size=512",), ("preallocation=full",), ("compat=0.10",)])
def test_guest_disk_reads_what_the_guest_sees(
    images: dict[str, Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    with GuestDisk(converted(images["raw"], tmp_path / "disk", "qcow2", *options)) as guest:
        assert guest.size == 8 * MIB
        assert guest.read(0, 512) == boot_sector()
        assert guest.read(MIB - 10, 74) == bytes(10) + hash_block(0) + hash_block(1)
        assert guest.read(7 * MIB, 12) == b"near the end"
        assert guest.read(8 * MIB - 5, 100) == bytes(5)


@pytest.mark.parametrize("options", [(), ("cluster_size=512",), ("cluster_size=2M",), ("compat=0.10",)])
def test_a_compressed_disk_is_read_as_its_guest_would(
    images: dict[str, Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    raw = images["raw"].read_bytes()
    extra = ["-o", ",".join(options)] if options else []
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *extra, images["raw"], tmp_path / "disk")
    with GuestDisk(tmp_path / "disk") as guest:
        assert guest.readable
        assert guest.read(0, len(raw)) == raw
        assert guest.read(7 * MIB - 3, 20) == raw[7 * MIB - 3 : 7 * MIB + 17]


def test_a_damaged_part_of_a_compressed_disk_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"".join(hash_block(index) * 2 for index in range(MIB // 64)))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", tmp_path / "raw", tmp_path / "disk")
    data = (tmp_path / "disk").read_bytes()
    assert len(data) < MIB, "it is compressed"
    (tmp_path / "disk").write_bytes(data[: len(data) // 2] + os.urandom(len(data) - len(data) // 2))
    with GuestDisk(tmp_path / "disk") as guest:
        assert guest.read(0, 64) == hash_block(0) * 2
        with pytest.raises(ImageRefused, match="compressed part of it is damaged"):
            guest.read(0, MIB)


def test_clusters_that_can_not_be_read_here_are_told(images: dict[str, Path]) -> None:
    for name, readable in (("qcow2", True), ("qcow2-v2", True), ("qcow2-zstd", False), ("qcow2-extended", False)):
        with GuestDisk(images[name]) as guest:
            assert guest.readable is readable


# Firmware


def gpt(*partitions: tuple[str, int], code: bytes = b"") -> bytes:
    """A disk with a GPT of partitions of these types and attributes."""
    from uuid import UUID

    table = b"".join(
        struct.pack("<16s16sQQQ72s", UUID(kind).bytes_le, b"u" * 16, 2048, 4096, flags, b"")
        for kind, flags in partitions
    )
    header = b"EFI PART" + bytes(64) + struct.pack("<QII", 2, 128, 128)
    return boot_sector(code=code, partition=0xEE) + header.ljust(512, b"\0") + table.ljust(128 * 128, b"\0")


ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"
LINUX = "0fc63daf-8483-4772-8e79-3d69d8477de4"


@pytest.mark.parametrize(
    ("data", "firmware"),
    [
        (boot_sector(), ("bios",)),
        (boot_sector(code=b"", partition=0xEF), ("uefi",)),
        (boot_sector(partition=0xEF), ("bios", "uefi")),
        (gpt((ESP, 0), (LINUX, 0)), ("uefi",)),
        (gpt((ESP, 0), (BIOS_BOOT, 0), code=b"grub"), ("bios", "uefi")),
        (gpt((LINUX, 4), code=b"syslinux"), ("bios",)),
        (gpt((BIOS_BOOT, 0), code=b"grub"), ("bios",)),
        (gpt((LINUX, 0), code=b"stub"), ("bios",)),
        (bytes(4096), ("bios",)),
        (b"", ("bios",)),
    ],
)
def test_firmware_is_read_from_the_partition_table(data: bytes, firmware: tuple[str, ...]) -> None:
    assert firmware_of(lambda offset, length: data[offset : offset + length]) == firmware


# Whatever the bytes are: a finding or a refusal, nothing else


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_images_are_found_sound_or_refused(images: dict[str, Path], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*SOUND, "ova"]))
    if name == "ova":
        original = tar(("a.ovf", ovf("d")), ("d", images["vmdk"].read_bytes()[: 128 << 10]))
    else:
        original = images[name].read_bytes()
    start = data.draw(st.sampled_from([0, 64, 512, 1024, 0x30000, 0x200000, len(original) - 512]))
    for _ in range(data.draw(st.integers(1, 4))):
        offset = start + data.draw(st.integers(0, 700))
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.one_of(st.binary(min_size=width, max_size=width), st.just(b"\xff" * width)))
        original = patched(original, offset, value)
    if data.draw(st.booleans()):
        original = original[: data.draw(st.integers(0, len(original)))]
    finds_or_refuses(original)


@given(
    st.binary(max_size=2000), st.sampled_from(["", "QFI\xfb", "KDMV", "vhdxfile", "conectix", "# Disk DescriptorFile"])
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_found_sound_or_refused(data: bytes, magic: str) -> None:
    finds_or_refuses(magic.encode("latin-1") + data)
    finds_or_refuses(patched(data.ljust(1024, b"\0"), 64, b"\x7f\x10\xda\xbe"))
    finds_or_refuses(patched(data.ljust(1024, b"\0"), 257, b"ustar\0"))


@given(st.binary(max_size=3000))
@settings(max_examples=200, deadline=None)
def test_firmware_of_any_bytes(data: bytes) -> None:
    disk = boot_sector(partition=0xEE) + b"EFI PART" + data
    assert set(firmware_of(lambda offset, length: disk[offset : offset + length])) <= {"bios", "uefi"}


def finds_or_refuses(data: bytes) -> None:
    try:
        disk = inspected(data)
    except ImageRefused as error:
        assert "\n" not in error.message
    else:
        assert disk.virtual_size > 0
        assert disk.offset + disk.size <= len(data)
