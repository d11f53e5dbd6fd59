"""The catalogue: its entries, a user's own, vendors' checksum files, and fetching by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyvisor.errors import DownloadFailed, InvalidInput
from polyvisor.images import download as download_module
from polyvisor.images.catalogue import Entry, entries, fetch, find, suggestions
from polyvisor.images.catalogue_entry import MAX_FILE, parse_entries
from polyvisor.images.checksum import Checksum, parse_checksum, parse_checksums
from polyvisor.images.image import Seed
from polyvisor.images.store import ImageStore, check_image_name
from polyvisor.operation import Step
from tests.unit.disks import raw_disk
from tests.unit.webserver import Site, serving

A256, B256, A512 = "a" * 64, "b" * 64, "a" * 128


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "BACKOFF_S", 0.01)
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


# The entries


def test_every_entry_can_be_used() -> None:
    for entry in entries():
        check_image_name(entry.name)
        for url in (entry.url, entry.checksums):
            assert url is not None and urlsplit(url).scheme == "https" and urlsplit(url).hostname, entry
        assert entry.url.endswith((".qcow2", ".img"))
        assert entry.user and entry.os and entry.memory_mib >= 256
        assert find(entry.name) == entry
    names = [entry.name for entry in entries()]
    assert len(names) == len(set(names)) == 18
    assert names.index("rocky-9") < names.index("rocky-10")


def test_the_systems_that_people_ask_for_are_there() -> None:
    for name in ("debian-12", "debian-13", "ubuntu-24.04", "alpine-3.23", "fedora-44", "rocky-9", "arch"):
        assert find(name) is not None
    assert find("windows-11") is None


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("debain-12", "debian-12"),
        ("ubuntu", "ubuntu-24.04"),
        ("fedora", "fedora-44"),
        ("Rocky", "rocky-10"),
        ("alma", "almalinux-9"),
    ],
)
def test_suggestions(asked: str, first: str) -> None:
    assert suggestions(asked)[0] == first
    assert len(suggestions(asked)) <= 3
    assert suggestions("qqqqqqqqqqqqqqqq") == []
    assert suggestions("") == []


# A user's own entries

OWN = b"""
images:
  - name: house
    url: https://images.example/house.raw.xz
    checksum: sha256:%s
    user: admin
    memory_mib: 2048
    format: raw
    seed: none
  - name: debian-12
    url: http://mirror.example/debian-12.qcow2
    checksums: http://mirror.example/SHA512SUMS
