"""Other hosts by a real SSH server on loopback: all that can be wrong with one, and what is said of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.errors import (
    HostKeyChanged,
    HostKeyUnknown,
    LoginRefused,
    NotFound,
    NotPermitted,
    PolyvisorError,
    Unavailable,
)
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.host.store import VMStore
from polyvisor.images.image import Image
from polyvisor.process import run
from polyvisor.remote.address import Entry
from polyvisor.remote.connection import Connection
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.transfer import copy_image
from polyvisor.spec.vm import VMSpec
from polyvisor.ssh import execute
from tests.sshd import Server, free_port, serving


@pytest.fixture
def client(tmp_path: Path) -> Home:
    return Home(tmp_path / "client")


@pytest.fixture
def entry(sshd: Server, empty_home: Home) -> Entry:
    return sshd.entry(empty_home.path)


async def names_on(entry: Entry, client: Home, *, accept_new: bool = False) -> list[str]:
    host = RemoteHost(entry, client, accept_new=accept_new)
    try:
        return await host.names()
    finally:
        await host.close()


async def test_an_unknown_key_is_refused_until_somebody_accepts_it(entry: Entry, client: Home, tmp_path: Path) -> None:
    entry = replace(entry, known_hosts=str(tmp_path / "known_hosts"))
    with pytest.raises(HostKeyUnknown):
        await names_on(entry, client)
    assert await names_on(entry, client, accept_new=True) == []
    assert await names_on(entry, client) == []


async def test_a_changed_key_is_refused_even_by_who_accepts_new_ones(
    entry: Entry, client: Home, tmp_path: Path, sshd: Server
) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    key = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{sshd.port} {key}\n")
    with pytest.raises(HostKeyChanged) as raised:
        await names_on(replace(entry, known_hosts=str(tmp_path / "known_hosts")), client, accept_new=True)
    assert f"ssh-keygen -f {tmp_path}/known_hosts -R '[127.0.0.1]:{sshd.port}'" in str(raised.value.hint)


async def test_a_wrong_key_is_not_let_in(entry: Entry, client: Home, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    with pytest.raises(LoginRefused):
        await names_on(replace(entry, identity=str(tmp_path / "other")), client)


async def test_where_nothing_listens_it_is_said_at_once(entry: Entry, client: Home) -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="nothing answers"):
        await names_on(replace(entry, url=f"ssh://root@127.0.0.1:{free_port()}"), client)
    assert time.monotonic() - began < 10


@pytest.fixture
def poor(tmp_path: Path) -> Iterator[Server]:
    """A server whose users find in PATH what is in `poor/bin` alone, and whose shell says hello first."""
    (tmp_path / "poor" / "bin").mkdir(parents=True)
    for program in ("sh", "mkdir", "head", "wc", "mv", "rm", "echo", "cat"):
        (tmp_path / "poor" / "bin" / program).symlink_to(f"/bin/{program}")
    command = f'echo Welcome; echo; PATH={tmp_path}/poor/bin; export PATH; eval "$SSH_ORIGINAL_COMMAND"'
    with serving(tmp_path / "poor", f"ForceCommand {command}\n") as server:
        yield server


async def test_a_host_without_python(poor: Server, client: Home, empty_home: Home) -> None:
    with pytest.raises(Unavailable, match="there is no Python") as raised:
        await names_on(poor.entry(empty_home.path), client)
    assert "apt-get install python3" in str(raised.value.hint)


async def test_a_host_whose_python_is_too_old(poor: Server, client: Home, empty_home: Home) -> None:
    python = poor.directory / "bin" / "python3"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    python.chmod(0o755)
    with pytest.raises(Unavailable, match=r"Python 3\.9\.2 is too old"):
        await names_on(poor.entry(empty_home.path), client)


async def test_a_talkative_shell_does_no_harm(poor: Server, client: Home, empty_home: Home) -> None:
    (poor.directory / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
    assert await names_on(poor.entry(empty_home.path), client) == []


async def test_a_cache_that_cannot_be_written(tmp_path: Path, client: Home, empty_home: Home) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "file").touch()
    with (
        serving(tmp_path / "server", f"SetEnv XDG_CACHE_HOME={tmp_path}/file\n") as server,
        pytest.raises(NotPermitted, match="can't be written"),
    ):
        await names_on(server.entry(empty_home.path), client)


async def test_the_application_is_carried_there_once(tmp_path: Path, client: Home, empty_home: Home) -> None:
    (tmp_path / "server").mkdir()
    cache = tmp_path / "their cache"
    with serving(tmp_path / "server", f'SetEnv "XDG_CACHE_HOME={cache}"\n') as server:
        for _ in range(2):
            await names_on(server.entry(empty_home.path), client)
    [application] = (cache / "polyvisor").glob("*.pyz")
    assert sorted(p.name for p in (cache / "polyvisor").iterdir()) == sorted([application.stem, application.name])


async def test_an_agent_answers_whatever_it_is_told(entry: Entry, client: Home) -> None:
    """JSON-RPC 2.0, section 5.1: what can't be understood has an answer too, and the next call is as good as ever."""
    host = RemoteHost(entry, client)
    connection = await host.connect()
    with pytest.raises(PolyvisorError, match="no method"):
        await connection.call("reveal", {})
    with pytest.raises(PolyvisorError, match="key"):
        await connection.call("kill", {"name": "a"}, key="../../x")
    with pytest.raises(NotFound):
        await host.show("nobody")
    assert connection._process.stdin is not None
    connection._process.stdin.write(b'no JSON\n[]\n{"jsonrpc": "2.0"}\n')
    assert await host.names() == []
    assert await host.connect() is connection
    await host.close()


