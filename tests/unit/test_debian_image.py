"""The pure pieces of the image `debian`: partition table, FAT, GRUB's sectors, sources, progress, prerequisites."""

from __future__ import annotations

import asyncio
import json
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import InvalidInput, PolyvisorError, Unavailable
from polyvisor.images import debian, grub, namespace
from polyvisor.images.debian_disk import cmdline, generated_files, plan_disk, write_boot
from polyvisor.images.debian_log import BuildLog
from polyvisor.images.fat import fat32, short_name
from polyvisor.images.flavours import FLAVOURS
from polyvisor.images.partition import BIOS_BOOT, MIB, SECTOR, Partition, gpt
from polyvisor.images.qemu_img import pack
from polyvisor.images.store import ImageStore
from polyvisor.operation import Step
from tests.unit.disks import raw_disk

ROOT = UUID("11111111-2222-3333-4444-555555555555")
DISK_ID = UUID("aaaaaaaa-2222-3333-4444-555555555555")
PARTITION = Partition(number=3, kind=BIOS_BOOT, uuid=ROOT, name="bios", start=MIB, size=2 * MIB)


# --- partition table -------------------------------------------------------------------------------------------------


def test_both_headers_name_themselves_each_other_and_sound_checksums() -> None:
    size = 64 * MIB
    begin, end = gpt(DISK_ID, size, [PARTITION])
    last = size // SECTOR - 1
    for header, table, here, other in (
        (begin[512:1024], begin[1024:], 1, last),
        (end[-512:], end[:-512], last, 1),
    ):
        signature, _, length, crc = struct.unpack_from("<8sIII", header)
        assert signature == b"EFI PART"
        assert struct.unpack_from("<QQ", header, 24) == (here, other)
        assert zlib.crc32(header[:16] + bytes(4) + header[20:length]) == crc
        assert zlib.crc32(table) == struct.unpack_from("<I", header, 88)[0]
    assert struct.unpack_from("<Q", end[-512:], 72)[0] * SECTOR == size - len(end)
    assert begin[510:512] == b"\x55\xaa"
    assert begin[446 + 4] == 0xEE


def test_a_partition_stands_in_the_entry_of_its_number() -> None:
    begin, _ = gpt(DISK_ID, 64 * MIB, [PARTITION])
    entry = begin[1024 + 2 * 128 :][:128]
    assert entry[:32] == BIOS_BOOT.bytes_le + ROOT.bytes_le
    assert struct.unpack_from("<QQ", entry, 32) == (2048, 2048 + 4096 - 1)
    assert entry[56:].decode("utf-16-le").rstrip("\0") == "bios"
    assert not any(begin[1024 : 1024 + 2 * 128])


@pytest.mark.parametrize(
    ("start", "size"),
    [(0, MIB), (33 * SECTOR, MIB), (MIB + 1, MIB), (MIB, 0), (MIB, 63 * MIB), (2 * MIB, MIB)],
    ids=["over the table", "over its entries", "no whole sector", "empty", "over the second table", "over another"],
)
def test_partitions_that_do_not_fit_are_refused(start: int, size: int) -> None:
    other = Partition(number=1, kind=BIOS_BOOT, uuid=ROOT, name="other", start=2 * MIB, size=MIB)
    each = Partition(number=2, kind=BIOS_BOOT, uuid=ROOT, name="bad", start=start, size=size)
    with pytest.raises(ValueError):
        gpt(DISK_ID, 64 * MIB, [each, other])


@given(st.integers(debian.MIN_SIZE_GIB, debian.MAX_SIZE_GIB))
def test_every_allowed_size_has_a_valid_plan_with_the_root_last(size_gib: int) -> None:
    disk = plan_disk(size_gib << 30)
    begin, end = gpt(DISK_ID, disk.size, disk.partitions)
    assert len(begin) <= disk.bios.start
    assert disk.root.start + disk.root.size <= disk.size - len(end)
    assert disk.root.start == max(each.start for each in disk.partitions)
    assert disk.root.size % 4096 == 0


# --- FAT -------------------------------------------------------------------------------------------------------------


