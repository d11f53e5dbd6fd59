"""Downloads from a server on loopback: resumed, verified, one at a time; never led astray by redirects."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyvisor.errors import DownloadFailed, InvalidInput, StorageFull
from polyvisor.images import download as module
from polyvisor.images import http as http_module
from polyvisor.images.checksum import Checksum
from polyvisor.images.download import download, fetch_text, held
from polyvisor.operation import Step
from tests.unit.webserver import Site, authority, serving

BODY = b"".join(hashlib.sha256(str(index).encode()).digest() for index in range(8192))  # 256 KiB
SUM = Checksum("sha256", hashlib.sha256(BODY).hexdigest())
OTHER = bytes(reversed(BODY))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits, and no proxy that the environment may name."""
    monkeypatch.setattr(module, "BACKOFF_S", 0.01)
    monkeypatch.setattr(http_module, "TIMEOUT_S", 0.5)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as found:
        yield found


def left(directory: Path) -> list[str]:
    """The files that remain below `directory`."""
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


async def test_a_file_arrives_whole_with_progress(site: Site, tmp_path: Path) -> None:
    url = site.add("/image.qcow2", BODY)
    steps: list[Step] = []
    path = await download(url, tmp_path, checksum=SUM, progress=steps.append)
    assert path.read_bytes() == BODY
    arrived = [step for step in steps if step.phase == "download"]
    assert arrived[-1] == Step("download", len(BODY), len(BODY), "B")
    assert [step.done for step in arrived] == sorted(step.done for step in arrived)


async def test_a_verified_file_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    url = site.add("/image", BODY)
    first = await download(url, tmp_path, checksum=SUM)
    assert await download(url, tmp_path, checksum=SUM) == first
    assert len(site.requests) == 1
    # Without a checksum the server is asked whether it changed.
    assert (await download(url, tmp_path)).read_bytes() == BODY
    site.add("/image", OTHER, etag='"v2"')
    assert (await download(url, tmp_path)).read_bytes() == OTHER
    # And a checksum that the kept file does not have leads to the server as well.
    site.add("/image", BODY, etag='"v2"')
    assert (await download(url, tmp_path, checksum=SUM)).read_bytes() == BODY


async def test_a_dropped_connection_is_gone_on_with(site: Site, tmp_path: Path) -> None:
    url = site.add("/image", BODY, drop_after=[50_000, 60_000, 0, 70_000])
    path = await download(url, tmp_path, checksum=SUM)
    assert path.read_bytes() == BODY
    assert [request.range for request in site.requests] == [
        None, "bytes=50000-", "bytes=110000-", "bytes=110000-", "bytes=180000-",
    ]  # fmt: skip
    assert site.requests[1].if_range == '"v1"'


async def test_the_same_command_later_goes_on_too(site: Site, tmp_path: Path) -> None:
    url = site.add("/image", BODY, drop_after=[100_000, 0, 0, 0, 0])
    with pytest.raises(DownloadFailed, match="broke off") as caught:
        await download(url, tmp_path, checksum=SUM)
    assert caught.value.hint is not None and "100000 bytes are kept" in caught.value.hint
    assert left(tmp_path) == ["meta.json", "part"]
    site.requests.clear()
    assert (await download(url, tmp_path, checksum=SUM)).read_bytes() == BODY
    assert [request.range for request in site.requests] == ["bytes=100000-"]


