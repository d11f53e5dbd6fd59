"""A host by SSH, through a real sshd, where it is odd, full, hostile or interrupted. (For the rest see tests/real.)"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polyvisor.errors import (
    ConnectionLost,
    HostKeyUnknown,
    InvalidInput,
    NotFound,
    NotPermitted,
    PolyvisorError,
    ProtocolError,
    Unavailable,
)
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.images.portable import exported_size
from polyvisor.images.store import ImageStore
from polyvisor.operation import Step
from polyvisor.remote import host as module
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.transfer import copy_image, export_image
from tests.sshd import Server, serving
from tests.unit.disks import MIB, raw_disk
from tests.unit.exported import add_direct, add_full, archive

Made = Callable[..., RemoteHost]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As the one that all share, for a user whose shell has nothing to read first, which may take long."""
    directory = tmp_path_factory.mktemp("sshd")
    with serving(directory, f"SetEnv HOME={directory}") as server:
        yield server


@pytest.fixture
def there(tmp_path: Path) -> Home:
    """The home on the host."""
    return Home(tmp_path / "there")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The home of the client, under a path that is too long for sockets: each test has connections of its own."""
    return Home(tmp_path_factory.mktemp("here") / ("client" * 10))


@pytest.fixture
def client(sshd: Server, here: Home, there: Home, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Makes a host, on the server of this module where no other is named."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)

    def make(server: Server = sshd, *, accept_new: bool = False, ask: Any = None, **changes: Any) -> RemoteHost:
        entry = dataclasses.replace(server.entry(there.path), **changes)
        return RemoteHost(entry, here, accept_new=accept_new, ask=ask)

    return make


@pytest.fixture
def server(tmp_path: Path, sshd: Server) -> Iterator[Callable[..., Server]]:
    """Starts an sshd for a user in whose environment `variables` are, and whose shell is `shell`, where that is given."""
    with contextlib.ExitStack() as stack:

        def start(shell: Path | None = None, **variables: object) -> Server:
            directory = tmp_path / "sshd"
            directory.mkdir()
            environment = {"HOME": sshd.directory, **variables}
            lines = ["SetEnv " + " ".join(f"{key}={value}" for key, value in environment.items())]
            return stack.enter_context(serving(directory, *lines, *([f"ForceCommand {shell}"] if shell else [])))

        yield start


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def failure(host: RemoteHost) -> PolyvisorError:
    """What is wrong with a host; it is told soon."""
    begun = time.monotonic()
    with pytest.raises(PolyvisorError) as caught:
        await host.names()
    assert time.monotonic() - begun < 10
    await host.close()
    assert caught.value.hint
    assert caught.value.message.isprintable()
    return caught.value


async def works(host: RemoteHost) -> None:
    assert await host.names() == []
    await host.close()


class TestLogin:
    async def test_a_question_of_ssh_is_put_to_the_user_once(self, client: Made, tmp_path: Path) -> None:
        asked = []

        def accept(argv: list[str]) -> int:
            asked.append(argv)
            return subprocess.run([argv[0], "-oStrictHostKeyChecking=accept-new", *argv[1:]], check=False).returncode

        await works(client(known_hosts=str(tmp_path / "known"), ask=accept))
        assert len(asked) == 1
        assert asked[0][-1] == "true"
        assert "BatchMode=no" in asked[0]

    @pytest.mark.parametrize("status", [0, 255])
    async def test_whose_answer_may_be_no(self, client: Made, tmp_path: Path, status: int) -> None:
        host = client(known_hosts=str(tmp_path / "known"), ask=lambda argv: status)
        assert type(await failure(host)) is HostKeyUnknown


class TestShell:
    """What the host's shell finds, or does, before there is an agent."""

    @pytest.fixture
    def programs(self, tmp_path: Path) -> Path:
        """A directory with what a host has beside Python, for its PATH."""
        directory = tmp_path / "programs"
        directory.mkdir()
        for name in ("sh", "mkdir", "head", "wc", "mv", "rm", "cat"):
            (directory / name).symlink_to(f"/bin/{name}")
        return directory

    async def test_a_newer_one_beside_it_is_taken(
        self, client: Made, server: Callable[..., Server], tmp_path: Path, programs: Path
    ) -> None:
        script(programs / "python3", "exit 1")
        script(programs / "python3.12", f'exec {shlex.quote(sys.executable)} -I "$@"')
        await works(client(server(PATH=programs, XDG_CACHE_HOME=tmp_path / "cache")))
        left = {path.suffix for path in (tmp_path / "cache" / "polyvisor").iterdir()}
        assert left == {".pyz", ""}

    async def test_an_application_that_does_not_arrive_whole_is_not_kept(
        self, client: Made, server: Callable[..., Server], tmp_path: Path, programs: Path
    ) -> None:
        script(programs / "python3", f'exec {shlex.quote(sys.executable)} -I "$@"')
        (programs / "head").unlink()
        script(programs / "head", "echo no space left >&2; exit 1")
        error = await failure(client(server(PATH=programs, XDG_CACHE_HOME=tmp_path / "cache")))
        assert isinstance(error, Unavailable)
        assert "no space left" in error.message
        assert list((tmp_path / "cache" / "polyvisor").iterdir()) == []

    @pytest.mark.parametrize("place", ["missing", "closed"])
    async def test_a_cache_that_can_not_be_written(
        self, client: Made, server: Callable[..., Server], tmp_path: Path, place: str
    ) -> None:
        cache = Path("/dev/null/x")
        if place == "closed":  # a directory where not even root can make files
            cache = tmp_path / "cache"
            cache.mkdir()
            (cache / "polyvisor").symlink_to("/sys")
        error = await failure(client(server(XDG_CACHE_HOME=cache)))
        assert type(error) is NotPermitted
        assert error.message.endswith(f": {cache}/polyvisor can't be written")

    async def test_words_of_the_hosts_shell_are_not_those_of_ssh(
        self, client: Made, server: Callable[..., Server], tmp_path: Path
    ) -> None:
        shell = script(tmp_path / "shell", "echo 'something: Permission denied' >&2; exit 3")
        error = await failure(client(server(shell)))
        assert type(error) is Unavailable
        assert error.message.endswith("): something: Permission denied")

    @pytest.mark.parametrize("noise", ["printf '\\033]0;title\\007'", "seq 150"])
    async def test_a_login_shell_that_talks_first(
        self, client: Made, server: Callable[..., Server], tmp_path: Path, noise: str
    ) -> None:
        shell = script(tmp_path / "shell", f'{noise}; exec sh -c "$SSH_ORIGINAL_COMMAND"')
        async with asyncio.timeout(20):
            await works(client(server(shell)))

    async def test_one_that_never_ends(self, client: Made, server: Callable[..., Server], tmp_path: Path) -> None:
        shell = script(tmp_path / "shell", "while echo noise; do :; done")
        error = await failure(client(server(shell)))
        assert type(error) is ProtocolError
        assert "prints too much" in error.message

    async def test_a_home_there_that_is_none(self, client: Made) -> None:
        host = client(home="/dev/null/x")
        with pytest.raises(PolyvisorError, match="/dev/null"):
            await host.image_remove("x")
        await host.close()

    async def test_a_home_that_its_shell_would_misread(self, client: Made) -> None:
        assert type(await failure(client(home="/tmp/$(reboot)"))) is InvalidInput


