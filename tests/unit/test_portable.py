"""An image as one file: it arrives as it was, and what was made by somebody else is believed in nothing."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor import process
from polyvisor.errors import AlreadyExists, ImageRefused, InvalidInput, NotFound, PolyvisorError, StorageFull
from polyvisor.images import portable, qemu_img
from polyvisor.images.formats import Reader
from polyvisor.images.formats.tar import members
from polyvisor.images.image import Image, Seed
from polyvisor.images.importer import check_before_upload, import_image
from polyvisor.images.manifest import parse_manifest
from polyvisor.images.portable import exported, exported_size, inspect_exported
from polyvisor.images.store import ImageStore
from tests.unit.disks import MIB, patched, raw_disk, tar, tar_header
from tests.unit.disks import qemu_img as run_qemu_img
from tests.unit.exported import KERNEL, add_direct, add_full, archive, packed, parts
from tests.unit.specs import QUICK
from tests.unit.webserver import serving

Files = dict[str, bytes]
Manifest = dict[str, Any]


@pytest.fixture
def origin(tmp_path: Path) -> ImageStore:
    """Where an image comes from."""
    return ImageStore(tmp_path / "origin" / "images")


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """Where it shall go."""
    return ImageStore(tmp_path / "home" / "images")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that qemu-img is run by."""
    seen: list[list[str]] = []

    async def run(argv: Sequence[str], **options: Any) -> process.Completed:
        seen.append(list(argv))
        return await process.run(argv, **options)

    monkeypatch.setattr(qemu_img, "run", run)
    return seen


async def taken(store: ImageStore, data: bytes, **options: Any) -> Image:
    """The image in `data`, imported."""
    path = store.path.parent / "given.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return await import_image(store, store.path.parent / "cache", str(path), **options)


async def refusal(store: ImageStore, data: bytes) -> ImageRefused:
    """Why `data` is refused; nothing of it stays."""
    with pytest.raises(ImageRefused) as caught:
        await taken(store, data)
    assert caught.value.message.isprintable()
    assert caught.value.hint
    assert store.all() == []
    assert [path.name for path in store.path.rglob(".*")] == []
    return caught.value


# What arrives


async def test_an_image_arrives_as_it_was(origin: ImageStore, store: ImageStore, tmp_path: Path) -> None:
    image = add_full(origin, tmp_path)
    defaults = {f.name: f.default for f in dataclasses.fields(Image) if f.name != "architecture"}
    assert [key for key, value in defaults.items() if getattr(image, key) == value] == [], "every field is tried"
    data = archive(origin, image)
    there = await taken(store, data)
    assert replace(there, created_at=image.created_at) == image
    assert there.same_as(image)
    assert store.get("full") == there
    for file in image.files:
        assert store.file(there, file).read_bytes() == origin.file(image, file).read_bytes()
    assert await taken(store, data) == there, "what is there already stays"
    assert replace(image, created_at=0) == replace(there, created_at=0)
    # It can be carried on from there.
    assert parts(store, there)[1] == parts(origin, image)[1]


async def test_so_does_one_without_a_disk_and_without_qemu_img(
    origin: ImageStore, store: ImageStore, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_img, "program", lambda: pytest.fail("nothing here needs qemu-img"))
    image = add_direct(origin)
    assert (await taken(store, archive(origin, image))).same_as(image)
    assert calls == []


def test_the_file_is_a_tar_archive_as_large_as_was_said(origin: ImageStore, tmp_path: Path) -> None:
    for image in (add_direct(origin), add_full(origin, tmp_path)):
        data = archive(origin, image)
        assert len(data) == exported_size(image)
        assert data == archive(origin, image)
        with tarfile.open(fileobj=io.BytesIO(data)) as opened:
            assert opened.getnames() == ["image.json", *(file.name for file in image.files)]
            manifest = opened.extractfile("image.json")
            assert manifest is not None
            assert manifest.read() == (origin.directory(image) / "image.json").read_bytes()
            assert {member.mode for member in opened} == {0o444}


def test_members_of_many_gib_have_headers_that_can_be_read(origin: ImageStore) -> None:
    image = add_direct(origin)
    size = 9 << 30
    header = portable._header("disk.qcow2", size, image)
    [member] = members(Reader(io.BytesIO(header), "x", size=512 + size))
    assert (member.name, member.size) == ("disk.qcow2", size)


def test_an_image_that_is_removed_meanwhile_is_exported_whole(origin: ImageStore) -> None:
    image = add_direct(origin)
    expected = archive(origin, image)
    chunks = exported(origin, image)
    data = next(chunks)
    origin.remove("direct", lambda _: [])
    assert data + b"".join(chunks) == expected
    with pytest.raises(NotFound):
        archive(origin, image)


