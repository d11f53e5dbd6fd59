"""The chain from the archive's signature to a package, on a small archive served here; each link broken once.

tests/captured/archive was made, and signed, by its make.py.
"""

from __future__ import annotations

import hashlib
import http.server
import lzma
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from polyvisor.errors import DownloadFailed, InvalidInput, NotFound, Unavailable
from polyvisor.images import fetch as fetching
from polyvisor.images import mirror as module
from polyvisor.images import release as releasing
from polyvisor.images.fetch import fetch
from polyvisor.images.mirror import Archive, check_mirror, open_archive, parse_depends, parse_package, unpacked
from polyvisor.images.release import parse_release, verified_release
from polyvisor.images.sources import DEFAULT_MIRROR, default_mirror, is_debian, parse_sources
from polyvisor.operation import Step

CAPTURED = Path(__file__).parent.parent / "captured" / "archive"
KEYRING = CAPTURED / "keyring.gpg"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a directory; `faults` are answers for the next requests: a status, or "cut" to break off halfway."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests.append((self.path, self.headers.get("Range")))
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        path = server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, begin = path.read_bytes(), 0
        wanted = self.headers.get("Range")
        if wanted and server.ranges:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self.wfile.write(data[begin : len(data) // 2 if fault == "cut" else None])

    def log_message(self, *words: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[tuple[str, str | None]] = []
        self.faults: list[int | str | None] = []
        self.ranges = True


@contextmanager
def served(root: Path) -> Iterator[Server]:
    with Server(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, and no proxy between here and here."""
    monkeypatch.setattr(fetching, "BACKOFF_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The captured archive, in a directory that a test may change."""
    root = tmp_path / "mirror"
    shutil.copytree(CAPTURED, root)
    with served(root) as server:
        yield server


async def opened(server: Server, tmp_path: Path, suite: str = "good", keyring: Path = KEYRING) -> Archive:
    return await open_archive(server.url, suite, tmp_path / "cache", keyring=keyring)


# -- the chain ---------------------------------------------------------------------------------------------------------


async def test_a_package_is_found_fetched_and_kept(server: Server, tmp_path: Path) -> None:
    steps: list[Step] = []
    archive = await opened(server, tmp_path)
    package = archive.package("hello")
    assert (package.version, package.depends) == ("1.0", ("libc6", "a"))
    debs = await archive.fetch([package], steps.append)
    assert debs == {"hello": (CAPTURED / "pool/hello_1.0_amd64.deb").read_bytes()}
    assert steps[-1] == Step("download", package.size, package.size, "B")
    server.requests.clear()
    assert await (await opened(server, tmp_path)).fetch([package]) == debs
    assert [path for path, _ in server.requests] == ["/dists/good/InRelease"]


async def test_a_package_that_is_not_in_the_index(server: Server, tmp_path: Path) -> None:
    archive = await opened(server, tmp_path)
    for name in ("hell", "hello\nVersion", "1.0", ""):
        with pytest.raises(NotFound, match="has no package"):
            archive.package(name)


async def test_one_known_good_signature_is_enough(server: Server, tmp_path: Path) -> None:
    assert (await opened(server, tmp_path, "both")).release.codename == "both"


@pytest.mark.parametrize(
    ("suite", "problem"),
    [("stranger", "signed by an unknown key"), ("expired", "has expired"), ("missing", "there is no such suite")],
)
async def test_an_index_that_is_not_vouched_for(server: Server, tmp_path: Path, suite: str, problem: str) -> None:
    with pytest.raises(DownloadFailed, match=problem):
        await opened(server, tmp_path, suite)
    assert not list((tmp_path / "cache" / "debian").iterdir())


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"Codename: good", b"Codename: evil", "its signature is bad"),
        (b"-----BEGIN PGP SIGNED MESSAGE-----", b"Suite: good", "not a signed message"),
        (b"-----BEGIN PGP SIGNATURE-----", b"-----BEGIN PGP SIGNATURE-----\n\nno", "no valid signature"),
    ],
)
async def test_a_tampered_index(server: Server, tmp_path: Path, old: bytes, new: bytes, problem: str) -> None:
    path = server.root / "dists/good/InRelease"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(DownloadFailed, match=problem):
        await opened(server, tmp_path)


async def test_text_outside_of_the_signed_part_is_not_read(server: Server, tmp_path: Path) -> None:
    """Not at the end, and a second message not at all."""
    path = server.root / "dists/good/InRelease"
    signed = path.read_bytes()
    path.write_bytes(signed + b"\nValid-Until: Sat, 01 Feb 2020 00:00:00 UTC\nSHA256:\n 00 1 x\n")
    try:
        archive = await opened(server, tmp_path)
    except DownloadFailed:
        pass  # gpgv may refuse it altogether
    else:
        assert archive.release.valid_until is None
        assert set(archive.release.files) == {"main/binary-amd64/Packages.xz"}
    path.write_bytes(signed + (server.root / "dists/stranger/InRelease").read_bytes())
    with pytest.raises(DownloadFailed, match="not a signed message"):
        await opened(server, tmp_path)


async def test_the_index_of_another_suite(server: Server, tmp_path: Path) -> None:
    """A mirror must not pass off an old suite, validly signed, as the one asked for."""
    shutil.copytree(server.root / "dists/good", server.root / "dists/newer")
    with pytest.raises(DownloadFailed, match="'newer' is of 'good'"):
        await opened(server, tmp_path, "newer")


@pytest.mark.parametrize("tampered", [b"x", b"", b"x" * 10_000])
async def test_packages_that_differ_from_the_index(server: Server, tmp_path: Path, tampered: bytes) -> None:
    (server.root / "dists/good/main/binary-amd64/Packages.xz").write_bytes(tampered)
    with pytest.raises(DownloadFailed, match=r"not what the archive's index promises|larger than"):
        await opened(server, tmp_path)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"X" + data[1:]])
