"""Commands for OpenSSH that lead to hosts: that it reads them as they are meant, and what its last words mean."""

import asyncio
import shlex
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polyvisor.errors import (
    HostKeyChanged,
    HostKeyUnknown,
    InvalidInput,
    LoginRefused,
    PolyvisorError,
    TimedOut,
    Unavailable,
)
from polyvisor.process import run
from polyvisor.remote.address import Entry
from polyvisor.remote.connection import command
from polyvisor.remote.link import Link, explained, shared_directory
from tests.sshd import free_port

AWKWARD = "/srv/a b/c\"d\\e/%h%%i/f,g#h'i"
ENTRY = Entry(name="lab", url="ssh://alice@lab.example:2222", added_at=0.0)


def understood(argv: list[str]) -> dict[str, str]:
    """The settings that OpenSSH takes from a command (ssh -G prints them and connects to nothing)."""
    out = subprocess.run(
        [argv[0], "-F", "none", "-G", *argv[1:]], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    ).stdout
    return dict(line.split(" ", 1) for line in out.splitlines() if " " in line)


def entry(url: str = ENTRY.url, **more: str) -> Entry:
    return Entry(name="lab", url=url, added_at=0.0, **more)


class TestCommand:
    def test_what_openssh_takes_from_it(self) -> None:
        settings = understood(Link(ENTRY, None).argv("true"))
        assert (settings["user"], settings["hostname"], settings["port"]) == ("alice", "lab.example", "2222")
        assert settings["batchmode"] == "yes"
        assert settings["forwardagent"] == settings["forwardx11"] == "no"
        assert settings["clearallforwardings"] == "yes"
        assert settings["requesttty"] == "false"
        assert settings["stricthostkeychecking"] == "ask"
        assert settings["controlmaster"] == "false"

    def test_what_an_address_leaves_out_is_left_to_its_configuration(self, tmp_path: Path) -> None:
        config = tmp_path / "config"
        config.write_text("Host lab\nHostName 192.0.2.1\nUser bob\nPort 2200\n")
        argv = Link(entry("ssh://lab"), None).argv("true")
        argv[1:1] = ["-G", "-F", str(config)]
        out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        assert {"hostname 192.0.2.1", "user bob", "port 2200"} < set(out.splitlines())

    def test_only_on_a_terminal_it_asks(self) -> None:
        assert understood(Link(ENTRY, None).argv("true", interactive=True))["batchmode"] == "no"

    def test_a_new_key_is_taken_where_it_shall_be(self) -> None:
        settings = understood(Link(ENTRY, None, accept_new=True).argv("true"))
        assert settings["stricthostkeychecking"] == "accept-new"

    @pytest.mark.parametrize("address", ["::1", "fe80::1%eth0"])
    def test_ipv6(self, address: str) -> None:
        argv = Link(entry(f"ssh://alice@[{address}]:22"), None).argv("true")
        assert understood(argv)["hostname"] == address

    @pytest.mark.parametrize("url", ["-oProxyCommand=x", "alice@-oProxyCommand=x", "ssh://-v", "-v"])
    def test_an_address_is_never_an_option(self, url: str) -> None:
        for act in (Link(entry(url), None).argv, lambda c, url=url: Link(entry(url), None).tunnel(c, 22)):
            with pytest.raises(InvalidInput):
                act("true")

    @pytest.mark.parametrize("words", ["-V", "-oProxyCommand=x", "-G"])
    def test_nor_is_what_the_host_shall_run(self, words: str) -> None:
        argv = Link(ENTRY, None).argv(words)
        assert argv[-3:] == ["--", "alice@lab.example", words]
        assert "proxycommand" not in understood(argv)

    @pytest.mark.parametrize("path", [AWKWARD, "/home/alice/.ssh/id", '/a"b', "/a\\b", "/a\tb"])
    def test_paths_are_read_as_they_are(self, path: str) -> None:
        link = Link(entry(identity=path, known_hosts=f"{path}.known"), Path("/run"))
        settings = understood(link.argv("true"))
        # OpenSSH prints %% in one of them as it stands, and expands it where it opens the file.
        assert settings["identityfile"] == path.replace("%", "%%")
        assert settings["identitiesonly"] == "yes"
        assert settings["userknownhostsfile"] == f"{path}.known"
        assert settings["controlmaster"] == "auto"

    def test_shared_connections_have_a_socket_each(self, tmp_path: Path) -> None:
        shared = tmp_path / 'a"b%c'
        paths = [
            understood(Link(entry(url), shared).argv("true"))["controlpath"]
            for url in ("ssh://a@lab", "ssh://b@lab", "ssh://a@lab:2222")
        ]
        assert {str(Path(path).parent) for path in paths} == {str(shared)}
        assert len(set(paths)) == 3

    def test_a_tunnel_is_one_line_for_a_shell(self) -> None:
        link = Link(entry(identity=AWKWARD), None)
        line = link.tunnel("127.0.0.1", 40001)
        argv = shlex.split(line.replace("%%", "%"))
        assert argv[-4:] == ["-W", "[127.0.0.1]:40001", "--", "alice@lab.example"]
        assert argv[:-4] == link.argv("true")[:-4]

    async def test_what_the_hosts_shell_runs_is_one_line_in_single_quotes(self, tmp_path: Path) -> None:
        (tmp_path / "polyvisor-0.pyz").write_bytes(b"x")
        line = command(tmp_path / "polyvisor-0.pyz", "/srv/my vms", "serve")
        assert line.count("'") == 2
        assert "\n" not in line
        script = shlex.split(line)[-1]
        await run(["sh", "-n", "-c", script])
        assert 'export POLYVISOR_HOME="/srv/my vms"' in script

    @pytest.mark.parametrize("home", ["/a'b", '/a"b', "/a$b", "/a`b", "/a\\b", "/a!b", "/a\nb"])
    def test_homes_that_a_shell_would_misread(self, tmp_path: Path, home: str) -> None:
        (tmp_path / "x").touch()
        with pytest.raises(InvalidInput, match="a shell would take"):
            command(tmp_path / "x", home, "serve")


CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Host key for [lab.example]:2222 has changed and you have requested strict checking.
Host key verification failed.
"""


@pytest.mark.parametrize(
    ("stderr", "kind", "says"),
    [
        ("ssh: Could not resolve hostname lab: Name or service not known\n", Unavailable, "its name is not known"),
        ("ssh: connect to host lab port 22: Connection refused\n", Unavailable, "nothing answers at its SSH port"),
        ("ssh: connect to host lab port 22: Connection timed out\n", TimedOut, "it does not answer"),
        (
            "Connection timed out during banner exchange\nConnection to 192.0.2.1 port 22 timed out\n",
            TimedOut,
            "it does not answer",
        ),
        ("ssh: connect to host lab port 22: No route to host\n", Unavailable, "there is no route to it"),
        ("ssh: connect to host lab port 22: Network is unreachable\n", Unavailable, "there is no route to it"),
        (CHANGED, HostKeyChanged, "its host key is not the one it had before"),
        (
            "No ED25519 host key is known for lab and you have requested strict checking.\nHost key verification failed.\n",
            HostKeyUnknown,
            "its host key is not known here",
        ),
        ("Host key verification failed.\n", HostKeyUnknown, "its host key is not known here"),
        ("alice@lab: Permission denied (publickey,password).\n", LoginRefused, "it refuses the login"),
        (
            "Received disconnect from 192.0.2.1 port 22:2: Too many authentication failures\nDisconnected from …\n",
            LoginRefused,
            "too many keys",
        ),
        ("Timeout, server lab not responding.\n", TimedOut, "it has stopped answering"),
        (
            "kex_exchange_identification: read: Connection reset by peer\nConnection reset by 192.0.2.1 port 22\n",
            Unavailable,
            "it broke the connection off",
        ),
        (
            "kex_exchange_identification: Connection closed by remote host\nConnection closed by 192.0.2.1 port 22\n",
            Unavailable,
            "it closed the connection",
        ),
        (
            "kex_exchange_identification: banner line contains invalid characters\n"
            "banner exchange: Connection to 192.0.2.1 port 22: invalid format\n",
            Unavailable,
            "what answers there is not SSH",
        ),
        ("something\nnew under the sun\n\n", Unavailable, "new under the sun"),
        ("", Unavailable, "ssh ended without a word"),
    ],
)
def test_last_words_of_openssh(stderr: str, kind: type[PolyvisorError], says: str) -> None:
    error = explained(ENTRY, stderr)
    assert type(error) is kind
    assert error.message.startswith("host 'lab' (ssh://alice@lab.example:2222): ")
    assert says in error.message
    assert error.message.isprintable()
    assert error.hint
    assert "{" not in error.hint


def test_remedies_name_the_host_as_openssh_does() -> None:
    assert "ssh-keygen -R '[lab.example]:2222'" in (explained(ENTRY, CHANGED).hint or "")
    assert "ssh -p 2222 alice@lab.example true" in (explained(ENTRY, "Permission denied").hint or "")
    for url in ("ssh://lab", "ssh://lab:22"):
        assert (explained(entry(url), CHANGED).hint or "").endswith("ssh-keygen -R lab")
    assert (explained(entry("ssh://lab"), "Permission denied").hint or "").endswith("ssh lab true")


def _reset(client: socket.socket) -> None:
    client.recv(1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _refuse(client: socket.socket) -> None:
    client.sendall(b"\x00\x01 what?\r\n")
    client.recv(1000)
    time.sleep(0.2)


class TestWhatAnswersIsNotSSH:
    """The words are those of the OpenSSH that is installed."""

    def said(self, act: Callable[[socket.socket], object] | None) -> PolyvisorError:
        """The error of a login at a port where a connection meets `act`."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]

            def serve() -> None:
                client, _ = listening.accept()
                with client:
                    act(client) if act else None

            if act:
                listening.listen()
                threading.Thread(target=serve, daemon=True).start()
            here = entry(f"ssh://127.0.0.1:{port}")
            done = asyncio.run(run(Link(here, None).argv("true"), check=False))
        assert done.status == 255
        return explained(here, done.stderr)

    @pytest.mark.parametrize(
        ("act", "says"),
        [
            (None, "nothing answers"),
            (_reset, "it broke the connection off"),
            (_refuse, "is not SSH"),
            (lambda client: client.recv(100), "it closed the connection"),
        ],
    )
    def test_it_is_unavailable(self, act: Callable[[socket.socket], object] | None, says: str) -> None:
        error = self.said(act)
        assert type(error) is Unavailable
        assert says in error.message