@pytest.mark.parametrize("validators", [{"etag": '"v2"'}, {"etag": None, "modified": "Tue, 02 Jan 2024 00:00:00 GMT"}])
async def test_a_file_that_changed_meanwhile_starts_anew(
    site: Site, tmp_path: Path, validators: dict[str, str | None]
) -> None:
    before = {"etag": '"v1"'} if validators["etag"] else {"etag": None, "modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    url = site.add("/image", OTHER, drop_after=[100_000, 0, 0, 0, 0], **before)
    with pytest.raises(DownloadFailed):
        await download(url, tmp_path)
    site.add("/image", BODY, **validators)
    site.requests.clear()
    assert (await download(url, tmp_path)).read_bytes() == BODY
    assert site.requests[0].range == "bytes=100000-"


@pytest.mark.parametrize("page", [{"etag": 'W/"v1"'}, {"etag": None}, {"ranges": False}, {"wrong_range": True}])
async def test_a_server_that_can_not_resume_starts_anew(site: Site, tmp_path: Path, page: dict[str, object]) -> None:
    url = site.add("/image", BODY, drop_after=[100_000], **page)
    assert (await download(url, tmp_path, checksum=SUM)).read_bytes() == BODY


async def test_a_new_version_under_a_range_is_noticed(site: Site, tmp_path: Path) -> None:
    """A server that ignores If-Range, but tells the new entity tag."""
    url = site.add("/image", OTHER, drop_after=[100_000, 0, 0, 0, 0])
    with pytest.raises(DownloadFailed):
        await download(url, tmp_path)
    meta = next(tmp_path.rglob("meta.json"))
    meta.write_text('{"ETag": "\\"v0\\""}')
    site.pages["/image"].body, site.pages["/image"].modified = BODY, '"v0"'  # answers If-Range: "v0" with 206
    assert (await download(url, tmp_path)).read_bytes() == BODY


async def test_a_body_without_length_arrives(site: Site, tmp_path: Path) -> None:
    url = site.add("/image", BODY, length=False)
    assert (await download(url, tmp_path)).read_bytes() == BODY


async def test_a_wrong_checksum_names_both_and_leaves_nothing(site: Site, tmp_path: Path) -> None:
    url = site.add("/image", OTHER)
    with pytest.raises(DownloadFailed) as caught:
        await download(url, tmp_path, checksum=SUM)
    assert SUM.hex in caught.value.message
    assert hashlib.sha256(OTHER).hexdigest() in caught.value.message
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "words"), [(404, "404"), (403, "403"), (401, "401"), (410, "410"), (416, "changed")]
)
async def test_what_the_server_refuses_is_said(site: Site, tmp_path: Path, status: int, words: str) -> None:
    url = site.add("/image", status=status)
    with pytest.raises(DownloadFailed, match=words) as caught:
        await download(url, tmp_path)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert status == 416 or len(site.requests) == 1


async def test_a_server_that_is_busy_is_asked_again(site: Site, tmp_path: Path) -> None:
    url = site.add("/image", BODY, fail_first=[503, 500, 429])
    assert (await download(url, tmp_path, checksum=SUM)).read_bytes() == BODY
    assert len(site.requests) == 4
    site.add("/busy", BODY, fail_first=[503] * 20)
    site.requests.clear()
    with pytest.raises(DownloadFailed, match="503"):
        await download(site.address + "/busy", tmp_path)
    assert len(site.requests) == module.ATTEMPTS


async def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/image"
        with pytest.raises(DownloadFailed, match="connection is refused"):
            await download(url, tmp_path)


async def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(DownloadFailed, match="does not answer"):
            await download(f"http://127.0.0.1:{silent.getsockname()[1]}/image", tmp_path)


async def test_a_server_that_speaks_something_else(tmp_path: Path) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"220 mail.example ready\r\n" * 3)
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(DownloadFailed):
            await download(f"http://127.0.0.1:{port}/image", tmp_path)
        with pytest.raises(DownloadFailed, match="TLS failed"):
            await download(f"https://127.0.0.1:{port}/image", tmp_path)


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "file:///etc/passwd", "http://", "http://[::1", "data:,x", "/etc/passwd"]
)
async def test_what_is_no_http_address_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidInput):
        await download(url, tmp_path)
    assert left(tmp_path) == []


# Redirects


async def test_redirects_are_followed(site: Site, tmp_path: Path) -> None:
    site.add("/real", BODY)
    site.add("/second", status=302, headers={"Location": "/real"})
    url = site.add("/first", status=301, headers={"Location": site.address + "/second"})
    assert (await download(url, tmp_path, checksum=SUM)).read_bytes() == BODY


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "unix:/run/x"])
async def test_redirects_leave_http_for_nothing(site: Site, tmp_path: Path, target: str) -> None:
    url = site.add("/image", status=302, headers={"Location": target})
    with pytest.raises(DownloadFailed, match="redirects to"):
        await download(url, tmp_path)
    assert left(tmp_path) == []


async def test_redirects_in_a_circle_end(site: Site, tmp_path: Path) -> None:
    url = site.add("/a", status=302, headers={"Location": "/b"})
    site.add("/b", status=302, headers={"Location": "/a"})
    with pytest.raises(DownloadFailed, match="in a circle"):
        await download(url, tmp_path)
    for index in range(20):
        site.add(f"/{index}", status=302, headers={"Location": f"/{index + 1}"})
    with pytest.raises(DownloadFailed, match="too often"):
        await download(site.address + "/0", tmp_path)
    assert len(site.requests) < 20