class TestCalls:
    async def test_errors_arrive_as_they_were(self, client: Made, there: Home) -> None:
        host = client()
        for act in (host.show("nope"), host.kill("nope"), host.image_show("nope")):
            with pytest.raises(NotFound, match="'nope'"):
                await act
        with pytest.raises(InvalidInput) as caught:
            await host.show("../x")
        assert caught.value.field == "name"
        await host.close()
        assert there.path.is_dir(), "it was the host that said so"

    async def test_after_its_end_it_is_opened_anew(self, client: Made) -> None:
        host = client()
        for _ in range(2):
            await works(host)

    async def test_one_that_is_cancelled_is_cancelled_on_the_host(self, client: Made) -> None:
        asked, hung_up = asyncio.Event(), asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            asked.set()
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(bytes(MIB))
                    await writer.drain()
                    await asyncio.sleep(0.05)
            hung_up.set()
            writer.close()

        site = await asyncio.start_server(slow, "127.0.0.1", 0)
        host = client()
        address = f"http://127.0.0.1:{site.sockets[0].getsockname()[1]}/x"
        call = asyncio.ensure_future(host.image_import(address, name="x"))
        async with asyncio.timeout(20):
            await asked.wait()
            assert not call.done()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await hung_up.wait()
        await works(host)
        site.close()
        await site.wait_closed()

    async def test_nor_does_it_go_on_where_the_connection_breaks_just_then(self, client: Made) -> None:
        host = client()
        connection = await host.connect()
        call = asyncio.ensure_future(host.wait_for_ssh("nope", timeout_s=60))
        connection._reading.add_done_callback(lambda _: call.cancel())
        await asyncio.sleep(0)
        connection._process.kill()
        with pytest.raises(asyncio.CancelledError):
            await call
        await host.close()


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