async def test_a_package_that_differs_from_the_index(
    server: Server, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = server.root / "pool/hello_1.0_amd64.deb"
    path.write_bytes(change(path.read_bytes()))
    archive = await opened(server, tmp_path)
    with pytest.raises(DownloadFailed, match=r"not what the archive's index promises|larger than"):
        await archive.fetch([archive.package("hello")])
    assert not (tmp_path / "cache" / "debian" / archive.package("hello").sha256).exists()


async def test_a_package_that_the_mirror_lacks(server: Server, tmp_path: Path) -> None:
    archive = await opened(server, tmp_path)
    with pytest.raises(DownloadFailed, match="the mirror has no such file"):
        await archive.fetch([archive.package("gone"), archive.package("hello")])


async def test_a_damaged_cache_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    archive = await opened(server, tmp_path)
    package = archive.package("hello")
    await archive.fetch([package])
    kept = tmp_path / "cache" / "debian" / package.sha256
    kept.write_bytes(b"damaged")
    await archive.fetch([package])
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == package.sha256


async def test_without_network_the_last_index_serves(server: Server, tmp_path: Path) -> None:
    await opened(server, tmp_path)
    server.faults = [403]
    assert (await opened(server, tmp_path)).package("hello").version == "1.0"
    server.faults = [403]
    with pytest.raises(DownloadFailed, match="403"):
        await opened(server, tmp_path / "elsewhere")


async def test_without_gpgv(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *, package: str) -> str:
        raise Unavailable(f"no {name}", hint=package)

    monkeypatch.setattr(releasing, "find_program", missing)
    with pytest.raises(Unavailable) as refused:
        await opened(server, tmp_path)
    assert refused.value.hint == "gpgv"


async def test_the_shipped_keyring_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hosts that aren't Debian check with it: it must be there, and be a keyring that gpgv takes."""
    monkeypatch.setattr(releasing, "HOST_KEYRING", tmp_path / "missing")
    with pytest.raises(DownloadFailed, match="signed by an unknown key"):
        await verified_release((CAPTURED / "dists/good/InRelease").read_bytes(), "good")


def test_a_release_that_makes_no_sense() -> None:
    for text in ("", "Date: x\n", "Date: x\nSHA256:\n nothing\n", "Date: x\nValid-Until: never\nSHA256:\n"):
        with pytest.raises(DownloadFailed, match="can't be understood"):
            parse_release(text, "it")


# -- single links ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mirror", ["", "debian", "ftp://h/debian", "file:///etc", "http://", "http://h/d?x=1", "https://h/d#x"]
)
def test_what_is_no_mirror(mirror: str) -> None:
    with pytest.raises(InvalidInput, match="is not the URL of a mirror"):
        check_mirror(mirror)