async def test_https_is_verified_and_never_left_for_http(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tls=True) as safe:
        url = safe.add("/image", BODY)
        with pytest.raises(DownloadFailed, match="certificate is not valid"):
            await download(url, tmp_path)
        authority().cert_pem.write_to_path(str(tmp_path / "authority.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        assert (await download(url, tmp_path, checksum=SUM)).read_bytes() == BODY
        plain = site.add("/image", BODY)
        down = safe.add("/down", status=302, headers={"Location": plain})
        with pytest.raises(DownloadFailed, match="from https to plain http"):
            await download(down, tmp_path)
        assert site.requests == []
        up = site.add("/up", status=302, headers={"Location": url})
        assert (await download(up, tmp_path, checksum=SUM)).read_bytes() == BODY


async def test_credentials_go_to_their_host_alone(site: Site, tmp_path: Path) -> None:
    with serving() as other:
        target = other.add("/image", BODY)
        site.add("/image", status=302, headers={"Location": target})
        url = site.address.replace("http://", "http://me:p%40ss@") + "/image?token=secret"
        await download(url, tmp_path)
        assert site.requests[0].headers["Authorization"] == "Basic bWU6cEBzcw=="
        assert "Authorization" not in other.requests[0].headers
    site.add("/image", status=403)
    with pytest.raises(DownloadFailed) as caught:
        await download(url, tmp_path)
    assert "p%40ss" not in caught.value.message
    assert "secret" not in caught.value.message


# Limits


async def test_a_file_that_is_too_large_is_not_fetched(site: Site, tmp_path: Path) -> None:
    url = site.add("/image", BODY)
    with pytest.raises(DownloadFailed, match="at most 1000"):
        await download(url, tmp_path, max_bytes=1000)
    url = site.add("/endless", BODY, length=False)
    with pytest.raises(DownloadFailed, match="larger than 100000"):
        await download(url, tmp_path, max_bytes=100_000)


async def test_a_disk_without_room_is_seen_before(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = site.add("/image", BODY)
    monkeypatch.setattr(module, "_SPARE", 1 << 60)
    with pytest.raises(StorageFull, match="MiB left"):
        await download(url, tmp_path)
    assert left(tmp_path) == []


# Several at once, and Ctrl-C


async def test_one_address_is_fetched_once_at_a_time(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_module, "TIMEOUT_S", 20.0)  # on a busy machine half a second is short
    url = site.add("/image", BODY, pause_s=0.01)
    waits: list[Step] = []
    paths = await asyncio.gather(*(download(url, tmp_path, checksum=SUM, progress=waits.append) for _ in range(4)))
    assert {path.read_bytes() for path in paths} == {BODY}
    assert len(site.requests) == 1
    assert "wait for another command that fetches this" in {step.phase for step in waits}


async def test_who_waited_for_a_download_that_was_discarded_fetches_it(site: Site, tmp_path: Path) -> None:
    url = site.add("/image", BODY)

    async def use() -> bytes:
        async with held(url, tmp_path) as file:
            data = (await file.fetch(checksum=SUM)).read_bytes()
            await asyncio.sleep(0.05)
            file.discard()
            return data

    assert set(await asyncio.gather(use(), use(), use())) == {BODY}
    assert left(tmp_path) == []


async def test_a_cancelled_download_ends_at_once_and_is_gone_on_with(site: Site, tmp_path: Path) -> None:
    url = site.add("/image", BODY, pause_s=0.05)
    arrived = asyncio.Event()

    def progress(step: Step) -> None:
        if step.phase == "download" and step.done >= 32768:
            arrived.set()

    task = asyncio.create_task(download(url, tmp_path, checksum=SUM, progress=progress))
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 2)
    assert left(tmp_path) == ["meta.json", "part"]
    site.add("/image", BODY)
    site.requests.clear()
    assert (await download(url, tmp_path, checksum=SUM)).read_bytes() == BODY
    assert site.requests[0].range is not None


async def test_ctrl_c_does_not_wait_for_a_server_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "TIMEOUT_S", 20.0)
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        url = f"http://127.0.0.1:{hanging.getsockname()[1]}/image"
        started = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(download(url, tmp_path), 0.2)
        assert asyncio.get_running_loop().time() - started < 3


# Small texts


async def test_fetch_text(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await fetch_text(site.add("/SUMS", b"abc\xff", fail_first=[503])) == "abc\ufffd"
    with pytest.raises(DownloadFailed, match="larger than 10"):
        await fetch_text(site.add("/big", b"x" * 11), limit=10)
    with pytest.raises(DownloadFailed, match="404"):
        await fetch_text(site.address + "/none")
    with pytest.raises(DownloadFailed, match="broke off"):
        await fetch_text(site.add("/cut", b"x" * 1000, drop_after=[10] * 20))


def test_the_server_of_these_tests_honours_if_range() -> None:
    """The tests above stand on it."""
    with serving() as site:
        site.add("/x", b"0123456789")
        connection = http.client.HTTPConnection(site.address.removeprefix("http://"))
        for tag, status, body in (('"v1"', 206, b"56789"), ('"v0"', 200, b"0123456789")):
            connection.request("GET", "/x", headers={"Range": "bytes=5-", "If-Range": tag})
            with connection.getresponse() as response:
                assert (response.status, response.read()) == (status, body)
        connection.close()