class TestUploads:
    async def test_a_local_file_is_imported_there(self, client: Made, there: Home, tmp_path: Path) -> None:
        host = client()
        steps: list[Step] = []
        disk = raw_disk(tmp_path / "my disk.raw")
        image = await host.image_import(str(disk), name="mine", progress=steps.append, memory_mib=128)
        assert [stored.image for stored in await Host(there).image_list()] == [image]
        assert (image.name, image.memory_mib) == ("mine", 128)
        uploading = [step for step in steps if step.phase == "uploading"]
        assert uploading[-1].done == uploading[-1].total == disk.stat().st_size
        assert files(there.cache / "uploads") == []
        assert await host.image_import(f"file://{tmp_path}/my%20disk.raw", name="again")
        await host.close()

    @pytest.mark.parametrize(
        ("source", "kind"),
        [
            ("/nowhere/disk.raw", NotFound),
            ("/", InvalidInput),
            ("/dev/zero", InvalidInput),
            ("", InvalidInput),
            ("a\0b", InvalidInput),
            ("ftp://h/x", InvalidInput),
            ("file://elsewhere/x", InvalidInput),
        ],
    )
    async def test_what_can_not_be_carried_there_is_told_as_here(
        self, client: Made, there: Home, source: str, kind: type[PolyvisorError]
    ) -> None:
        host = client()
        for api in (host, Host(there)):
            with pytest.raises(kind):
                await api.image_import(source, name="x")
        await host.close()

    async def test_one_that_breaks_off_leaves_nothing(self, client: Made, there: Home) -> None:
        host = client()
        uploads = there.cache / "uploads"
        stream = await host._opened("upload", name="x.raw", size=64 * MIB)
        stream.writer.write(os.urandom(8 * MIB))
        await stream.writer.drain()
        await until(lambda: files(uploads) and files(uploads)[0].stat().st_size > 0)
        await host.close()
        await until(lambda: not list(uploads.iterdir()))

    async def test_one_whose_connection_breaks_is_begun_again(self, client: Made, there: Home, tmp_path: Path) -> None:
        host = client()
        steps: list[Step] = []

        def cut(step: Step) -> None:
            if step.phase == "uploading" and not steps:
                for stream in host._streams:
                    stream.process.kill()
            steps.append(step)

        image = await host.image_import(str(raw_disk(tmp_path / "disk.raw", mib=16)), name="mine", progress=cut)
        assert "reconnecting" in {step.phase for step in steps}
        assert [stored.image for stored in await host.image_list()] == [image]
        await host.close()
        await until(lambda: not files(there.cache / "uploads"))

    async def test_one_that_the_host_can_not_take_is_told_at_once(
        self, client: Made, server: Callable[..., Server], there: Home, tmp_path: Path
    ) -> None:
        # A file of the host must not be larger than this: as good as a full disk.
        shell = script(tmp_path / "shell", 'ulimit -f 8192; exec sh -c "$SSH_ORIGINAL_COMMAND"')
        host = client(server(shell))
        steps: list[Step] = []
        async with asyncio.timeout(20):
            with pytest.raises(PolyvisorError, match="receiving the upload") as caught:
                await host.image_import(str(raw_disk(tmp_path / "disk.raw", mib=64)), name="x", progress=steps.append)
        assert not isinstance(caught.value, ConnectionLost)
        assert "reconnecting" not in {step.phase for step in steps}
        assert files(there.cache / "uploads") == []
        await host.close()


