"""Commands for OpenSSH: what is in them, and that OpenSSH reads them as they are meant."""

import subprocess
from pathlib import Path

import pytest

from polyvisor.errors import InvalidInput
from polyvisor.host.api import SSHTarget
from polyvisor.ssh import guest_named, scp_argv, ssh_argv

AWKWARD = Path('/srv/a b/c"d\\e/%h%%i/f,g')


def target(directory: Path = Path("/home/x"), user: str = "debian") -> SSHTarget:
    return SSHTarget(
        address="127.0.0.1",
        port=40001,
        user=user,
        identity=directory / "id",
        known_hosts=directory / "known_hosts",
        alias="web-1",
    )


def understood(argv: list[str]) -> dict[str, str]:
    """The settings that OpenSSH takes from a command (ssh -G prints them and connects to nothing)."""
    out = subprocess.run([argv[0], "-G", *argv[1:]], capture_output=True, text=True, check=True).stdout
    return dict(line.split(" ", 1) for line in out.splitlines() if " " in line)


def test_a_login_uses_what_polyvisor_knows_and_nothing_of_the_user() -> None:
    settings = understood(ssh_argv(target()))
    assert settings["user"] == "debian"
    assert settings["hostname"] == "127.0.0.1"
    assert settings["port"] == "40001"
    assert settings["identityfile"] == "/home/x/id"
    assert settings["identitiesonly"] == "yes"
    assert settings["userknownhostsfile"] == "/home/x/known_hosts"
    assert settings["hostkeyalias"] == "web-1"


def test_awkward_paths_are_read_as_they_are() -> None:
    settings = understood(ssh_argv(target(AWKWARD)))
    # OpenSSH prints %% as it stands for one, and expands it where it opens the file.
    assert settings["identityfile"].replace("%%", "%") == str(AWKWARD / "id")
    assert settings["userknownhostsfile"].replace("%%", "%") == str(AWKWARD / "known_hosts").replace("%%", "%")


@pytest.mark.parametrize("command", [["-V"], ["-oProxyCommand=touch /tmp/x"], ["--", "x"], ["uname", "-a"]])
def test_words_of_the_command_are_never_options_of_ssh(command: list[str]) -> None:
    argv = ssh_argv(target(), *command)
    assert argv[argv.index("--") :] == ["--", "debian@127.0.0.1", *command]
    assert "proxycommand" not in understood(argv)


def test_copies_name_the_guest_by_user_and_address() -> None:
    argv = scp_argv(target(), ["a", "/b", "./c:d", "web-1:/etc/hosts"], "web-1:", recursive=True)
    assert argv[argv.index("--") + 1 :] == ["./a", "/b", "./c:d", "debian@127.0.0.1:/etc/hosts", "debian@127.0.0.1:"]
    assert "-r" in argv
    assert argv[argv.index("-P") + 1] == "40001"


def test_a_file_whose_name_looks_like_an_option_is_a_file() -> None:
    assert scp_argv(target(), ["-oProxyCommand=x"], "web-1:x")[-2] == "./-oProxyCommand=x"


@pytest.mark.parametrize(
    ("paths", "name"),
    [(["a", "web-1:"], "web-1"), (["web-1:/a", "web-1:/b", "."], "web-1"), (["./x:y", "web-1:z"], "web-1")],
)
def test_the_one_guest_of_a_copy(paths: list[str], name: str) -> None:
    assert guest_named(paths) == name


@pytest.mark.parametrize(
    ("paths", "problem"),
    [(["a", "b"], "names no guest"), (["a:x", "b:y"], "names several guests"), ([":x", "y"], "names no guest")],
)
def test_copies_without_a_guest_or_between_two(paths: list[str], problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        guest_named(paths)