def files_of(image: bytes) -> dict[str, bytes]:
    """Read a FAT32 file system as its specification says, independently of what wrote it."""
    reserved, copies = struct.unpack_from("<HB", image, 14)
    per_cluster = image[13]
    (fat_sectors,) = struct.unpack_from("<I", image, 36)
    (root,) = struct.unpack_from("<I", image, 44)
    data = (reserved + copies * fat_sectors) * 512

    def content(cluster: int) -> bytes:
        found = b""
        while 2 <= cluster < 0x0FFFFFF8:
            at = data + (cluster - 2) * 512 * per_cluster
            found += image[at : at + 512 * per_cluster]
            (cluster,) = struct.unpack_from("<I", image, reserved * 512 + cluster * 4)
        return found

    def walk(directory: bytes, prefix: str) -> Iterator[tuple[str, bytes]]:
        for at in range(0, len(directory), 32):
            name, attributes = directory[at : at + 11], directory[at + 11]
            if name[0] == 0:
                return
            high, low, size = struct.unpack_from("<H4xHI", directory, at + 20)
            path = prefix + ".".join(filter(None, (name[:8].decode().rstrip(), name[8:].decode().rstrip())))
            if attributes & 0x10 and not path.endswith("."):
                yield from walk(content(high << 16 | low), path + "/")
            elif attributes & 0x20:
                yield path, content(high << 16 | low)[:size]

    return dict(walk(content(root), ""))


_PATHS = st.sampled_from(["A", "B.TXT", "EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/GRUBX64.EFI", "EFI/DEBIAN/GRUB.CFG"])


@given(st.dictionaries(_PATHS, st.binary(max_size=2000)))
def test_fat32_gives_back_the_files_it_was_given(files: dict[str, bytes]) -> None:
    image = fat32(40 * MIB, files)
    assert files_of(image) == files
    assert image[510:512] == b"\x55\xaa"
    assert image[6 * 512 : 8 * 512] == image[: 2 * 512], "the spare boot sectors differ"


def test_fat32_fills_a_directory_of_several_clusters() -> None:
    files = {f"DIR/F{number}": bytes([number]) for number in range(40)}
    assert files_of(fat32(40 * MIB, files)) == files


def test_fat32_refuses_what_it_can_not_hold() -> None:
    with pytest.raises(ValueError, match="too few"):
        fat32(32 * MIB, {})
    with pytest.raises(ValueError, match="need"):
        fat32(34 * MIB, {"BIG": bytes(35 * MIB)})
    with pytest.raises(ValueError, match="is a file"):
        fat32(40 * MIB, {"A": b"", "A/B": b""})


def test_names_are_8_3() -> None:
    assert short_name("grubx64.efi") == b"GRUBX64 EFI"
    for bad in ("", "toolongname.efi", "a.conf", "ä.txt", "a/b", "a.b.c", "a b"):
        with pytest.raises(ValueError):
            short_name(bad)


# --- GRUB ------------------------------------------------------------------------------------------------------------


def boot_img() -> bytes:
    return bytes(range(256)) + bytes(510 - 256) + b"\x55\xaa"


def core_img(sectors: int = 3, segment: int = 0x820) -> bytes:
    first = bytes(500) + struct.pack("<QHH", 2, sectors - 1, segment)
    return first + b"x" * (sectors * 512 - 512 - 7)


def test_boot_sector_keeps_the_partition_table_and_finds_the_core() -> None:
    mbr, _ = gpt(DISK_ID, 64 * MIB, [PARTITION])
    sector = grub.boot_sector(boot_img(), mbr[:512], core_start=MIB)
    assert sector[440:] == mbr[440:512]
    assert struct.unpack_from("<Q", sector, 0x5C) == (2048,)
    assert sector[0x66:0x68] == b"\x90\x90"
    untouched = [*range(0x5C), 0x64, 0x65, *range(0x68, 440)]
    assert all(sector[at] == boot_img()[at] for at in untouched)


def test_core_names_the_sectors_after_its_first() -> None:
    core = grub.embedded_core(core_img(3), start=MIB, room=MIB)
    assert len(core) == 3 * 512
    assert struct.unpack_from("<QHH", core, 500) == (2049, 2, 0x820)
    assert core[512:].rstrip(b"\0") == core_img(3)[512:]