""" % A256.encode()


def test_a_users_entries_come_first(tmp_path: Path) -> None:
    (tmp_path / "catalogue.yaml").write_bytes(OWN)
    house = find("house", tmp_path)
    assert house == Entry(
        name="house", url="https://images.example/house.raw.xz", checksum=f"sha256:{A256}", user="admin",
        memory_mib=2048, format="raw", seed=Seed.NONE,
    )  # fmt: skip
    debian = find("debian-12", tmp_path)
    assert debian is not None and debian.url.startswith("http://mirror.example/")
    assert find("house") is None
    assert suggestions("hous", tmp_path) == ["house"]
    assert entries(tmp_path / "none") == entries()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "images"),
        ("[]", "images"),
        ("images: 5", "images"),
        ("images: []\nmore: 1", "images"),
        ("images: [5]", r"images\[0\].*must be a mapping"),
        ("images: [{name: a}]", r"images\[0\].url.*is missing"),
        ("images: [{url: 'https://h/x', checksum: %s}]", r"name.*is missing"),
        ("images: [{name: a, url: 'https://h/x'}]", r"checksum.*is missing"),
        ("images: [{name: a, url: 'https://h/x', colour: red}]", r"colour.*unknown key"),
        ("images: [{name: ../a, url: 'https://h/x', checksum: %s}]", "is not an image name"),
        ("images: [{name: a, url: 'file:///etc/passwd', checksum: %s}]", "must be an http"),
        ("images: [{name: a, url: 5, checksum: %s}]", "must be a line of text"),
        ("images: [{name: a, url: 'https://h/x', checksum: 12}]", "must be a line of text"),
        ("images: [{name: a, url: 'https://h/x', checksum: 'md5:x'}]", "can be forged"),
        ("images: [{name: a, url: 'https://h/x', checksum: %s, memory_mib: -1}]", "must be a number"),
        ("images: [{name: a, url: 'https://h/x', checksum: %s, memory_mib: true}]", "must be a number"),
        ("images: [{name: a, url: 'https://h/x', checksum: %s, seed: floppy}]", "must be one of"),
        ("images: [{name: a, url: 'https://h/x', checksum: %s, format: exe}]", "is not a disk format"),
        ("images: [{name: a, url: \"https://h/x\\n\", checksum: %s}]", "must be a line of text"),
        ("images: [{name: a, url: 'https://h/x', checksum: %s}, {name: a, url: 'https://h/y', checksum: %s}]", "twice"),
        ("images: [", "is not YAML"),
        ("images: !!python/object/apply:os.system [id]", "is not YAML"),
        ("images: [" + "[" * 50000, "nested too deeply"),
        ("a: &a [1]\nimages: [*a, *a]", "aliases"),
        ("images: [\0]", "is not YAML"),
        ("#" * (MAX_FILE + 1), "larger than"),
        ("images: [" + "{}," * 1001 + "]", "more than 1000"),
    ],
)  # fmt: skip
def test_a_wrong_catalogue_is_refused_by_field(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        parse_entries(text.replace("%s", f"'{A256}'").encode())
    assert "\n" not in caught.value.message


def test_bombs_in_yaml_end_at_once() -> None:
    levels = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    levels += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(InvalidInput, match="aliases"):
        parse_entries(("\n".join(levels) + "\nimages: []").encode())


# Checksums


def test_checksums_as_users_write_them() -> None:
    assert parse_checksum(f"sha256:{A256}") == Checksum("sha256", A256)
    assert parse_checksum(f" SHA-512:{A512.upper()} ") == Checksum("sha512", A512)
    assert parse_checksum("c" * 96) == Checksum("sha384", "c" * 96)
    assert str(parse_checksum(B256)) == f"sha256:{B256}"
    for wrong in ("", "sha256:", "x" * 64, "a" * 63, f"sha512:{A256}", f"crc32:{A256}", f"sha256:{A512}"):
        with pytest.raises(InvalidInput, match="is not a checksum"):
            parse_checksum(wrong)
    for weak in ("a" * 32, "a" * 40, "md5:" + "a" * 32, "sha1:abc", "SHA-1:" + "a" * 40):
        with pytest.raises(InvalidInput, match="can be forged"):
            parse_checksum(weak)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{A512}  other.qcow2\n{A512[:-1]}b  disk.qcow2\n", Checksum("sha512", A512[:-1] + "b")),
        (f"{A256} *disk.qcow2\n{B256} *disk.qcow2.manifest\n", Checksum("sha256", A256)),
        (f"{A256} *./disk.qcow2", Checksum("sha256", A256)),
        (f"# disk.qcow2: 123 bytes\nSHA256 (disk.qcow2) = {B256}\n", Checksum("sha256", B256)),
        (
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n# disk.qcow2: 1 bytes\n"
            f"SHA256 (disk.qcow2) = {B256}\n-----BEGIN PGP SIGNATURE-----\n{A256}\n-----END PGP SIGNATURE-----\n",
            Checksum("sha256", B256),
        ),
        (f"{A512}\n", Checksum("sha512", A512)),
        (f"{A256.upper()}  disk.qcow2\r\n", Checksum("sha256", A256)),
        (f"{A256}  disk.qcow2\n{A512}  disk.qcow2\n", Checksum("sha512", A512)),
        (f"{A256}  disk.qcow2\n{A256}  disk.qcow2\n", Checksum("sha256", A256)),
        (f"{A256}  disk.qcow2\n{B256}  disk.qcow2\n", None),
        (f"{A256}  not-disk.qcow2\n", None),
        (f"{A256}  dir/disk.qcow2\n", None),
        (f"SHA512 (disk.qcow2) = {A256}\n", None),
        (f"{'a' * 32}  disk.qcow2\n", None),
        (f"{A256}\n{B256}\n", None),
        (f"{A256} and words\n", None),
        ("<html>404</html>", None),
        ("", None),
    ],
)
def test_checksum_files_of_vendors(text: str, expected: Checksum | None) -> None:
    assert parse_checksums(text, "disk.qcow2") == expected


@given(st.text(max_size=500))
@settings(max_examples=200, deadline=None)
def test_any_text_is_parsed_without_error(text: str) -> None:
    assert parse_checksums(text + f"\n{A256}  name\n", "another") is None or A256 in text
    parse_checksums(text, text)


# Fetching


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as found:
        yield found


@pytest.fixture
def disk(tmp_path: Path) -> bytes:
    return raw_disk(tmp_path / "disk.raw").read_bytes()


async def test_an_entry_is_fetched_verified_and_imported(site: Site, tmp_path: Path, disk: bytes) -> None:
    store = ImageStore(tmp_path / "images")
    url = site.add("/pub/disk%2B1.img", disk)
    sums = site.add("/pub/SHA512SUMS", f"{hashlib.sha512(disk).hexdigest()}  disk+1.img\n".encode())
    entry = Entry(name="house", url=url, checksums=sums, user="admin", os="House 1", memory_mib=700)
    steps: list[Step] = []
    image = await fetch(entry, store, tmp_path / "cache", steps.append)
    assert (image.name, image.user, image.os, image.memory_mib, image.seed) == (
        "house",
        "admin",
        "House 1",
        700,
        "nocloud",
    )
    assert image.source == url
    assert store.get("house") == image
    assert {"fetch checksums", "download", "checksum", "check", "convert"} <= {step.phase for step in steps}


async def test_what_the_vendor_does_not_vouch_for_is_not_imported(site: Site, tmp_path: Path, disk: bytes) -> None:
    store = ImageStore(tmp_path / "images")
    url = site.add("/disk.img", disk)
    sums = site.add("/SUMS", f"{A256}  other.img\n".encode())
    entry = Entry(name="house", url=url, checksums=sums)
    with pytest.raises(DownloadFailed, match=r"no checksum for disk.img"):
        await fetch(entry, store, tmp_path)
    site.add("/SUMS", f"{A256}  disk.img\n".encode())
    with pytest.raises(DownloadFailed, match=A256):
        await fetch(entry, store, tmp_path)
    with pytest.raises(DownloadFailed, match="404"):
        await fetch(replace(entry, checksums=site.address + "/none"), store, tmp_path)
    with pytest.raises(DownloadFailed, match="no checksum for 'house'"):
        await fetch(replace(entry, checksums=None), store, tmp_path)
    with pytest.raises(DownloadFailed, match=A256):
        await fetch(replace(entry, checksums=None, checksum=A256), store, tmp_path)
    assert store.all() == []


async def test_a_release_between_list_and_image_is_coped_with(
    site: Site, tmp_path: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list is of the old image, the address gives the new one already; the second list fits."""
    url = site.add("/disk.img", disk)
    right = f"{hashlib.sha256(disk).hexdigest()}  disk.img\n"
    texts = [f"{A256}  disk.img\n", right]

    async def changing(address: str, **options: object) -> str:
        return texts.pop(0)

    monkeypatch.setattr(download_module, "fetch_text", changing)
    image = await fetch(Entry(name="house", url=url, checksums=url + ".sums"), ImageStore(tmp_path / "i"), tmp_path)
    assert image.name == "house"
    assert texts == []