async def test_many_calls_share_one_connection(entry: Entry, client: Home) -> None:
    host = RemoteHost(entry, client)
    assert await asyncio.gather(*(host.names() for _ in range(20))) == [[]] * 20
    await host.close()


def test_each_event_loop_has_a_connection_of_its_own(entry: Entry, client: Home) -> None:
    host = RemoteHost(entry, client)

    async def ask() -> Connection:
        try:
            assert await host.names() == []
            return await host.connect()
        finally:
            await host.close()

    assert asyncio.run(ask()) is not asyncio.run(ask())


async def test_whoever_cancels_a_call_cancels_it_on_the_host(home: Home, sshd: Server, client: Home) -> None:
    """As with Ctrl-C: another command holds the VM, the call waits for it, and is given up for good."""
    host = RemoteHost(sshd.entry(home.path), client)
    await host.connect()
    async with VMStore(home).locked("vm", "test"):
        call = asyncio.ensure_future(host.create(VMSpec(name="vm", image="tiny")))
        await asyncio.sleep(0.5)
        assert not call.done()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await asyncio.sleep(0.5)
    assert await host.names() == []
    await host.close()


async def test_a_file_of_this_machine_is_imported_there(entry: Entry, client: Home, tmp_path: Path) -> None:
    host = RemoteHost(entry, client)
    await run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "my disk.qcow2"), "1M"])
    image = await host.image_import(str(tmp_path / "my disk.qcow2"), name="mine", user="root")
    assert [stored.image for stored in await host.image_list()] == [image]
    assert entry.home is not None
    assert list(Path(entry.home, "cache", "uploads").iterdir()) == []
    with pytest.raises(PolyvisorError, match="nowhere"):
        await host.image_import(str(tmp_path / "nowhere.qcow2"), name="other")
    connection = await host.connect()
    with pytest.raises(NotFound, match="no such upload"):
        key = "00000000-0000-0000-0000-000000000001"
        await connection.call("image_import", {"source": "/etc/passwd", "name": "x"}, key=key)
    await host.close()