def test_an_image_that_is_damaged_in_the_store_is_not_exported(origin: ImageStore) -> None:
    image = add_direct(origin)
    assert image.kernel is not None
    kernel = origin.file(image, image.kernel)
    kernel.chmod(0o644)
    kernel.write_bytes(b"short")
    with pytest.raises(PolyvisorError, match="has 5 bytes, not"):
        archive(origin, image)


async def test_it_may_be_compressed_or_others_may_write_to_it(origin: ImageStore, store: ImageStore) -> None:
    manifest, files = parts(origin, add_direct(origin))
    # Names that temporary files of an import have.
    manifest["kernel"]["name"], manifest["initrd"]["name"] = "copy", "unpacked"
    data = packed(manifest, {"copy": files["vmlinuz"], "unpacked": files["initrd"]})
    path = store.path.parent / "given"
    path.parent.mkdir(parents=True)
    for content in (data, gzip.compress(data)):
        path.write_bytes(content)
        path.chmod(0o666)
        digest = hashlib.sha256(content).hexdigest()
        image = await import_image(store, store.path.parent / "cache", str(path), checksum=digest)
        assert image.kernel is not None
        assert store.file(image, image.kernel).read_bytes() == KERNEL
        assert sorted(path.name for path in store.directory(image).iterdir()) == ["copy", "image.json", "unpacked"]
        store.remove("direct", lambda _: [])


# Names, and what may be said of it


async def test_another_name_makes_another_image(origin: ImageStore, store: ImageStore) -> None:
    image = add_direct(origin)
    other = await taken(store, archive(origin, image), name="other")
    assert other.name == "other"
    assert other.id != image.id
    assert other.same_as(replace(image, name="other"))


async def test_it_does_not_take_another_images_name_by_itself(origin: ImageStore, store: ImageStore) -> None:
    there = add_direct(store, kernel=b"mine")
    data = archive(origin, add_direct(origin))
    with pytest.raises(AlreadyExists, match="calls itself 'direct'") as caught:
        await taken(store, data)
    assert "--name direct if" in str(caught.value.hint)
    assert store.get("direct") == there
    image = await taken(store, data, name="direct")
    assert store.get("direct") == image != there


@pytest.mark.parametrize(
    ("key", "value"), [("user", "root"), ("seed", Seed.NONE), ("memory_mib", 512), ("format", "ova"), ("format", "raw")]
)
async def test_what_it_says_itself_can_not_be_said_anew(
    origin: ImageStore, store: ImageStore, key: str, value: Any
) -> None:
    data = archive(origin, add_direct(origin))
    with pytest.raises(InvalidInput, match="describes itself") as caught:
        await taken(store, data, name="x", **{key: value})
    assert caught.value.hint == f"leave out --{key.removesuffix('_mib')}"
    with pytest.raises(InvalidInput, match="describes itself"):
        check_before_upload(store.path.parent / "given.tar", "x", **{key: value})
    assert store.all() == []


async def test_a_disk_image_needs_a_name(store: ImageStore, tmp_path: Path) -> None:
    disk = raw_disk(tmp_path / "disk.raw")
    with pytest.raises(InvalidInput, match=r"disk\.raw has no name of its own") as caught:
        await import_image(store, tmp_path / "cache", str(disk))
    assert caught.value.hint == "add --name NAME"
    with pytest.raises(InvalidInput, match="no name of its own"):
        check_before_upload(disk, None)
    check_before_upload(disk, "x", user="root")
    (tmp_path / "disk.raw.gz").write_bytes(gzip.compress(b"who knows?"))
    check_before_upload(tmp_path / "disk.raw.gz", None)