def test_what_is_not_grub_is_refused() -> None:
    with pytest.raises(ValueError):
        grub.boot_sector(bytes(512), bytes(512), MIB)
    with pytest.raises(ValueError):
        grub.embedded_core(core_img(segment=0), MIB, MIB)
    with pytest.raises(ValueError, match="room"):
        grub.embedded_core(core_img(3), MIB, 1024)


def test_every_configuration_leads_to_the_same_root() -> None:
    disk = plan_disk(4 << 30)
    texts = [grub.early_config(disk.root_uuid), grub.efi_config(disk.root_uuid), cmdline(disk)]
    texts += [
        text for path, text in generated_files(disk, FLAVOURS["debian"]).items() if not path.endswith("01_serial")
    ]
    assert all(str(disk.root_uuid) in text for text in texts)
    assert grub.first_config(ROOT, "x y").count("linux /vmlinuz x y\n") == 1


def test_write_boot_leaves_the_file_system_alone(tmp_path: Path) -> None:
    disk = plan_disk(2 << 30)
    with (tmp_path / "disk.raw").open("wb") as raw:
        raw.truncate(disk.size)
        raw.seek(disk.root.start)
        raw.write(b"first")
        raw.seek(disk.root.start + disk.root.size - 4)
        raw.write(b"last")
    parts = {"shim.efi": b"shim", "grub.efi": b"grub", "boot.img": boot_img(), "core.img": core_img()}
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    write_boot(tmp_path, disk)
    with (tmp_path / "disk.raw").open("rb") as raw:
        begin = raw.read(1024)
        raw.seek(disk.efi.start)
        files = files_of(raw.read(disk.efi.size))
        assert raw.read(5) == b"first"
        raw.seek(disk.root.start + disk.root.size - 4)
        assert raw.read(4) == b"last"
    assert (tmp_path / "disk.raw").stat().st_size == disk.size
    assert begin[512:520] == b"EFI PART"
    assert files["EFI/BOOT/BOOTX64.EFI"] == b"shim"
    assert str(disk.root_uuid) in files["EFI/DEBIAN/GRUB.CFG"].decode()


# --- sources, arguments, prerequisites -------------------------------------------------------------------------------


def test_sources_name_suite_updates_and_security() -> None:
    text = debian.sources_list("trixie", "http://m.example/debian", "http://m.example/debian-security")
    assert text.splitlines() == [
        "deb http://m.example/debian trixie main",
        "deb http://m.example/debian trixie-updates main",
        "deb http://m.example/debian-security trixie-security main",
    ]
    assert "security" not in debian.sources_list("trixie", "http://m.example/x", None)