class TestImages:
    """From one host to another, and into files."""

    async def test_an_image_is_sent_once_and_as_it_is_read(self, client: Made, there: Home, tmp_path: Path) -> None:
        source, host = Host(tmp_path / "source"), client()
        image = add_full(source.images.store, tmp_path)
        steps: list[Step] = []
        copied = await copy_image(source, "full", host, steps.append)
        assert copied.same_as(image)
        assert [stored.image for stored in await Host(there).image_list()] == [copied]
        size = exported_size(image)
        assert [step for step in steps if step.phase == "uploading"][-1] == Step("uploading", size, size, "B")
        assert files(there.cache / "uploads") == []
        assert files(source.home.cache) == []
        steps.clear()
        assert await copy_image(source, "full", host, steps.append) == copied
        assert steps == []
        await host.close()

    async def test_one_whose_connection_breaks_is_begun_again(self, client: Made, there: Home, tmp_path: Path) -> None:
        source, host = Host(tmp_path / "source"), client()
        image = add_direct(source.images.store, kernel=os.urandom(16 * MIB))
        steps: list[Step] = []

        def cut(step: Step) -> None:
            if step.phase == "uploading" and not steps:
                for stream in host._streams:
                    stream.process.kill()
            steps.append(step)

        assert (await copy_image(source, "direct", host, cut)).same_as(image)
        assert "reconnecting" in {step.phase for step in steps}
        await host.close()
        await until(lambda: not files(there.cache / "uploads"))

    async def test_they_come_here_from_there_and_go_from_there_elsewhere(
        self, client: Made, there: Home, tmp_path: Path
    ) -> None:
        store = ImageStore(there.images)
        image = add_direct(store)
        host, third = client(), client(home=str(tmp_path / "third"))
        assert await export_image(host, "direct", tmp_path / "x.tar") == image
        assert (tmp_path / "x.tar").read_bytes() == archive(store, image)
        assert (await copy_image(host, "direct", third)).same_as(image)
        assert (await copy_image(host, "direct", Host(tmp_path / "home"))).same_as(image)
        # And from a file of this machine: its own name, or another.
        assert (await third.image_import(str(tmp_path / "x.tar"))).same_as(image)
        assert (await third.image_import(str(tmp_path / "x.tar"), name="other")).name == "other"
        with pytest.raises(NotFound):
            await export_image(host, "nothing", tmp_path / "y.tar")
        assert not (tmp_path / "y.tar").exists()
        for api in (host, third):
            await api.close()

    async def test_one_that_breaks_off_on_its_way_here_leaves_nothing(
        self, client: Made, there: Home, tmp_path: Path
    ) -> None:
        add_direct(ImageStore(there.images), kernel=os.urandom(16 * MIB))
        host = client()

        def cut(step: Step) -> None:
            for stream in host._streams:
                stream.process.kill()

        (tmp_path / "out").mkdir()
        with pytest.raises(ConnectionLost):
            await export_image(host, "direct", tmp_path / "out" / "x.tar", cut)
        assert files(tmp_path / "out") == []
        await host.close()

    async def test_what_would_be_refused_there_is_not_sent(self, client: Made, tmp_path: Path) -> None:
        host = client(url="ssh://nobody@127.0.0.1:1")
        store = ImageStore(tmp_path / "source")
        (tmp_path / "x.tar").write_bytes(archive(store, add_direct(store)))
        with pytest.raises(InvalidInput, match="describes itself"):
            await host.image_import(str(tmp_path / "x.tar"), user="root")
        with pytest.raises(InvalidInput, match="no name of its own"):
            await host.image_import(str(raw_disk(tmp_path / "disk.raw")))


# A host that greets as it should and then answers every call with what it was told to.
HOSTILE = """\
import sys
print('{"jsonrpc": "2.0", "method": "hello", "params": {}}', flush=True)
for line in sys.stdin:
    print(open(sys.argv[1]).read(), flush=True)
"""


class TestHostile:
    """Whatever a host sends, what comes of it is an error of ours."""

    @pytest.fixture
    def say(
        self, client: Made, server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[str], Awaitable[PolyvisorError]]:
        monkeypatch.setattr(module, "RECONNECT_S", 0.0)
        (tmp_path / "hostile.py").write_text(HOSTILE)
        words = tmp_path / "words"
        shell = script(tmp_path / "shell", f"exec {shlex.quote(sys.executable)} -I {tmp_path}/hostile.py {words}")
        host = client(server(shell))

        async def say(text: str) -> PolyvisorError:
            words.write_text(text)
            with pytest.raises(PolyvisorError) as caught:
                await host.start("a")
            await host.close()
            return caught.value

        return say

    @pytest.mark.parametrize(
        ("members", "kind"),
        [
            ('"result": 5', ProtocolError),
            ('"result": {"name": "a"}', ProtocolError),
            ('"result": null', ProtocolError),
            ('"error": 5', ProtocolError),
            ('"error": {"code": 1, "message": "no"}', ProtocolError),
            ('"error": {"data": {"code": "not-found", "message": 5}}', NotFound),
            (f'"result": {"[" * 900}{"]" * 900}', PolyvisorError),
        ],
    )
    async def test_answers(
        self, say: Callable[[str], Awaitable[PolyvisorError]], members: str, kind: type[PolyvisorError]
    ) -> None:
        assert isinstance(await say(f'{{"jsonrpc": "2.0", "id": 1, {members}}}'), kind)

    @pytest.mark.parametrize(
        "line",
        [
            "nonsense",
            '{"jsonrpc": "2.0", "method": "progress", "params": {"id": 1, "step": 5}}',
            '{"jsonrpc": "2.0", "method": "progress", "params": {"id": [1]}}\nnonsense',
            '{"jsonrpc": "2.0", "method": "progress", "params": 5}\n{"jsonrpc": "2.0", "id": [1]}\nnonsense',
        ],
    )
    async def test_what_is_not_understood_is_a_lost_connection(
        self, say: Callable[[str], Awaitable[PolyvisorError]], line: str
    ) -> None:
        assert type(await say(line)) is ConnectionLost

    @pytest.mark.parametrize("hello", ['{"jsonrpc"', '{"jsonrpc": "1.0"}', '{"jsonrpc": 5'])
    async def test_greetings(self, client: Made, server: Callable[..., Server], tmp_path: Path, hello: str) -> None:
        shell = script(tmp_path / "shell", f"echo {shlex.quote(hello)}; exec cat")
        host = client(server(shell))
        for act in (host.names(), anext(host.log("a"))):
            with pytest.raises(ProtocolError):
                await act
        await host.close()
