"""Importing disk images: whatever the format, the guest's bytes arrive; what is hostile never reaches qemu-img."""

from __future__ import annotations

import asyncio
import bz2
import errno
import gzip
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from polyvisor import process
from polyvisor.errors import (
    DownloadFailed,
    ImageRefused,
    InvalidInput,
    NotFound,
    PolyvisorError,
    ProcessFailed,
    StorageFull,
    TimedOut,
)
from polyvisor.files import translated
from polyvisor.images import qemu_img, unpack
from polyvisor.images.formats import Disk, Format
from polyvisor.images.formats.guest import GuestDisk
from polyvisor.images.image import Image, Seed
from polyvisor.images.importer import import_image
from polyvisor.images.store import ImageStore
from polyvisor.operation import Step
from tests.unit.disks import MIB, boot_sector, converted, ovf, patched, raw_disk, tar
from tests.unit.disks import qemu_img as run_qemu_img
from tests.unit.webserver import serving

PACKERS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "home" / "images")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return raw_disk(tmp_path_factory.mktemp("raw") / "disk.raw")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that importing runs."""
    seen: list[list[str]] = []

    async def run(argv: Sequence[str], **options: Any) -> process.Completed:
        seen.append(list(argv))
        return await process.run(argv, **options)

    monkeypatch.setattr(qemu_img, "run", run)
    monkeypatch.setattr(unpack, "run", run)
    return seen


async def imported(store: ImageStore, source: Path | str, **options: Any) -> Image:
    return await import_image(store, store.path.parent / "cache", str(source), name="test", **options)


def left(store: ImageStore) -> list[str]:
    """What the store holds beside finished images."""
    return sorted(path.name for path in store.path.rglob(".*"))


def content(store: ImageStore, image: Image) -> bytes:
    assert image.disk is not None
    with GuestDisk(store.file(image, image.disk)) as guest:
        return guest.read(0, guest.size)


# What arrives


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("qcow2", ()),
        ("qcow2", ("compat=0.10",)),
        ("qcow2", ("compression_type=zstd",)),
        ("vmdk", ()),
        ("vmdk", ("subformat=streamOptimized",)),
        ("vpc", ("force_size=on",)),
        ("vpc", ("subformat=fixed", "force_size=on")),
        ("vhdx", ()),
        ("vdi", ()),
        ("vdi", ("static=on",)),
    ],
)
async def test_every_format_brings_the_same_disk(
    store: ImageStore, raw: Path, tmp_path: Path, driver: str, options: tuple[str, ...]
) -> None:
    image = await imported(store, converted(raw, tmp_path / "picture.jpg", driver, *options))
    assert content(store, image) == raw.read_bytes()
    assert image.disk_size_mib == 8


async def test_an_image_is_described_stored_and_stands_alone(store: ImageStore, raw: Path) -> None:
    steps: list[Step] = []
    image = await imported(
        store, raw, user="admin", os="Testix 1", seed=Seed.NONE, memory_mib=300, progress=steps.append
    )
    assert (image.name, image.user, image.os, image.seed, image.memory_mib) == (
        "test",
        "admin",
        "Testix 1",
        "none",
        300,
    )
    assert (image.source, image.firmware, image.disk_size_mib) == (str(raw), ("bios",), 8)
    assert image.disk is not None
    disk = store.file(image, image.disk)
    assert sorted(path.name for path in disk.parent.iterdir()) == ["disk.qcow2", "image.json"]
    assert image.disk.sha256 == hashlib.sha256(disk.read_bytes()).hexdigest()
    assert store.get("test") == image
    found = json.loads(
        subprocess.run(["qemu-img", "info", "--output=json", disk], capture_output=True, check=True).stdout
    )
    assert "backing-filename" not in found
    assert left(store) == []
    shown = [step for step in steps if step.phase == "convert"]
    assert shown[-1] == Step("convert", 8 * MIB, 8 * MIB, "B")


async def test_a_disk_of_no_whole_mib_is_filled_up(store: ImageStore, raw: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.img"
    odd.write_bytes(raw.read_bytes()[: 3 * MIB + 1000])
    image = await imported(store, odd)
    assert image.disk_size_mib == 4
    assert content(store, image) == odd.read_bytes().ljust(4 * MIB, b"\0")


async def test_an_appliance_is_imported_without_being_unpacked(
    store: ImageStore, raw: Path, tmp_path: Path, calls: list[list[str]]
) -> None:
    for driver, options in (("vmdk", ("subformat=streamOptimized",)), ("qcow2", ()), ("vpc", ("force_size=on",))):
        disk = converted(raw, tmp_path / f"d.{driver}", driver, *options)
        appliance = tmp_path / "machine.ova"
        appliance.write_bytes(tar(("m.ovf", ovf("m-disk1")), ("m-disk1", disk.read_bytes()), ("m.mf", b"")))
        assert content(store, await imported(store, appliance)) == raw.read_bytes()


@pytest.mark.parametrize("extension", ["gz", "xz", "bz2", "zst"])
async def test_compressed_images_are_unpacked(store: ImageStore, raw: Path, tmp_path: Path, extension: str) -> None:
    if extension == "zst":
        if not shutil.which("zstd"):
            pytest.fail("these tests need the program zstd: apt-get install zstd")
        subprocess.run(["zstd", "-q", raw, "-o", tmp_path / "disk.zst"], check=True)
    else:
        pack = PACKERS[extension]
        half = 3 * MIB
        data = raw.read_bytes()
        # Two streams in one file, as pigz and pbzip2 write them.
        (tmp_path / f"disk.{extension}").write_bytes(pack(data[:half]) + pack(data[half:]))
    packed = tmp_path / f"disk.{extension}"
    digest = hashlib.sha512(packed.read_bytes()).hexdigest()
    image = await imported(store, packed, checksum=f"sha512:{digest}")
    assert content(store, image) == raw.read_bytes()
    assert left(store) == []


async def test_file_addresses_and_relative_paths(
    store: ImageStore, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = shutil.copy(raw, tmp_path / "my disk,file.driver=x.img")
    image = await imported(store, f"file://{str(spaced).replace(' ', '%20')}")
    assert image.source == str(spaced)
    monkeypatch.chdir(tmp_path)
    assert (await imported(store, "my disk,file.driver=x.img")).source == str(spaced)


async def test_raw_only_where_it_boots_or_the_user_says_so(store: ImageStore, tmp_path: Path) -> None:
    data = tmp_path / "data.img"
    data.write_bytes(bytes(MIB) + b"x" * 1000 + bytes(MIB))
    with pytest.raises(ImageRefused, match="no boot signature") as caught:
        await imported(store, data)
    assert caught.value.hint is not None and "--format raw" in caught.value.hint
    assert content(store, await imported(store, data, format="raw"))[: 3 * MIB].rstrip(
        b"\0"
    ) == data.read_bytes().rstrip(b"\0")


async def test_a_raw_disk_whose_guest_wrote_a_qcow2_header_stays_data(
    store: ImageStore, tmp_path: Path, calls: list[list[str]]
) -> None:
    run_qemu_img("create", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", tmp_path / "trap", "8M")
    image = await imported(store, tmp_path / "trap", format="raw")
    assert content(store, image).startswith((tmp_path / "trap").read_bytes())
    assert b"root:" not in content(store, image)
    for argv in calls:
        assert not [
            word for word in argv if word.startswith("json:") and '"driver": "qcow2"' in word and "proc" in word
        ]


# What is refused, before qemu-img is called

FLAT = b"""# Disk DescriptorFile
version=1
CID=1
parentCID=ffffffff
createType="monolithicFlat"
RW 1 FLAT "%s" 0
"""


def hostile(directory: Path) -> dict[str, Path]:
    """Files that would show files of the host to whoever opens them."""
    made = {
        name: directory / name for name in ("passwd", "json", "data", "nbd", "flat", "embedded", "stream", "ova", "gz")
    }
    run_qemu_img("create", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", made["passwd"], "8M")
    target = 'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}'
    run_qemu_img("create", "-f", "qcow2", "-u", "-b", target, "-F", "raw", made["json"], "8M")
    run_qemu_img("create", "-f", "qcow2", "-u", "-b", "nbd://127.0.0.1:1/x", "-F", "raw", made["nbd"], "8M")
    run_qemu_img("create", "-f", "qcow2", "-o", f"data_file={directory / 'd'},data_file_raw=on", made["data"], "8M")
    name = (directory / "d").name.encode()
    assert name in made["data"].read_bytes()
    text = FLAT % b"/etc/shadow"
    made["flat"].write_bytes(text)
    run_qemu_img("create", "-f", "vmdk", directory / "sparse", "8M")
    sparse = (directory / "sparse").read_bytes()
    # Capacity 0 makes qemu follow the description inside.
    made["embedded"].write_bytes(patched(patched(sparse, 12, bytes(8)), 512, text.ljust(20 * 512, b"\0")))
    made["stream"].write_bytes(patched(sparse, 512, text.ljust(20 * 512, b"\0")))
    made["ova"].write_bytes(tar(("a.ovf", ovf("d")), ("d", made["passwd"].read_bytes())))
    made["gz"].write_bytes(gzip.compress(made["json"].read_bytes()))
    return made


async def test_hostile_images_are_refused_before_qemu_img_is_called(
    store: ImageStore, tmp_path: Path, calls: list[list[str]]
) -> None:
    for name, path in hostile(tmp_path).items():
        with pytest.raises(ImageRefused) as caught:
            await imported(store, path)
        assert calls == [], name
        assert "/etc" not in caught.value.message
        assert "\n" not in caught.value.message
        assert left(store) == []
    assert store.all() == []


async def test_those_images_do_show_the_hosts_files_to_qemu_img(tmp_path: Path) -> None:
    """The test above would prove nothing if they were harmless."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"the host's secret".ljust(512, b"."))
    text = FLAT % str(secret).encode()
    run_qemu_img("create", "-f", "vmdk", tmp_path / "sparse", "8M")
    sparse = (tmp_path / "sparse").read_bytes()
    (tmp_path / "v.vmdk").write_bytes(patched(patched(sparse, 12, bytes(8)), 512, text.ljust(10240, b"\0")))
    run_qemu_img("create", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", tmp_path / "b.qcow2", "512")
    for name in ("v.vmdk", "b.qcow2"):
        run_qemu_img("convert", "-O", "raw", tmp_path / name, tmp_path / "out")
        assert b"the host's secret" in (tmp_path / "out").read_bytes(), name


async def test_even_without_our_inspection_no_backing_file_is_opened(tmp_path: Path, raw: Path) -> None:
    """The second line of defence: the node given to qemu-img says that there is no backing file."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"the host's secret".ljust(MIB, b"."))
    run_qemu_img("create", "-f", "qcow2", "-u", "-b", secret, "-F", "raw", tmp_path / "b.qcow2", "1M")
    disk = Disk(format=Format.QCOW2, virtual_size=MIB)
    measured = await qemu_img.measure(disk, str(tmp_path / "b.qcow2"), "b")
    await qemu_img.convert(disk, str(tmp_path / "b.qcow2"), tmp_path / "out.qcow2", measured, "b")
    with GuestDisk(tmp_path / "out.qcow2") as guest:
        assert guest.read(0, MIB) == bytes(MIB)


async def test_every_node_names_its_driver(
    store: ImageStore, raw: Path, tmp_path: Path, calls: list[list[str]]
) -> None:
    disk = converted(raw, tmp_path / "d", "vmdk", "subformat=streamOptimized")
    (tmp_path / "a.ova").write_bytes(tar(("m.ovf", ovf("d")), ("d", disk.read_bytes())))
    for source in (raw, converted(raw, tmp_path / "q", "qcow2"), tmp_path / "a.ova"):
        await imported(store, source)

    def check(node: dict[str, Any]) -> None:
        assert node["driver"] in ("raw", "qcow2", "vmdk", "file")
        assert node["read-only"] is True
        if node["driver"] != "file":
            check(node["file"])

    nodes = [json.loads(word[5:]) for argv in calls for word in argv if word.startswith("json:")]
    assert len(nodes) >= 10
    for node in nodes:
        check(node)
    reading = [argv for argv in calls if {"check", "measure", "convert"} & set(argv)]
    assert all(argv[0].endswith("prlimit") and argv[1].startswith("--as=") for argv in reading)


# What is damaged


@pytest.mark.parametrize("driver", ["qcow2", "vmdk", "vhdx", "vdi", "vpc"])
async def test_a_truncated_image_is_refused(store: ImageStore, raw: Path, tmp_path: Path, driver: str) -> None:
    whole = converted(raw, tmp_path / "whole", driver).read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[: 3 * len(whole) // 4])
    with pytest.raises(ImageRefused):
        await imported(store, cut)
    assert left(store) == []


async def test_a_qcow2_that_contradicts_itself_is_refused(store: ImageStore, raw: Path, tmp_path: Path) -> None:
    data = converted(raw, tmp_path / "q", "qcow2").read_bytes()
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ~(3 << 62)
    first = data[l2 : l2 + 8]
    twice = tmp_path / "twice"
    # The second cluster of the guest is said to lie where the first does.
    twice.write_bytes(patched(data, l2 + 8, first))
    with pytest.raises(ImageRefused, match="can't be read"):
        await imported(store, twice)


@pytest.mark.parametrize("extension", ["gz", "xz", "bz2", "zst"])
async def test_a_damaged_compressed_file_is_refused(
    store: ImageStore, raw: Path, tmp_path: Path, extension: str
) -> None:
    data = raw.read_bytes()
    if extension == "zst":
        subprocess.run(["zstd", "-q", raw, "-o", tmp_path / "whole.zst"], check=True)
        packed = (tmp_path / "whole.zst").read_bytes()
    else:
        packed = PACKERS[extension](data)
    for damaged in (packed[: len(packed) // 2], patched(packed, len(packed) // 2, b"\0" * 64)):
        path = tmp_path / f"disk.{extension}"
        path.write_bytes(damaged)
        with pytest.raises(ImageRefused, match="damaged"):
            await imported(store, path)
        assert left(store) == []


async def test_a_bomb_is_refused(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MAX_UNPACKED", 64 * MIB)
    for extension, pack in PACKERS.items():
        path = tmp_path / f"bomb.{extension}"
        path.write_bytes(pack(bytes(65 * MIB)))
        with pytest.raises(ImageRefused, match="unpacks to more than"):
            await imported(store, path)
    subprocess.run(["zstd", "-q", "-o", tmp_path / "bomb.zst"], input=bytes(80 * MIB), check=True)
    with pytest.raises(ImageRefused, match="damaged"):
        await imported(store, tmp_path / "bomb.zst")
    assert left(store) == []


async def test_an_xz_file_that_wants_much_memory_is_refused(store: ImageStore, tmp_path: Path) -> None:
    plain = lzma.compress(
        boot_sector(), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}], check=lzma.CHECK_NONE
    )
    path = tmp_path / "greedy.xz"
    path.write_bytes(greedy(plain))
    with pytest.raises(ImageRefused, match="damaged: Memory usage limit"):
        await imported(store, path)


def greedy(xz: bytes) -> bytes:
    """The xz file with the largest dictionary (4 GiB) in its block header (xz file format, sections 3.1 and 5.3.1)."""
    size = (xz[12] + 1) * 4
    header = bytearray(xz[12 : 12 + size - 4])
    position = header.index(b"\x21\x01", 2)
    header[position + 2] = 40
    return xz[:12] + bytes(header) + zlib.crc32(header).to_bytes(4, "little") + xz[12 + size :]


# What the user gives wrongly


async def test_bad_input_is_said_before_anything_is_done(store: ImageStore, raw: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for source, options, error, words in (
        (tmp_path / "none", {}, NotFound, "there is no file"),
        (raw / "below", {}, NotFound, "there is no file"),
        (tmp_path, {}, PolyvisorError, "is not a regular file"),
        (pipe, {}, InvalidInput, "is not a regular file"),
        ("/dev/zero", {}, InvalidInput, "is not a regular file"),
        ("ftp://host/disk", {}, InvalidInput, "can't be fetched"),
        ("file://host/disk", {}, InvalidInput, "can't be fetched"),
        ("", {}, InvalidInput, "is not a path"),
        ("a\0b", {}, InvalidInput, "is not a path"),
        ("file:///a%00b", {}, InvalidInput, "can't be fetched"),
        (raw, {"format": "exe"}, InvalidInput, "is not a disk format"),
        (raw, {"format": "vmdk"}, ImageRefused, "this is raw, not vmdk"),
        (raw, {"checksum": "sha256:12"}, InvalidInput, "is not a checksum"),
        (raw, {"checksum": "d" * 32}, InvalidInput, "can be forged"),
    ):
        with pytest.raises(error, match=words) as caught:
            await imported(store, source, **options)
        assert "\n" not in caught.value.message
    with pytest.raises(InvalidInput, match="is not an image name"):
        await import_image(store, tmp_path, str(raw), name="../x")
    assert store.all() == []


async def test_a_wrong_checksum_is_refused(store: ImageStore, raw: Path, calls: list[list[str]]) -> None:
    right = hashlib.sha256(raw.read_bytes()).hexdigest()
    with pytest.raises(DownloadFailed, match=right):
        await imported(store, raw, checksum="a" * 64)
    assert calls == []
    assert (await imported(store, raw, checksum=right.upper())).disk_size_mib == 8


# Files that others can change


async def test_a_file_that_others_can_change_is_copied_first(
    store: ImageStore, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between inspection and conversion its owner swaps the file's content; what was inspected is what arrives."""
    shared = Path(shutil.copy(converted(raw, tmp_path / "q", "qcow2"), tmp_path / "shared.qcow2"))
    shared.chmod(0o666)
    trap = tmp_path / "trap"
    run_qemu_img("create", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", trap, "8M")
    original = qemu_img.check

    async def swapping(disk: Disk, filename: str, name: str) -> None:
        shared.write_bytes(trap.read_bytes())
        await original(disk, filename, name)

    monkeypatch.setattr(qemu_img, "check", swapping)
    assert content(store, await imported(store, shared)) == raw.read_bytes()


async def test_another_file_put_in_its_place_is_not_opened(
    store: ImageStore, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = converted(raw, tmp_path / "mine", "qcow2")
    original = qemu_img.check

    async def swapping(disk: Disk, filename: str, name: str) -> None:
        mine.unlink()
        mine.symlink_to("/etc/passwd")
        await original(disk, filename, name)

    monkeypatch.setattr(qemu_img, "check", swapping)
    assert content(store, await imported(store, mine)) == raw.read_bytes()


# Full disks and interruptions


async def test_a_disk_without_room_is_seen_before(
    store: ImageStore, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "SPARE", 1 << 60)
    with pytest.raises(StorageFull, match="the image store has"):
        await imported(store, raw)
    assert left(store) == []


@pytest.mark.parametrize("source", ["raw", "gz"])
async def test_a_disk_that_fills_up_leaves_nothing(
    store: ImageStore, raw: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full file system: writing ends with ENOSPC (from unpacking), or qemu-img says so."""
    path = raw
    if source == "gz":
        path = tmp_path / "disk.gz"
        path.write_bytes(gzip.compress(raw.read_bytes()))

        def full(*args: object) -> None:
            raise translated(OSError(errno.ENOSPC, "No space left on device"), "importing disk.gz")

        monkeypatch.setattr(unpack, "_spool", full)
    else:

        async def failing(argv: Sequence[str], **options: Any) -> process.Completed:
            if "convert" in argv:
                raise ProcessFailed(argv, 1, "qemu-img: error while writing at byte 0: No space left on device")
            return await process.run(argv, **options)

        monkeypatch.setattr(qemu_img, "run", failing)
    with pytest.raises(StorageFull):
        await imported(store, path)
    assert left(store) == []
    assert store.all() == []


async def test_a_cancelled_import_leaves_nothing(store: ImageStore, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = asyncio.Event()

    async def hanging(argv: Sequence[str], **options: Any) -> process.Completed:
        if "convert" in argv:
            started.set()
            await asyncio.sleep(60)
        return await process.run(argv, **options)

    monkeypatch.setattr(qemu_img, "run", hanging)
    task = asyncio.create_task(imported(store, raw))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left(store) == []


async def test_an_image_that_takes_too_long_is_given_up(
    store: ImageStore, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(argv: Sequence[str], **options: Any) -> process.Completed:
        raise TimedOut("qemu-img did not end within 6000 s")

    monkeypatch.setattr(qemu_img, "run", slow)
    with pytest.raises(TimedOut):
        await imported(store, raw)
    assert left(store) == []


@pytest.mark.parametrize("limit", ["--as=20971520", "--fsize=1000"])
async def test_the_limits_hold(raw: Path, tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits far too low, real conversions end, and as a refusal."""

    async def tighter(argv: Sequence[str], **options: Any) -> process.Completed:
        name = limit.partition("=")[0]
        return await process.run([limit if word.startswith(name) else word for word in argv], **options)

    disk = Disk(format=Format.RAW, virtual_size=8 * MIB)
    measured = await qemu_img.measure(disk, str(raw), "raw")
    monkeypatch.setattr(qemu_img, "run", tighter)
    with pytest.raises(ImageRefused, match=r"too much|can't be read"):
        await qemu_img.convert(disk, str(raw), tmp_path / "out", measured, "raw")


# From the network


async def test_an_address_is_fetched_imported_and_not_kept(store: ImageStore, raw: Path, tmp_path: Path) -> None:
    packed = gzip.compress(raw.read_bytes())
    digest = hashlib.sha256(packed).hexdigest()
    with serving() as site:
        url = site.add("/pub/disk.raw.gz", packed, drop_after=[200_000])
        image = await imported(store, url + "?token=secret", checksum=digest)
    assert content(store, image) == raw.read_bytes()
    assert image.source == url
    assert not [path for path in (store.path.parent / "cache").rglob("*") if path.is_file()]


async def test_a_web_page_instead_of_an_image_is_said(store: ImageStore) -> None:
    with serving() as site:
        url = site.add("/disk.qcow2", b"<!DOCTYPE html><html>Sign in first</html>")
        with pytest.raises(ImageRefused, match=r"disk.qcow2: this is a web page"):
            await imported(store, url)
    assert not [path for path in (store.path.parent / "cache").rglob("*") if path.is_file()]


async def test_a_download_survives_a_full_store(store: ImageStore, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as site:
        url = site.add("/disk.raw", raw.read_bytes())
        with monkeypatch.context() as patch:
            patch.setattr(unpack, "SPARE", 1 << 60)
            with pytest.raises(StorageFull):
                await imported(store, url)
        await imported(store, url)
        assert [request.headers.get("If-None-Match") for request in site.requests] == [None, '"v1"']


async def test_two_imports_of_one_address_at_once_fetch_it_once(store: ImageStore, raw: Path) -> None:
    with serving() as site:
        url = site.add("/disk.raw", raw.read_bytes(), pause_s=0.001)
        images = await asyncio.gather(*(imported(store, url) for _ in range(3)))
        assert len({image.id for image in images}) == 1
        assert len(site.requests) == 1


# qemu_img


async def test_overlays_and_blank_disks(tmp_path: Path, raw: Path) -> None:
    base = converted(raw, tmp_path / "base,file.qcow2", "qcow2")
    overlay = tmp_path / "over:lay.qcow2"
    await qemu_img.create_overlay(overlay, base, None)
    assert (await info(overlay))["virtual-size"] == 8 * MIB
    await qemu_img.create_overlay(overlay, base, 20)
    found = await info(overlay)
    assert (found["virtual-size"], found["backing-filename"], found["backing-filename-format"]) == (
        20 * MIB, str(base), "qcow2",
    )  # fmt: skip
    await qemu_img.create_blank(tmp_path / "blank", 5)
    assert (await info(tmp_path / "blank"))["virtual-size"] == 5 * MIB
    assert (tmp_path / "blank").stat().st_mode & 0o777 == 0o600
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PolyvisorError, match="No such file"):
        await qemu_img.create_overlay(tmp_path / "x", tmp_path / "gone", None)
    with pytest.raises(PolyvisorError):
        await qemu_img.create_blank(tmp_path / "none" / "x", 5)
    assert sorted(tmp_path.iterdir()) == before


async def info(path: Path) -> dict[str, Any]:
    return await qemu_img.info(path)