async def test_an_image_that_was_copied_there_runs_there(
    host: Host, entry: Entry, client: Home, tiny: Image, tmp_path: Path
) -> None:
    """From this machine's store to the host's, which has none: it is the same image, and a guest boots from it."""
    there = RemoteHost(entry, client)
    try:
        copied = await copy_image(host, "tiny", there)
        assert copied.same_as(tiny)
        assert copied.id == tiny.id
        await there.run(VMSpec(name="copied", image="tiny"))
        done = await execute(there, "copied", ["cat", "/etc/hostname"])
        assert done.stdout.strip() == "copied"
        await there.remove("copied", force=True)
    finally:
        await there.close()


def test_images_by_the_command_line(sshd: Server, home: Home, empty_home: Home, tiny: Image, tmp_path: Path) -> None:
    environment = {**os.environ, "POLYVISOR_HOME": str(tmp_path / "client")}
    environment.pop("POLYVISOR_HOST", None)

    def polyvisor(*words: str) -> str:
        argv = [str(Path(sys.executable).with_name("polyvisor")), *words]
        done = subprocess.run(
            argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    login = ["--identity", str(sshd.identity), "--known-hosts", str(sshd.known_hosts)]
    url = sshd.entry().url
    polyvisor("host", "add", "one", url, *login, "--home", str(home.path))
    polyvisor("host", "add", "two", url, *login, "--home", str(tmp_path / "two"))
    assert "tiny.polyvisor.tar" in polyvisor("--host", "one", "image", "export", "tiny")
    taken = json.loads(polyvisor("image", "import", "tiny.polyvisor.tar", "--json"))
    assert taken["id"] == tiny.id
    said = polyvisor("--host", "one", "image", "copy", "tiny", "--to", "two")
    assert said == f"image tiny ({tiny.id}) is on two: polyvisor --host two run tiny\n"
    copied = json.loads(polyvisor("image", "copy", "tiny", "--to", "two", "--name", "again", "--json"))
    assert copied["name"] == "again"
    listed = json.loads(polyvisor("--host", "two", "image", "ls", "--json"))
    assert [image["name"] for image in listed] == ["again", "tiny"]


def test_the_command_line(sshd: Server, empty_home: Home, tmp_path: Path) -> None:
    """Add a host, use it, forget it."""
    environment = {**os.environ, "POLYVISOR_HOME": str(tmp_path / "client")}
    environment.pop("POLYVISOR_HOST", None)

    def polyvisor(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        argv = [str(Path(sys.executable).with_name("polyvisor")), *words]
        return subprocess.run(
            argv, env={**environment, **more}, capture_output=True, text=True, check=False, timeout=60
        )

    login = ["--identity", str(sshd.identity), "--known-hosts", str(sshd.known_hosts), "--home", str(empty_home.path)]
    url = sshd.entry().url
    assert "no hosts but this machine" in polyvisor("host", "ls").stderr
    added = polyvisor("host", "add", "loop", url, *login)
    assert (added.returncode, added.stderr) == (0, "")
    assert polyvisor("host", "add", "loop", url, *login).returncode == 0, "what is there already stays"
    assert polyvisor("host", "add", "loop", "ssh://other").returncode == 4
    [listed] = json.loads(polyvisor("host", "ls", "--json").stdout)
    assert (listed["name"], listed["error"]) == ("loop", None)
    for words, more in (
        (("--host", "loop", "host"), {}),
        (("host", "show", "loop"), {}),
        (("host",), {"POLYVISOR_HOST": "loop"}),
    ):
        shown = polyvisor(*words, **more)
        assert str(empty_home.path) in shown.stdout, shown
    assert "python" in polyvisor("host", "check", "loop").stdout
    assert json.loads(polyvisor("--host", "loop", "ls", "--json").stdout) == []
    missing = polyvisor("--host", "loop", "stop", "nobody")
    assert (missing.returncode, missing.stderr.count("\n")) == (3, 1)
    assert polyvisor("--host", "nowhere", "ls").returncode == 3
    refused = polyvisor("host", "add", "away", f"ssh://root@127.0.0.1:{free_port()}")
    assert (refused.returncode, refused.stderr.count("\n")) == (8, 1)
    assert polyvisor("host", "rm", "loop").returncode == 0
    assert polyvisor("host", "rm", "loop").returncode == 3