class TestSharedDirectory:
    @pytest.fixture(autouse=True)
    def no_runtime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)

    @pytest.fixture
    def short(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A directory whose path is short enough for sockets in it: relative ones are the shortest."""
        monkeypatch.chdir(tmp_path_factory.mktemp("short"))
        return Path()

    def test_it_is_for_this_user_alone(self, short: Path) -> None:
        shared = shared_directory(short)
        assert shared == short / "run"
        assert shared.stat().st_mode & 0o777 == 0o700
        assert shared_directory(short) == shared

    @pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770])
    def test_one_that_others_can_enter_is_not_used(self, short: Path, mode: int) -> None:
        (short / "run").mkdir()
        (short / "run").chmod(mode)
        assert shared_directory(short) is None

    def test_one_whose_path_is_too_long_for_a_socket_is_not_used(self, short: Path) -> None:
        longest = short / ("x" * 37)
        longest.mkdir()
        assert shared_directory(longest) == longest / "run"
        longer = short / ("x" * 38)
        longer.mkdir()
        assert shared_directory(longer) is None
        assert not (longer / "run").exists()

    def test_the_one_of_the_session_comes_first(self, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (short / "session").mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", "session")
        assert shared_directory(short) == Path("session/polyvisor")
        monkeypatch.setenv("XDG_RUNTIME_DIR", "nowhere")
        assert shared_directory(short) == Path("run")

    def test_one_with_a_blank_is_not_used(self, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (short / "a b").mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", "a b")
        assert shared_directory(short) == Path("run")

    def test_a_file_is_none(self, short: Path) -> None:
        (short / "run").touch()
        assert shared_directory(short) is None


def test_nothing_that_listens_is_told_at_once() -> None:
    here = entry(f"ssh://127.0.0.1:{free_port()}")
    begun = time.monotonic()
    done = asyncio.run(run(Link(here, None).argv("true"), check=False))
    assert "Connection refused" in done.stderr
    assert time.monotonic() - begun < 3
