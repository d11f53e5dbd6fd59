"""The guests' network on a host, with real bridges, nftables and dnsmasq: hosts and guests are network namespaces here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polyvisor.network.nat import BRIDGE, interface_name, private_bridge

MAC_A, MAC_B = "52:54:00:aa:00:0a", "52:54:00:aa:00:0b"
OUTSIDE, UPLINK, LINK = "192.0.2.2", "192.0.2.1", "uplink0"
NEEDED = ("ip", "nft", "dnsmasq", "busybox")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are made by root"),
    pytest.mark.skipif(
        not all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in NEEDED),
        reason=f"one of {', '.join(NEEDED)} is not installed: make setup",
    ),
]


class Place:
    """A network namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        _run("ip", "netns", "add", name)
        self("ip", "link", "set", "lo", "up")

    def __call__(self, *argv: str, check: bool = True) -> str:
        return _run("ip", "netns", "exec", self.name, *argv, check=check)

    def close(self) -> None:
        for pid in _run("ip", "netns", "pids", self.name).split():
            _run("kill", "-9", pid, check=False)
        _run("ip", "netns", "delete", self.name)

    def reaches(self, address: str, port: int, *, udp: bool = False) -> str | None:
        """What is answered there, or None."""
        kind = "SOCK_DGRAM" if udp else "SOCK_STREAM"
        code = (
            f"import socket; s = socket.socket(socket.AF_INET, socket.{kind}); s.settimeout(2);"
            f"s.connect(({address!r}, {port})); s.send(b'x'); print(s.recv(99).decode())"
        )
        return self(sys.executable, "-c", code, check=False).strip() or None


class Server:
    """Answers whoever connects to `port`, on every address of a place, with the address that it came from."""

    def __init__(self, place: Place, port: int, *, udp: bool = False) -> None:
        tcp = "s.listen()\nwhile 1:\n c, a = s.accept(); c.recv(9); c.send(a[0].encode()); c.close()"
        datagrams = "while 1:\n d, a = s.recvfrom(9); s.sendto(a[0].encode(), a)"
        kind = "SOCK_DGRAM" if udp else "SOCK_STREAM"
        code = (
            f"import socket\ns = socket.socket(socket.AF_INET, socket.{kind})\ns.bind(('', {port}))\n"
            f"{'pass' if udp else 's.listen()'}\nprint('up', flush=True)\n{datagrams if udp else tcp}"
        )
        argv = ["ip", "netns", "exec", place.name, sys.executable, "-c", code]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert self.process.stdout.readline() == "up\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Lan:
    """A host with an outside, and guests whose cards hang on Polyvisor's bridge."""

    def __init__(self, scratch: Path) -> None:
        self.tag, self.scratch = uuid.uuid4().hex[:6], scratch
        self.places: list[Place] = []
        self.servers: list[Server] = []
        self.owners: dict[str, subprocess.Popen[str]] = {}

    def begin(self) -> None:
        self.host, self.outside = self._place("host"), self._place("out")
        _run(
            "ip", "link", "add", LINK, "netns", self.host.name, "type", "veth", "peer", LINK, "netns", self.outside.name
        )
        for place, address in ((self.host, UPLINK), (self.outside, OUTSIDE)):
            place("ip", "address", "add", f"{address}/24", "dev", LINK)
            place("ip", "link", "set", LINK, "up")

    def _place(self, name: str) -> Place:
        place = Place(f"pv{self.tag}{name}")
        self.places.append(place)
        return place

    def verb(self, verb: str, owner: str, what: str = "") -> subprocess.Popen[str]:
        argv = ["ip", "netns", "exec", self.host.name, sys.executable, "-m", "tests.real.bridge_verbs", verb]
        argv += [str(self.scratch / "state"), str(self.scratch / owner), what]
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def tell(self, verb: str, owner: str, what: str = "") -> str:
        """Returns what was wrong, if anything."""
        return self.verb(verb, owner, what).communicate(timeout=60)[1]

    def join(self, owner: str, mac: str, *forwards: str, bridge: str = "", second: str | None = None) -> str:
        """Returns what was wrong, if anything; the owner is alive until `end`. `second` is the MAC of another card."""
        cards = [[mac, forwards, bridge], *([[second, [], bridge]] if second else [])]
        process = self.verb("join", owner, json.dumps(cards))
        assert process.stdout
        if process.stdout.readline() == "ready\n":
            self.owners[owner] = process
            return ""
        return process.communicate()[1]

    def end(self, owner: str) -> None:
        self.owners.pop(owner).communicate(timeout=60)

    def guest(self, name: str, mac: str, *, bridge: str = BRIDGE) -> Place:
        """A machine whose card is plugged in, and which asks for its address on the bridge with NAT."""
        place = self._place(name)
        self.plug(place, mac, bridge=bridge)
        return place

    def plug(self, place: Place, mac: str, *, bridge: str = BRIDGE, card: str = "eth0") -> None:
        device = interface_name(mac, bridge)
        _run(
            *("ip", "link", "add", device, "netns", self.host.name, "type", "veth"),
            *("peer", card, "address", mac, "netns", place.name),
        )
        self.host("ip", "link", "set", device, "master", bridge, "up")
        place("ip", "link", "set", card, "up")
        if bridge == BRIDGE:
            script = self.scratch / "lease.sh"
            script.write_text(
                '#!/bin/sh\n[ "$1" = bound ] || exit 0\nip address add $ip/$mask dev $interface\n'
                "ip route replace default via $router\n"
            )
            script.chmod(0o755)
            place("busybox", "udhcpc", "-i", card, "-n", "-q", "-t", "10", "-T", "1", "-s", str(script))

    def serve(self, place: Place, port: int, *, udp: bool = False) -> None:
        self.servers.append(Server(place, port, udp=udp))

    def close(self) -> None:
        for server in self.servers:
            server.close()
        for owner in list(self.owners):
            self.end(owner)
        for place in self.places:
            place.close()