def test_prepare_lays_out_what_the_script_expects(tmp_path: Path) -> None:
    work, disk = tmp_path / "work", plan_disk(2 << 30)
    debian.prepare(work, tmp_path / "cache", disk, "deb x\n", FLAVOURS["debian"])
    assert (work / "disk.raw").stat().st_size == disk.size
    assert (work / "sources.list").read_text() == "deb x\n"
    assert str(disk.root_uuid) in (work / "rootfs/etc/fstab").read_text()
    for name in ("build.sh", "customize.sh", "boot/grub.cfg", "rootfs/etc/cloud/cloud.cfg.d/90_polyvisor.cfg"):
        assert (work / name).is_file(), name
    argv = debian.build_argv(work, tmp_path / "cache", disk, "trixie", FLAVOURS["debian"])
    assert str(work / "build.sh") in argv
    assert [str(disk.root.start), str(disk.root.size // 1024)] == argv[-2:]


def test_the_hosts_of_the_lab_are_debian_and_more(tmp_path: Path) -> None:
    disk = plan_disk(2 << 30)
    for kind, package in (("lab-kvm", "qemu-system-x86"), ("lab-xen", "xen-system-amd64")):
        flavour, work = FLAVOURS[kind], tmp_path / kind
        debian.prepare(work, tmp_path / "cache", disk, "", flavour)
        assert (work / "boot/customize.d/lab.sh").is_file()
        assert (work / "rootfs/etc/cloud/cloud.cfg.d/90_polyvisor.cfg").is_file()
        included = debian.build_argv(work, tmp_path / "cache", disk, "bookworm", flavour)[-4].split(",")
        assert {"linux-image-amd64", "python3", package} <= set(included)


def test_the_image_for_comparisons_has_all_that_workloads_call(tmp_path: Path) -> None:
    from polyvisor.compare.workload import all_workloads

    flavour, work = FLAVOURS["bench"], tmp_path / "bench"
    debian.prepare(work, tmp_path / "cache", plan_disk(2 << 30), "", flavour)
    assert (work / "boot/customize.d/bench.sh").is_file()
    needed = {program.package for each in all_workloads().values() for program in each.programs}
    assert needed - {*debian.PACKAGES, *flavour.packages} == set()


def test_xen_is_booted_first_and_update_grub_keeps_it_so(tmp_path: Path) -> None:
    disk, xen = plan_disk(2 << 30), FLAVOURS["lab-xen"]
    assert xen.xen is not None
    generated = generated_files(disk, xen)
    entry = generated["boot/grub.cfg"].partition("menuentry")[2]
    assert f"multiboot2 /boot/xen.gz placeholder {xen.xen}\n" in entry
    assert f"module2 /vmlinuz placeholder root=UUID={disk.root_uuid}" in entry
    assert "console=hvc0" in entry and "ttyS0" not in entry, "the serial port is Xen's"
    assert f'GRUB_CMDLINE_XEN="{xen.xen}"' in generated["rootfs/etc/default/grub.d/polyvisor-xen.cfg"]
    assert not any("xen" in path for path in generated_files(disk, FLAVOURS["debian"]))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"suite": "sarge"}, "suite"),
        ({"suite": "../x"}, "suite"),
        ({"size_gib": 0}, "size_gib"),
        ({"size_gib": 10**9}, "size_gib"),
        ({"mirror": "ftp://x/debian"}, "mirror"),
        ({"mirror": "http://x/debian main\ndeb http://y"}, "mirror"),
        ({"mirror": "http://x/[trusted=yes]"}, "mirror"),
        ({"name": "a/b"}, "image"),
    ],
)
async def test_bad_arguments_are_named_and_leave_nothing(
    tmp_path: Path, arguments: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        await debian.build_debian(ImageStore(tmp_path / "images"), tmp_path / "cache", **arguments)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


async def test_all_that_is_missing_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(debian, "_PATH", str(tmp_path))
    monkeypatch.setattr(debian, "_KEYRING", tmp_path / "keyring")
    monkeypatch.setattr(debian, "missing_ids", lambda: "sudo usermod …")
    with pytest.raises(Unavailable) as caught:
        await debian.build_debian(ImageStore(tmp_path / "images"), tmp_path / "cache")
    assert all(each in caught.value.message for each in ("mmdebstrap", "mke2fs", "qemu-img", "keyring", "/etc/subuid"))
    assert caught.value.hint is not None
    assert caught.value.hint.count("apt-get install") == 1
    assert caught.value.hint.count("util-linux") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_user_needs_a_range_of_ids_large_enough() -> None:
    assert namespace.has_ids("other:1:65536\nme:100000:65536\n", "me", 1000)
    assert namespace.has_ids("1000:100000:65536", "me", 1000)
    for table in ("", "me:100000:1000", "me:100000:", "you:100000:65536", "me", "me:x:y"):
        assert not namespace.has_ids(table, "me", 1000), table


def test_ids_are_offered_that_nobody_has() -> None:
    assert namespace.free_start(["", "bad\nx:1:y"]) == 100000
    assert namespace.free_start(["a:100000:65536", "b:300000:65536\na:100000:65536"]) == 365536


def test_a_namespace_ends_with_the_process_that_made_it() -> None:
    for root in (True, False):
        argv = namespace.namespace_argv(["true"], root=root)
        assert argv[:3] == ["setpriv", "--pdeathsig", "KILL"]
        assert "--kill-child" in argv
        assert ("--user" in argv) is not root


async def test_a_machine_without_namespaces_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "namespace_argv", lambda argv, root: ["false"])
    with pytest.raises(Unavailable) as caught:
        await namespace.check_namespace()
    assert caught.value.hint is not None
    assert "root" in caught.value.hint


