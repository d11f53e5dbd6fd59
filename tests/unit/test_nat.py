"""The guests' network as text for nft and dnsmasq, and who gets which address; tests/real/test_bridge.py runs it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import InvalidInput, Unavailable
from polyvisor.network.nat import (
    BRIDGE,
    SUBNETS,
    Card,
    State,
    build_hosts,
    build_rules,
    dnsmasq_arguments,
    free_subnet,
    from_json,
    interface_name,
    private_bridge,
    to_json,
    with_cards,
    with_forwards,
)
from polyvisor.spec.forward import parse_forward
from tests.golden.networks import NETWORKS, network_golden
from tests.unit.specs import QUICK

EMPTY = State(subnet=SUBNETS[0])
MACS = st.binary(min_size=4, max_size=4).map(lambda raw: "52:54:" + raw.hex(":"))


def card(mac: str = "52:54:00:aa:bb:01", owner: str = "/vms/a/alive", *forwards: str, bridge: str = BRIDGE) -> Card:
    return Card(owner=owner, mac=mac, bridge=bridge, forwards=tuple(map(parse_forward, forwards)))


@pytest.mark.parametrize("name", NETWORKS)
def test_rules_are_as_their_golden_file(name: str) -> None:
    assert build_rules(NETWORKS[name]) == network_golden(name).read_text(), "uv run python -m tests.golden.regenerate"


@QUICK
@given(st.sets(MACS, min_size=1, max_size=40))
def test_every_card_gets_an_address_of_its_own(macs: set[str]) -> None:
    state = with_cards(EMPTY, [card(mac, f"/{mac}") for mac in sorted(macs)])
    addresses = [IPv4Address(each.address or "") for each in state.cards]
    assert len(set(addresses)) == len(macs)
    assert all(address in EMPTY.subnet for address in addresses)
    reserved = {EMPTY.subnet[0], EMPTY.subnet[1], EMPTY.subnet[-1]}
    assert not reserved & set(addresses)
    assert from_json(to_json(state)) == state


def test_a_card_gets_the_same_address_again() -> None:
    first = with_cards(EMPTY, [card("52:54:00:00:00:07")]).cards[0].address
    others = with_cards(EMPTY, [card("52:54:00:00:00:08")])
    assert with_cards(others, [card("52:54:00:00:00:07")]).cards[1].address == first


def test_the_last_address_is_given_and_none_after_it() -> None:
    small = State(subnet=SUBNETS[2])
    full = with_cards(small, [card(f"52:54:00:00:00:{i:02x}") for i in range(253)])
    assert len({each.address for each in full.cards}) == 253
    with pytest.raises(Unavailable, match="all 253 addresses"):
        with_cards(full, [card("52:54:00:00:01:00")])


@pytest.mark.parametrize(
    ("mine", "theirs", "clash"),
    [
        ("127.0.0.1:80:80", "127.0.0.1:80:81", True),
        ("127.0.0.1:80:80", "0.0.0.0:80:80", True),
        ("0.0.0.0:80:80", "192.0.2.1:80:80", True),
        ("127.0.0.1:80:80", "192.0.2.1:80:80", False),
        ("127.0.0.1:80:80", "127.0.0.1:80:80/udp", False),
        ("127.0.0.1:80:80", "127.0.0.1:81:80", False),
    ],
)
def test_a_port_leads_to_one_card(mine: str, theirs: str, clash: bool) -> None:
    there = with_cards(EMPTY, [card("52:54:00:00:00:01", "a", mine), card("52:54:00:00:00:03", "b")])
    try:
        with_cards(there, [card("52:54:00:00:00:02", "c", theirs)])
        with_forwards(there, "b", 0, lambda _: (parse_forward(theirs),))
    except InvalidInput as error:
        assert clash
        assert "host forwarding" in error.message
    else:
        assert not clash


def test_forwards_change_on_the_card_that_is_meant() -> None:
    private = private_bridge("group")
    cards = [card("52:54:00:00:00:01", "a", bridge=private), card("52:54:00:00:00:02", "a", "80:80")]
    state = with_cards(EMPTY, [card("52:54:00:00:00:03", "b"), *cards])
    changed = with_forwards(state, "a", 1, lambda old: (*old, parse_forward("81:81")))
    assert [len(each.forwards) for each in changed.cards] == [0, 0, 2]
    assert [each.address for each in changed.cards] == [each.address for each in state.cards]
    with pytest.raises(Unavailable):
        with_forwards(state, "b", 1, lambda old: old)


def test_two_cards_can_not_have_one_name() -> None:
    for other in ("52:54:00:AA:BB:01", "52:55:00:aa:bb:01"):
        with pytest.raises(InvalidInput, match="mac"):
            with_cards(with_cards(EMPTY, [card()]), [card(other, "b")])


def test_the_first_subnet_without_routes_is_taken() -> None:
    assert free_subnet(["default", "0.0.0.0/0", "192.168.1.0/24", "127.0.0.1"]) == SUBNETS[0]
    assert free_subnet(["10.183.7.1"]) == SUBNETS[1]
    assert free_subnet(["10.0.0.0/8", "172.16.0.0/12"]) == SUBNETS[2]
    with pytest.raises(Unavailable):
        free_subnet(["10.0.0.0/8", "172.16.0.0/12", "192.168.183.4/30"])


def test_names_fit_into_what_linux_allows() -> None:
    for bridge in (BRIDGE, private_bridge("x")):
        assert len(bridge) <= 15
        assert len(f"{interface_name('52:54:00:aa:bb:01', bridge)}-emu") <= 15
    assert interface_name("52:54:00:AA:BB:01") == "pvn00aabb01"
    assert private_bridge("a") != private_bridge("b")


def test_the_address_server_knows_cards_with_an_address_alone() -> None:
    private = card("52:54:00:00:00:02", bridge=private_bridge("x"))
    state = with_cards(EMPTY, [card("52:54:00:00:00:01"), private])
    assert build_hosts(state.cards) == f"52:54:00:00:00:01,{state.cards[0].address},infinite\n"
    assert "--dhcp-range=10.183.0.0,static,255.255.0.0,infinite" in dnsmasq_arguments(state, Path("/hosts"))
    assert private.mac not in build_rules(state)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"subnet": "x", "cards": []}', '{"subnet": "10.0.0.0/8", "cards": [1]}']
)
def test_a_state_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_json(text)


def test_nothing_of_a_card_can_add_a_rule() -> None:
    """MACs, addresses and ports are all that gets into the rules, and the spec lets nothing else through as these."""
    with pytest.raises(InvalidInput):
        parse_forward("127.0.0.1 } drop:80:80")
    state = with_cards(EMPTY, [card(owner='"; drop')])
    assert "; drop" not in build_rules(state)
    assert replace(state.cards[0], owner="x") != state.cards[0]
