"""Addresses of hosts, their names here, and how SSH is told of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyvisor.errors import (
    HostKeyChanged,
    HostKeyUnknown,
    InvalidInput,
    LoginRefused,
    NotFound,
    PolyvisorError,
    TimedOut,
    Unavailable,
)
from polyvisor.remote.address import Address, Entry, Hosts, entry_of, parse_address
from polyvisor.remote.link import Link, explained, shared_directory

ENTRY = Entry(name="xen1", url="ssh://root@xen1:2222", added_at=1.5)


@pytest.mark.parametrize(
    ("text", "address", "url"),
    [
        ("ssh://root@xen1:2222", Address(host="xen1", user="root", port=2222), "ssh://root@xen1:2222"),
        ("root@192.0.2.1", Address(host="192.0.2.1", user="root"), "ssh://root@192.0.2.1"),
        ("xen1", Address(host="xen1"), "ssh://xen1"),
        (
            "ssh://a.b-c@[2001:db8::1]:22/",
            Address(host="2001:db8::1", user="a.b-c", port=22),
            "ssh://a.b-c@[2001:db8::1]:22",
        ),
        ("[fe80::1%eth0]", Address(host="fe80::1%eth0"), "ssh://[fe80::1%eth0]"),
    ],
)
def test_addresses(text: str, address: Address, url: str) -> None:
    assert parse_address(text) == address
    assert str(address) == url
    assert parse_address(url) == address


@pytest.mark.parametrize(
    "text",
    ["", "-oProxyCommand=x", "ssh://-oProxyCommand=x", "-x@host", "a b", "host:0", "host:65536", "host:22:22", "http://h",
     "u@", "ssh://u:secret@host", "host\n", "host;reboot", "$(reboot)", "2001:db8::1", "h" + "/x"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="address"):
        parse_address(text)


def test_hosts_have_names_until_they_are_forgotten(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path / "hosts")
    assert hosts.names() == []
    hosts.add(ENTRY)
    assert hosts.names() == ["xen1"]
    assert hosts.get("xen1") == entry_of("xen1", hosts) == ENTRY
    assert (tmp_path / "hosts" / "xen1.json").stat().st_mode & 0o777 == 0o600
    hosts.remove("xen1")
    for gone in (hosts.get, hosts.remove):
        with pytest.raises(NotFound, match="no host 'xen1'"):
            gone("xen1")
    assert hosts.find("xen1") is None


def test_an_address_needs_no_name(tmp_path: Path) -> None:
    assert entry_of("root@xen1", Hosts(tmp_path)).url == "ssh://root@xen1"


@pytest.mark.parametrize("name", ["", "../x", "A", "-x", "a b", "x" * 64, "x\n"])
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="host"):
        Hosts(tmp_path).find(name)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 2}', '{"format": 1, "url": 7, "added_at": 0.5}'])
def test_a_damaged_entry_names_its_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / "xen1.json").write_text(content)
    with pytest.raises(PolyvisorError, match="xen1") as raised:
        Hosts(tmp_path).get("xen1")
    assert "host rm xen1" in str(raised.value.hint)


def test_what_ssh_is_told(tmp_path: Path) -> None:
    entry = Entry(name="a", url="ssh://u@h:99", added_at=0.0, identity="/k 1/id", known_hosts="/k%d/known")
    argv = Link(entry, tmp_path, accept_new=True).argv("true")
    assert argv[-4:] == ["-T", "--", "u@h", "true"]
    assert argv[argv.index("-p") + 1] == "99"
    assert {'IdentityFile="/k 1/id"', "UserKnownHostsFile=/k%%d/known", "BatchMode=yes"} <= set(argv)
    assert {"StrictHostKeyChecking=accept-new", f"ControlPath={tmp_path}/%C"} <= set(argv)
    plain = Link(ENTRY, None).argv("true", interactive=True)
    assert not [word for word in plain if word.startswith(("Control", "Strict", "Identit"))]
    assert "BatchMode=no" in plain
    assert "-W '[127.0.0.1]:22'" in Link(ENTRY, None).tunnel("127.0.0.1", 22)


@pytest.mark.parametrize(
    ("stderr", "kind", "says"),
    [
        ("ssh: Could not resolve hostname xen1: Name or service not known\r\n", Unavailable, "name is not known"),
        ("ssh: connect to host xen1 port 22: Connection refused\n", Unavailable, "nothing answers"),
        ("ssh: connect to host xen1 port 22: No route to host\n", Unavailable, "no route"),
        ("ssh: connect to host xen1 port 22: Network is unreachable\n", Unavailable, "no route"),
        ("ssh: connect to host xen1 port 22: Connection timed out\n", TimedOut, "does not answer"),
        ("Timeout, server xen1 not responding.\n", TimedOut, "stopped answering"),
        ("kex_exchange_identification: Connection closed by remote host\n", Unavailable, "closed"),
        ("kex_exchange_identification: read: Connection reset by peer\n", Unavailable, "broke the connection off"),
        ("root@xen1: Permission denied (publickey).\n", LoginRefused, "refuses the login"),
        ("Received disconnect from 192.0.2.1 port 22:2: Too many authentication failures\n", LoginRefused, "too many"),
        (
            "No ED25519 host key is known for xen1 and you have requested strict checking.\nHost key verification failed.\n",
            HostKeyUnknown,
            "not known here",
        ),
        (
            "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n…\nHost key verification failed.\n",
            HostKeyChanged,
            "not the one it had before",
        ),
        ("something new\n\n", Unavailable, "something new"),
        ("", Unavailable, "without a word"),
    ],
)
def test_what_ssh_says_is_explained(stderr: str, kind: type[PolyvisorError], says: str) -> None:
    error = explained(ENTRY, stderr)
    assert type(error) is kind
    assert says in error.message
    assert "xen1" in error.message
    assert error.hint
    assert "{" not in error.hint


def test_connections_are_shared_in_a_directory_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    short = Path(f"/tmp/pv-{os.getpid()}")
    short.mkdir()
    try:
        assert shared_directory(short) == short / "run"
        assert (short / "run").stat().st_mode & 0o777 == 0o700
        (short / "run").chmod(0o755)
        assert shared_directory(short) is None, "others could put a socket of theirs there"
    finally:
        (short / "run").rmdir()
        short.rmdir()
    assert shared_directory(tmp_path / ("x" * 80)) is None
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp/has a blank")
    assert shared_directory(tmp_path / ("x" * 80)) is None