async def test_a_failed_build_leaves_nothing_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def sources(suite: str, mirror: str | None) -> str:
        return ""

    monkeypatch.setattr(debian, "check_programs", lambda: None)
    monkeypatch.setattr(debian, "choose_sources", sources)
    script = "echo one; echo 'E: no such suite'; echo 'I: cleaning up'; exit 3"
    monkeypatch.setattr(debian, "build_argv", lambda *arguments: ["sh", "-c", script])
    store = ImageStore(tmp_path / "images")
    with pytest.raises(PolyvisorError, match="E: no such suite"):
        await debian.build_debian(store, tmp_path / "cache")
    assert store.all() == []
    assert list((tmp_path / "images" / "store").iterdir()) == []


async def test_what_a_killed_build_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "images" / "store" / ".new-x" / "work"
    left.mkdir(parents=True)
    (left / "file").touch()
    await debian._sweep(ImageStore(tmp_path / "images"))
    assert not left.exists()


# --- progress --------------------------------------------------------------------------------------------------------


def test_output_becomes_steps() -> None:
    steps: list[Step] = []
    log = BuildLog(steps.append)
    log.feed(b"I: start\nGet:1 list\n0 upgraded, 2 newly installed, 0 to remove\nGet:2 x amd64 a\nGet:3")
    log.feed(b" x amd64 b\nUnpacking a\nSetting up a\nUnpacking b\nSetting up b\nP: making the file system\n")
    assert steps == [
        Step("fetching packages", 1, 2, "packages"),
        Step("fetching packages", 2, 2, "packages"),
        Step("installing packages", 0, 2, "packages"),
        Step("installing packages", 1, 2, "packages"),
        Step("installing packages", 2, 2, "packages"),
        Step("making the file system"),
    ]


@given(st.lists(st.sampled_from(["Get:1 x", "Unpacking a", "Setting up a", "9 upgraded, 3 newly installed", "P: x"])))
def test_progress_never_exceeds_its_total(lines: list[str]) -> None:
    steps: list[Step] = []
    BuildLog(steps.append).feed("".join(f"{line}\n" for line in lines).encode())
    assert all(step.total is None or step.done <= step.total for step in steps)


def test_the_first_complaint_is_the_last_word() -> None:
    log = BuildLog(lambda step: None, keep=2)
    log.feed(b"E: the cause\nE: what followed\nmore\nend\n")
    assert log.last_words().splitlines() == ["more", "end", "E: the cause"]


async def test_one_build_of_a_suite_at_a_time(tmp_path: Path) -> None:
    """The second waits and says so, instead of failing for apt's own lock."""
    steps: list[str] = []
    ended: list[int] = []

    async def build(number: int) -> None:
        async with debian._alone(tmp_path, lambda step: steps.append(step.phase)):
            assert len(ended) == number
            await asyncio.sleep(0.1)
            ended.append(number)

    await asyncio.gather(build(0), build(1))
    assert ended == [0, 1]
    assert steps == ["waiting for another build of this suite"]


# --- recipe ----------------------------------------------------------------------------------------------------------


def test_a_recipe_stays_until_what_goes_into_the_image_changes() -> None:
    kvm, xen = FLAVOURS["lab-kvm"], FLAVOURS["lab-xen"]
    found = debian.recipe(xen, "bookworm")
    assert debian.recipe(xen, "bookworm") == found, "each disk has other UUIDs, which must not count"
    others = {
        debian.recipe(xen, "trixie"),
        debian.recipe(kvm, "bookworm"),
        debian.recipe(replace(xen, packages=(*xen.packages, "htop")), "bookworm"),
        debian.recipe(replace(xen, xen="dom0_mem=1024M"), "bookworm"),
        debian.recipe(replace(xen, data=xen.data[:-1]), "bookworm"),
    }
    assert len(others | {found}) == 6
    assert debian.recipe(replace(xen, memory_mib=1, size_gib=9, about="new"), "bookworm") == found, "these are settings"


async def test_a_disk_is_packed_so_that_any_qemu_can_read_it(tmp_path: Path) -> None:
    """That of Debian 12 for guests of Xen knows no zstd."""
    raw, packed = raw_disk(tmp_path / "disk.raw"), tmp_path / "disk.qcow2"
    await pack(raw, packed, raw.stat().st_size)
    described = json.loads(
        subprocess.run(["qemu-img", "info", "--output=json", packed], check=True, capture_output=True).stdout
    )
    assert described["format-specific"]["data"]["compression-type"] == "zlib"
    assert packed.stat().st_size < raw.stat().st_size / 2
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, packed], check=True, capture_output=True)