async def test_it_may_lie_on_a_web_server(
    origin: ImageStore, store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    image = add_direct(origin)
    cache = tmp_path / "cache"
    with serving() as site:
        assert (await import_image(store, cache, site.add("/x", archive(origin, image)))).same_as(image)
        assert [path for path in cache.rglob("*") if path.is_file()] == []
        url = site.add("/disk.raw", raw_disk(tmp_path / "raw").read_bytes())
        with pytest.raises(InvalidInput, match=r"disk\.raw has no name"):
            await import_image(store, cache, url)
        assert (await import_image(store, cache, url, name="disk")).name == "disk"
        # What was fetched is not fetched again.
        assert [request.headers.get("If-None-Match") for request in site.requests[1:]] == [None, '"v1"']


# What is refused: the manifest


def change(**values: object) -> Callable[[Manifest], object]:
    """A change to a manifest: `kernel__name` is `name` in `kernel`; None where a function shall do it."""

    def apply(manifest: Manifest) -> object:
        for path, value in values.items():
            *above, key = path.split("__")
            place = manifest
            for part in above:
                place = place[part]
            place[key] = value
        return manifest

    return apply


def without(key: str) -> Callable[[Manifest], object]:
    return lambda manifest: {k: v for k, v in manifest.items() if k != key}


def text(edit: Callable[[str], str]) -> Callable[[Manifest], object]:
    return lambda manifest: edit(json.dumps(manifest)).encode()


HOSTILE_MANIFESTS: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "no JSON": (lambda _: b"{", "not JSON"),
    "no text": (lambda _: b"\xff\xfe{}", "not JSON"),
    "nested": (lambda _: b"[" * 60_000, "not JSON"),
    "a list": (lambda _: b"[]", "not a mapping"),
    "empty": (lambda _: b"", "not JSON"),
    "too large": (text(lambda t: t + " " * 65536), "absurd size"),
    "a key twice": (text(lambda t: t.replace("{", '{"name": "x", ', 1)), "not JSON"),
    "a key twice below": (text(lambda t: t.replace('{"name": "vm', '{"size": 1, "name": "vm')), "not JSON"),
    "no number": (text(lambda t: t.replace('"memory_mib": 768', '"memory_mib": NaN')), "not JSON"),
    "many digits": (text(lambda t: t.replace("768", "7" * 5000)), "not JSON"),
    "unknown key": (change(backing_file="/etc/passwd"), "unknown key"),
    "unknown key below": (change(kernel__path="/etc/passwd"), r"kernel\.path"),
    "no format": (without("format"), "format: None"),
    "later format": (change(format=2), "format: 2"),
    "odd format": (change(format=True), "format: True"),
    "no name": (without("name"), "name: None: is missing"),
    "no size": (change(kernel={"name": "vmlinuz", "sha256": "0" * 64}), r"kernel\.size"),
    "wrong types": (change(name=5), "name: 5: is not text"),
    "bool for a number": (change(memory_mib=True), "memory_mib: True"),
    "text for a number": (change(kernel__size="5"), r"kernel\.size"),
    "text for a file": (change(kernel="vmlinuz"), "kernel: 'vmlinuz'"),
    "text for a list": (change(firmware="bios"), "firmware: 'bios'"),
    "no seed": (change(seed="floppy"), "seed: 'floppy'"),
    "name up": (change(name="../up"), "name"),
    "name hidden": (change(name=".x"), "name"),
    "name with dots": (change(name="a..b"), "name"),
    "name with a slash": (change(name="a/b"), "name"),
    "file up": (change(kernel__name="../vmlinuz"), r"kernel\.name"),
    "file elsewhere": (change(kernel__name="/etc/passwd"), r"kernel\.name"),
    "file below": (change(kernel__name="a/b"), r"kernel\.name"),
    "file hidden": (change(kernel__name=".."), r"kernel\.name"),
    "file unnamed": (change(kernel__name=""), r"kernel\.name"),
    "file of a line too many": (change(kernel__name="vmlinuz\n"), r"kernel\.name"),
    "the manifest as a file": (change(kernel__name="image.json"), r"kernel\.name"),
    "one file twice": (change(kernel__name="initrd.img"), "different names"),
    "no checksum": (change(kernel__sha256=""), r"kernel\.sha256"),
    "odd checksum": (change(kernel__sha256="0" * 63 + "G"), r"kernel\.sha256"),
    "negative size": (change(kernel__size=-1), r"kernel\.size"),
    "other size": (change(kernel__size=len(KERNEL) + 1), "vmlinuz has 600010 bytes; its manifest says 600011"),
    "other machine": (change(architecture="aarch64"), "architecture"),
    "nothing that boots": (change(disk=None, disk_size_mib=None, firmware=[], kernel=None), "nothing would boot"),
    "initrd alone": (change(kernel=None), "kernel: None"),
    "seed without an initrd": (change(seed="initrd", initrd=None), "initrd: None"),
    "disk without a size": (change(disk_size_mib=None), "disk_size_mib"),
    "size without a disk": (change(disk=None, firmware=[]), "disk_size_mib"),
    "absurd disk": (change(disk_size_mib=1 << 40), "disk_size_mib"),
    "other disk": (change(disk_size_mib=9), "not of 9 MiB"),
    "odd firmware": (change(firmware=["bios", "/etc/passwd"]), "firmware"),
    "firmware twice": (change(firmware=["bios", "bios"]), "firmware"),
    "firmware without a disk": (change(disk=None, disk_size_mib=None), "firmware"),
    "user an option": (change(user="-oProxyCommand=x"), "user"),
    "user a command": (change(user="$(reboot)"), "user"),
    "user nobody": (change(user=""), "user"),
    "cmdline of two lines": (change(cmdline="a\nb"), "cmdline"),
    "cmdline too long": (change(cmdline="a" * 2048), "cmdline"),
    "system that steers": (change(os="\x1b[2J"), "os"),
    "source that steers": (change(source="\x9b1m"), "source"),
    "source of half a character": (change(source="\ud800"), "source"),
    "no memory": (change(memory_mib=0), "memory_mib"),
    "absurd memory": (change(memory_mib=1 << 30), "memory_mib"),
}