@pytest.mark.parametrize("suite", ["", "../x", "Bookworm", "a b", "a/b"])
async def test_what_is_no_suite(suite: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a suite"):
        await open_archive("http://127.0.0.1:9/debian", suite, tmp_path)


def test_an_index_that_unpacks_to_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PACKAGES", 1000)
    assert unpacked(lzma.compress(b"x" * 999), "it") == b"x" * 999
    for bomb in (lzma.compress(b"x" * 1_000_000), lzma.compress(b"x")[:-8], b"no xz"):
        with pytest.raises(DownloadFailed):
            unpacked(bomb, "it")


GOOD = f"Package: p\nVersion: 1\nFilename: pool/p.deb\nSize: 3\nSHA256: {'0' * 64}\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Size: 3\n", ""),
        ("Size: 3", "Size: -3"),
        ("Size: 3", "Size: lots"),
        ("0000", "00"),
        ("pool/p.deb", "../../p.deb"),
        ("0" * 64, "../" + "0" * 61),
    ],
)
def test_entries_that_make_no_sense(old: str, new: str) -> None:
    assert parse_package(GOOD).size == 3
    with pytest.raises(DownloadFailed, match="entry of 'p'"):
        parse_package(GOOD.replace(old, new))


def test_depends() -> None:
    field = "libc6 (>= 2.34), a:any | b, c [amd64], , d(=1)"
    assert parse_depends(field) == ["libc6", "a", "c", "d"]
    assert parse_depends("") == []


# -- fetching ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(server: Server) -> bytes:
    data = bytes(range(256)) * 5000
    (server.root / "file").write_bytes(data)
    return data


@pytest.mark.parametrize("ranges", [True, False])
async def test_a_broken_transfer_goes_on(server: Server, file: bytes, ranges: bool) -> None:
    server.ranges = ranges
    server.faults = ["cut", 503]
    assert await fetch(f"{server.url}/file", limit=len(file)) == file
    half = f"bytes={len(file) // 2}-"
    assert [wanted for _, wanted in server.requests] == [None, half, half]


async def test_a_server_that_stays_broken(server: Server, file: bytes) -> None:
    server.faults = [503] * 99
    with pytest.raises(DownloadFailed, match="503"):
        await fetch(f"{server.url}/file", limit=len(file))
    assert len(server.requests) == fetching.ATTEMPTS


async def test_a_file_larger_than_expected(server: Server, file: bytes) -> None:
    with pytest.raises(DownloadFailed, match="larger than"):
        await fetch(f"{server.url}/file", limit=len(file) - 1)


async def test_a_file_that_is_not_there(server: Server) -> None:
    with pytest.raises(NotFound):
        await fetch(f"{server.url}/nothing", limit=10)
    assert len(server.requests) == 1


# -- this host's mirror ------------------------------------------------------------------------------------------------

DEB822 = """# a comment
Types: deb deb-src
URIs: http://security.example.org/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: https://vendor.example.org/linux/debian
Suites: bookworm
Components: stable

Enabled: no
Types: deb
URIs: http://off.example.org/debian
Suites: bookworm
Components: main

Types: deb
# commented: http://snapshot.example.org/debian
URIs: cdrom:[disc]/ http://mirror.example.org/debian/
Suites: bookworm bookworm-updates
Components: main
"""
ONE_LINE = """
# deb http://commented.example.org/debian bookworm main
deb-src http://source.example.org/debian bookworm main
deb
deb [signed-by=/x arch=amd64] https://vendor.example.org/node nodistro main
deb [ arch=amd64 trusted=no ] http://line.example.org/debian bookworm main contrib # near
"""


def test_sources_in_both_formats(tmp_path: Path) -> None:
    apt = tmp_path / "apt"
    (apt / "sources.list.d").mkdir(parents=True)
    assert default_mirror(tmp_path) == DEFAULT_MIRROR
    (apt / "sources.list.d" / "debian.sources").write_text(DEB822)
    assert default_mirror(tmp_path) == "http://mirror.example.org/debian"
    (apt / "sources.list").write_text(ONE_LINE)
    assert default_mirror(tmp_path) == "http://line.example.org/debian"


def test_a_host_without_apt(tmp_path: Path) -> None:
    assert default_mirror(tmp_path / "missing") == DEFAULT_MIRROR


def test_other_vendors_sources_are_not_debian() -> None:
    ubuntu = "deb http://archive.example.org/ubuntu jammy main\ndeb http://x.example.org/debian nodistro main\n"
    assert len(parse_sources(ubuntu, deb822=False)) == 2
    assert not any(map(is_debian, parse_sources(ubuntu, deb822=False)))