@pytest.fixture
def lan() -> Iterator[Lan]:
    """Below /run, since the address server is no longer root and so could not read what is private to root."""
    with tempfile.TemporaryDirectory(prefix="polyvisor-test-", dir="/run") as directory:
        Path(directory).chmod(0o755)
        lan = Lan(Path(directory))
        try:
            lan.begin()
            yield lan
        finally:
            lan.close()


def address(place: Place) -> str:
    return place("ip", "-4", "-o", "address", "show", "dev", "eth0").split()[3].partition("/")[0]


def test_a_guest_gets_its_address_and_reaches_the_outside_as_the_host(lan: Lan) -> None:
    assert lan.join("a", MAC_A) == ""
    guest = lan.guest("a", MAC_A)
    lan.serve(lan.outside, 80)
    assert guest.reaches(OUTSIDE, 80) == UPLINK


def test_forwards_lead_to_the_guest_from_the_outside_and_from_the_host(lan: Lan) -> None:
    forwards = ["127.0.0.1:2222:22", "0.0.0.0:8080:80", f"{UPLINK}:5353:53/udp"]
    assert lan.join("a", MAC_A, *forwards) == ""
    guest = lan.guest("a", MAC_A)
    for port, udp in ((22, False), (80, False), (53, True)):
        lan.serve(guest, port, udp=udp)
    assert lan.host.reaches("127.0.0.1", 2222) == "10.183.0.1"
    assert lan.host.reaches("127.0.0.1", 8080) == "10.183.0.1"
    assert lan.outside.reaches(UPLINK, 8080) == OUTSIDE
    assert lan.outside.reaches(UPLINK, 5353, udp=True) == OUTSIDE
    assert lan.outside.reaches(UPLINK, 2222) is None, "what is for 127.0.0.1 is for nobody outside"
    lan.outside("ip", "route", "add", "10.183.0.0/16", "via", UPLINK)
    assert lan.outside.reaches(address(guest), 80) is None, "a way around the forwards"
    assert lan.tell("add", "a", "127.0.0.1:2223:22") == ""
    assert lan.tell("remove", "a", "127.0.0.1:2222:22") == ""
    assert lan.host.reaches("127.0.0.1", 2223) == "10.183.0.1"
    assert lan.host.reaches("127.0.0.1", 2222) is None


def test_a_guest_with_two_cards_answers_by_the_one_that_its_routes_name(lan: Lan) -> None:
    assert lan.join("a", MAC_A, "127.0.0.1:2222:22", second=MAC_B) == ""
    guest = lan.guest("a", MAC_A)
    lan.plug(guest, MAC_B, card="eth1")
    lan.serve(guest, 22)
    lan.serve(lan.outside, 80)
    for card in ("eth0", "eth1"):
        guest("ip", "route", "flush", "table", "main")
        guest("ip", "route", "add", "10.183.0.0/16", "dev", card)
        guest("ip", "route", "add", "default", "via", "10.183.0.1", "dev", card)
        assert lan.host.reaches("127.0.0.1", 2222) == "10.183.0.1", f"its routes lead through {card}"
        assert guest.reaches(OUTSIDE, 80) == UPLINK