@pytest.mark.parametrize("case", HOSTILE_MANIFESTS)
async def test_a_manifest_that_can_not_be_meant(
    origin: ImageStore, store: ImageStore, tmp_path: Path, calls: list[list[str]], case: str
) -> None:
    edit, words = HOSTILE_MANIFESTS[case]
    manifest, files = parts(origin, add_full(origin, tmp_path))
    before = json.dumps(manifest)
    changed = edit(manifest)
    text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    assert text != before.encode(), "this case changes nothing"
    error = await refusal(store, packed(text, files))
    with pytest.raises(ImageRefused, match=words):
        raise error
    assert calls == []


@QUICK
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([field.name for field in dataclasses.fields(Image)]),
)
def test_no_value_of_a_field_is_more_than_invalid(value: object, key: str) -> None:
    """Whatever stands there, the outcome is an image or InvalidInput."""
    file = {"name": "vmlinuz", "sha256": "0" * 64, "size": 1}
    manifest = {"format": 1, "id": "", "name": "a", "created_at": 0.0, "source": "", "kernel": file, key: value}
    try:
        image = parse_manifest(json.dumps(manifest).encode())
    except InvalidInput:
        return
    assert image.files[0].name == "vmlinuz"


# What is refused: the archive


def sound(origin: ImageStore) -> tuple[bytes, Files]:
    manifest, files = parts(origin, add_direct(origin))
    return json.dumps(manifest).encode(), files


