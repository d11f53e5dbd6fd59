"""Addresses of hosts, and the hosts that have names: what is accepted, and what is kept."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import InvalidInput, NotFound, PolyvisorError
from polyvisor.remote.address import Address, Entry, Hosts, entry_of, parse_address
from tests.unit.specs import QUICK

ENTRY = Entry(
    name="lab-1.example",
    url="ssh://alice@lab:2222",
    added_at=1.5,
    identity="/home/alice/my key",
    known_hosts="/home/alice/known",
    home="/srv/vms",
)


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lab", Address(host="lab")),
        ("ssh://lab", Address(host="lab")),
        ("ssh://lab/", Address(host="lab")),
        ("alice@lab", Address(host="lab", user="alice")),
        ("ssh://alice@lab.example.com:2222", Address(host="lab.example.com", user="alice", port=2222)),
        ("192.0.2.1:22", Address(host="192.0.2.1", port=22)),
        ("_vm.corp:65535", Address(host="_vm.corp", port=65535)),
        ("[::1]", Address(host="::1")),
        ("ssh://root@[fe80::1%eth0]:22", Address(host="fe80::1%eth0", user="root", port=22)),
        ("a.b-c_d@lab:00022", Address(host="lab", user="a.b-c_d", port=22)),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert parse_address(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-oProxyCommand=x",
        "ssh://-oProxyCommand=x",
        "-l@lab",
        "alice@-oProxyCommand=x",
        "ssh://alice@-lab:22",
        "lab -oProxyCommand=x",
        "lab\n",
        "lab\nProxyCommand x",
        "lab;reboot",
        "$(reboot)@lab",
        "lab`x`",
        "a@b@c",
        "alice:secret@lab",
        "ssh://lab/path",
        "http://lab",
        "ssh://",
        "ssh://alice@",
        "@lab",
        "::1",
        "[::1",
        "[lab]",
        "[::1%]",
        "[::1%a b]",
        "lab:",
        "lab:x",
        "lab:-1",
        "lab:123456",
        "lab:\N{FULLWIDTH DIGIT TWO}2",
        "lab-",
        "%h",
        "läb",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_address(text)
    assert caught.value.field == "address"
    assert caught.value.hint == "write ssh://user@host:port"


@pytest.mark.parametrize("port", ["0", "65536", "99999", "00000"])
def test_ports_that_are_none(port: str) -> None:
    with pytest.raises(InvalidInput, match="has no such port"):
        parse_address(f"lab:{port}")


@QUICK
@given(
    st.builds(
        Address,
        host=st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)
        | st.ip_addresses().map(str),
        user=st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,10}", fullmatch=True),
        port=st.none() | st.integers(1, 65535),
    )
)
def test_an_address_is_read_as_it_is_written(address: Address) -> None:
    assert parse_address(str(address)) == address


@QUICK
@given(st.text(max_size=30))
def test_whatever_is_accepted_begins_no_option(text: str) -> None:
    try:
        address = parse_address(text)
    except InvalidInput:
        return
    assert address.host[0] not in "-"
    assert (address.user or "x")[0] != "-"
    assert f"{address.user}{address.host}".isprintable()


class TestHosts:
    def test_what_is_added_is_there(self, hosts: Hosts) -> None:
        assert hosts.names() == []
        assert hosts.find(ENTRY.name) is None
        other = Entry(name="b", url="ssh://b", added_at=2.0)
        for entry in (ENTRY, other):
            hosts.add(entry)
            assert hosts.find(entry.name) == hosts.get(entry.name) == entry
        assert hosts.names() == ["b", "lab-1.example"]
        assert ENTRY.address == Address(host="lab", user="alice", port=2222)

    def test_an_entry_is_replaced_by_one_of_its_name(self, hosts: Hosts) -> None:
        hosts.add(ENTRY)
        hosts.add(changed := dataclasses.replace(ENTRY, url="ssh://other", identity=None))
        assert hosts.get(ENTRY.name) == changed
        assert hosts.names() == [ENTRY.name]

    def test_it_is_for_this_user_alone(self, hosts: Hosts) -> None:
        hosts.add(ENTRY)
        assert hosts.directory.stat().st_mode & 0o777 == 0o700
        assert [path.stat().st_mode & 0o777 for path in hosts.directory.iterdir()] == [0o600]

    def test_what_is_removed_is_gone(self, hosts: Hosts) -> None:
        hosts.add(ENTRY)
        hosts.remove(ENTRY.name)
        assert hosts.names() == []
        with pytest.raises(NotFound, match=r"there is no host 'lab-1\.example'"):
            hosts.remove(ENTRY.name)

    def test_one_that_is_not_there_is_told_with_those_that_are(self, hosts: Hosts) -> None:
        with pytest.raises(NotFound) as caught:
            hosts.get("nope")
        assert "none yet" in (caught.value.hint or "")
        hosts.add(ENTRY)
        with pytest.raises(NotFound) as caught:
            hosts.get("nope")
        assert "known: lab-1.example" in (caught.value.hint or "")

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "null",
            "{}",
            '{"format": 2, "url": "ssh://a", "added_at": 1.0}',
            '{"format": 1, "added_at": 1.0}',
            '{"format": 1, "url": 5, "added_at": 1.0}',
            '{"format": 1, "url": "ssh://a", "added_at": 1.0, "more": 1}',
            "\xff",
            "[" * 100_000,
        ],
    )
    def test_a_damaged_entry_can_be_removed(self, hosts: Hosts, content: str) -> None:
        hosts.add(ENTRY)
        (hosts.directory / f"{ENTRY.name}.json").write_text(content, encoding="latin-1")
        with pytest.raises(PolyvisorError, match=r"the entry of host 'lab-1\.example' can't be read") as caught:
            hosts.find(ENTRY.name)
        assert "polyvisor host rm lab-1.example" in (caught.value.hint or "")
        hosts.remove(ENTRY.name)
        assert hosts.names() == []

    def test_an_entry_whose_address_was_changed_by_hand_begins_no_option(self, hosts: Hosts) -> None:
        hosts.add(dataclasses.replace(ENTRY, url="-oProxyCommand=x"))
        with pytest.raises(InvalidInput, match="is not the address of a host"):
            _ = hosts.get(ENTRY.name).address

    @pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "-a", "a-", "a b", "x" * 64, "a\n", ".a"])
    def test_what_is_no_name(self, hosts: Hosts, name: str) -> None:
        for act in (hosts.find, hosts.get, hosts.remove):
            with pytest.raises(InvalidInput, match="is not a host's name"):
                act(name)
        with pytest.raises(InvalidInput):
            hosts.add(dataclasses.replace(ENTRY, name=name))

    def test_the_format_is_said(self, hosts: Hosts) -> None:
        hosts.add(ENTRY)
        raw = json.loads((hosts.directory / f"{ENTRY.name}.json").read_text())
        assert raw["format"] == 1
        assert "name" not in raw


class TestWhatHostMeans:
    def test_a_name(self, hosts: Hosts) -> None:
        hosts.add(ENTRY)
        assert entry_of(ENTRY.name, hosts) == ENTRY

    @pytest.mark.parametrize("text", ["alice@lab:22", "ssh://alice@lab:22"])
    def test_an_address(self, hosts: Hosts, text: str) -> None:
        entry = entry_of(text, hosts)
        assert entry.url == entry.name == "ssh://alice@lab:22"
        assert (entry.identity, entry.known_hosts, entry.home) == (None, None, None)

    def test_neither(self, hosts: Hosts) -> None:
        with pytest.raises(NotFound):
            entry_of("lab", hosts)
        for text in ("-oProxyCommand=x", "-oProxyCommand=x@y", "LAB"):
            with pytest.raises(InvalidInput):
                entry_of(text, hosts)