def test_guests_reach_neither_each_other_nor_the_host(lan: Lan) -> None:
    assert lan.join("a", MAC_A, "0.0.0.0:8080:80") == ""
    assert lan.join("b", MAC_B) == ""
    a, b = lan.guest("a", MAC_A), lan.guest("b", MAC_B)
    assert address(a) != address(b)
    lan.serve(a, 80)
    lan.serve(lan.host, 81)
    assert lan.host.reaches(address(a), 80) == "10.183.0.1"
    assert b.reaches(address(a), 80) is None
    for target in ("10.183.0.1", UPLINK):
        assert b.reaches(target, 81) is None
        assert b.reaches(target, 8080) is None
    b("ip", "route", "add", "127.0.0.2/32", "via", "10.183.0.1")
    b("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    assert b.reaches("127.0.0.2", 81) is None
    assert "1 packets received" in b("busybox", "ping", "-c1", "-W2", "10.183.0.1", check=False)


@pytest.mark.parametrize("forged", ["address", "mac"])
def test_a_guest_can_not_pose_as_another(lan: Lan, forged: str) -> None:
    assert lan.join("a", MAC_A) == ""
    assert lan.join("b", MAC_B) == ""
    a, b = lan.guest("a", MAC_A), lan.guest("b", MAC_B)
    lan.serve(lan.outside, 80)
    assert b.reaches(OUTSIDE, 80) == UPLINK
    mine, others = address(b), address(a)
    if forged == "address":
        b("ip", "address", "delete", f"{mine}/16", "dev", "eth0")
        b("ip", "address", "add", f"{others}/16", "dev", "eth0")
    else:
        b("ip", "link", "set", "eth0", "address", "52:54:00:aa:00:99")
    b("ip", "route", "replace", "default", "via", "10.183.0.1", "dev", "eth0")
    assert b.reaches(OUTSIDE, 80) is None
    assert a.reaches(OUTSIDE, 80) == UPLINK


def test_what_a_vm_that_ended_had_is_free_again(lan: Lan) -> None:
    assert lan.join("a", MAC_A, "127.0.0.1:2222:22") == ""
    assert "another card has it" in lan.join("b", MAC_A)
    assert "host forwarding: another VM has the port" in lan.join("b", MAC_B, "0.0.0.0:2222:22")
    lan.end("a")
    assert lan.join("b", MAC_A, "0.0.0.0:2222:22") == ""
    assert lan.tell("leave", "b") == ""
    assert "2222" not in lan.host("nft", "list", "ruleset")


def test_whatever_is_lost_comes_back_with_the_next_guest(lan: Lan) -> None:
    assert lan.join("a", MAC_A, "127.0.0.1:2222:22") == ""
    guest = lan.guest("a", MAC_A)
    lan.serve(guest, 22)
    server = lan.host("cat", str(lan.scratch / "state" / "dnsmasq.pid"))
    lan.host("kill", "-9", server)
    lan.host("nft", "flush", "ruleset")
    lan.host("ip", "address", "flush", "dev", "polyvisor0")
    assert lan.host.reaches("127.0.0.1", 2222) is None
    assert lan.join("b", MAC_B) == ""
    assert lan.host.reaches("127.0.0.1", 2222) == "10.183.0.1"
    assert address(lan.guest("b", MAC_B))


def test_a_private_network_is_between_its_guests_alone(lan: Lan) -> None:
    name = private_bridge("home private:lan")
    assert lan.join("a", MAC_A, bridge=name) == ""
    assert lan.join("b", MAC_B, bridge=name) == ""
    guests = lan.guest("a", MAC_A, bridge=name), lan.guest("b", MAC_B, bridge=name)
    for i, guest in enumerate(guests):
        guest("ip", "address", "add", f"10.9.9.{i + 1}/24", "dev", "eth0")
    lan.serve(guests[0], 80)
    assert guests[1].reaches("10.9.9.1", 80) == "10.9.9.2"
    lan.host("ip", "route", "add", "10.9.9.0/24", "dev", name)
    assert lan.host.reaches("10.9.9.1", 80) is None
    for owner, mac in (("a", MAC_A), ("b", MAC_B)):
        lan.end(owner)
        lan.host("ip", "link", "delete", interface_name(mac, name))
    assert lan.tell("leave", "a") == ""
    assert name not in lan.host("ip", "link")


def test_many_at_once_get_along(lan: Lan) -> None:
    said: list[str] = []
    macs = [f"52:54:00:bb:00:{i:02x}" for i in range(8)]
    join: Callable[[int, str], None] = lambda i, mac: said.append(lan.join(f"vm{i}", mac, f"{3000 + i}:22"))  # noqa: E731
    threads = [threading.Thread(target=join, args=pair) for pair in enumerate(macs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [""] * 8
    cards = json.loads((lan.scratch / "state" / "state.json").read_text())["cards"]
    assert sorted(card["mac"] for card in cards) == macs
    assert len({card["address"] for card in cards}) == 8


def test_a_host_whose_routes_leave_no_room_says_so(lan: Lan) -> None:
    lan.host("ip", "route", "add", "10.0.0.0/8", "via", OUTSIDE)
    assert lan.join("a", MAC_A) == ""
    assert json.loads((lan.scratch / "state" / "state.json").read_text())["subnet"] == "172.29.0.0/16"


def _run(*argv: str, check: bool = True) -> str:
    done = subprocess.run(
        argv, check=False, capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"}
    )
    assert not check or done.returncode == 0, f"{argv}: {done.stderr}{done.stdout}"
    return done.stdout