def member(name: str, content: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    return tar_header(name.encode(), len(content), kind, link) + content + bytes(-len(content) % 512)


HOSTILE_ARCHIVES: dict[str, tuple[Callable[[bytes, Files], bytes], str]] = {
    "a file is missing": (lambda m, f: packed(m, {"vmlinuz": f["vmlinuz"]}), "lacks the file initrd"),
    "a file too many": (lambda m, f: packed(m, {**f, "more": b"x"}), "contains more, which"),
    "a file twice": (lambda m, f: tar(("image.json", m), *f.items(), ("initrd", f["initrd"])), "unsafe name"),
    "the manifest twice": (lambda m, f: tar(("image.json", m), *f.items(), ("image.json", m)), "unsafe name"),
    "a path": (lambda m, f: packed(m, {**f, "../x": b"x"}), "unsafe name"),
    "an absolute path": (lambda m, f: packed(m, {**f, "/etc/x": b"x"}), "unsafe name"),
    "cut off": (lambda m, f: packed(m, f)[:-200_000], "cut off"),
    "cut off at a member": (lambda m, f: tar(("image.json", m))[:-1024], "lacks the file"),
    "a damaged header": (lambda m, f: patched(packed(m, f), 512 + -(-len(m) // 512) * 512 + 110, b"x"), "damaged"),
    "nothing but a manifest that is none": (
        lambda m, f: member("image.json", b"30 mtime=1000000000.000000000\n", b"x") + bytes(1024),
        "no manifest",
    ),
    "too many": (lambda m, f: packed(m, {str(i): b"" for i in range(200)}), "more than 100 files"),
    "renamed": (
        lambda m, f: member("image.json", m) + member("x", b"17 path=initrd2\n\n", b"x") + tar(*f.items()),
        "rename or resize",
    ),
    **{
        f"of kind {kind!r}": (
            lambda m, f, kind=kind: (  # type: ignore[misc]
                member("image.json", m)
                + member("vmlinuz", f["vmlinuz"])
                + member("initrd", b"", kind, b"/etc/passwd")
                + bytes(1024)
            ),
            "not a plain file",
        )
        for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"L", b"K", b"V")
    },
    "a manifest that is a link": (
        lambda m, f: member("image.json", b"", b"2", b"/etc/passwd") + tar(*f.items()),
        "not a plain file",
    ),
    "other content": (lambda m, f: packed(m, {**f, "initrd": f["initrd"][:-1] + b"x"}), "initrd: its sha256 is"),
    "contents swapped": (
        lambda m, f: packed(m, {"vmlinuz": f["initrd"], "initrd": f["vmlinuz"]}),
        "its manifest says",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_ARCHIVES)
async def test_an_archive_that_is_not_what_was_exported(origin: ImageStore, store: ImageStore, case: str) -> None:
    make, words = HOSTILE_ARCHIVES[case]
    error = await refusal(store, make(*sound(origin)))
    with pytest.raises(ImageRefused, match=words):
        raise error


async def test_any_other_tar_archive_is_still_no_appliance(origin: ImageStore, store: ImageStore) -> None:
    manifest, files = sound(origin)
    with pytest.raises(ImageRefused, match=r"0 \.ovf files"):
        await taken(store, tar(*files.items(), ("image.json", manifest)), name="x")


async def test_no_more_is_unpacked_than_there_is_room_for(
    origin: ImageStore, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = archive(origin, add_direct(origin))
    monkeypatch.setattr("polyvisor.images.unpack.SPARE", 1 << 60)
    with pytest.raises(StorageFull, match="it needs 0 MiB"):
        await taken(store, data)
    assert store.all() == []


# What is refused: the disk


def with_disk(origin: ImageStore, directory: Path, disk: bytes) -> bytes:
    """An archive whose disk is another, with the right size and checksum."""
    manifest, files = parts(origin, add_full(origin, directory))
    manifest["disk"].update(size=len(disk), sha256=hashlib.sha256(disk).hexdigest())
    return packed(manifest, {**files, "disk.qcow2": disk})


async def test_a_disk_that_names_other_files_never_reaches_qemu_img(
    origin: ImageStore, store: ImageStore, tmp_path: Path, calls: list[list[str]]
) -> None:
    target = 'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}'
    made = {
        "a backing file": ("-u", "-b", "/etc/passwd", "-F", "raw"),
        "described as JSON": ("-u", "-b", target, "-F", "raw"),
        "a server": ("-u", "-b", "nbd://127.0.0.1:1/x", "-F", "raw"),
        "a data file": ("-o", f"data_file={tmp_path / 'd'},data_file_raw=on"),
    }
    for number, (case, options) in enumerate(made.items()):
        disk = tmp_path / f"hostile{number}"
        run_qemu_img("create", "-f", "qcow2", *options, disk, "8M")
        error = await refusal(store, with_disk(origin, tmp_path, disk.read_bytes()))
        assert "needs another file" in error.message, case
        assert "/etc" not in error.message
    assert calls == []


async def test_a_disk_that_is_not_a_sound_qcow2(origin: ImageStore, store: ImageStore, tmp_path: Path) -> None:
    raw = raw_disk(tmp_path / "raw")
    disk = tmp_path / "snapshot"
    run_qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, disk)
    whole = disk.read_bytes()
    run_qemu_img("snapshot", "-c", "before", disk)
    for data, words in (
        (raw.read_bytes(), "not a qcow2 disk"),
        (disk.read_bytes(), "it has snapshots"),
        (whole[: len(whole) // 2].ljust(4096, b"\0"), "past its end|can't be read"),
        (patched(whole, 24, (7 * MIB).to_bytes(8, "big")), "not of 8 MiB"),
    ):
        with pytest.raises(ImageRefused, match=words):
            raise await refusal(store, with_disk(origin, tmp_path, data))


async def test_a_disk_that_contradicts_itself(
    origin: ImageStore, store: ImageStore, tmp_path: Path, calls: list[list[str]]
) -> None:
    disk = tmp_path / "disk"
    run_qemu_img("convert", "-f", "raw", "-O", "qcow2", raw_disk(tmp_path / "raw"), disk)
    data = disk.read_bytes()
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ~(3 << 62)
    twice = patched(data, l2 + 8, data[l2 : l2 + 8])
    with pytest.raises(ImageRefused, match=r"disk\.qcow2: it can't be read"):
        raise await refusal(store, with_disk(origin, tmp_path, twice))
    [[program, *_]] = calls
    assert program.endswith("prlimit")


def test_what_is_inspected_is_the_archive_alone(origin: ImageStore) -> None:
    found = inspect_exported(Reader(io.BytesIO(archive(origin, add_direct(origin))), "x"))
    assert set(found.members) == {"vmlinuz", "initrd"}
