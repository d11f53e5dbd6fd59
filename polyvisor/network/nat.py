"""The network that guests with a device on the host share: addresses, firewall and address server, as pure functions.

A hypervisor that runs guests as processes gives each a network of its own (slirp). Xen's guests have devices on the host
instead, which need a bridge. Guests on it are as apart as with slirp: they reach the outside through the host's address (NAT),
are reached through forwarded ports alone, and neither reach each other nor the host, but for DHCP, DNS and ping. A frame
passes only where it comes from a device, with the MAC of that and an address, that the guest was given. A private network is a
bridge of its own with none of this. See docs/design/nat.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

from polyvisor.errors import InvalidInput, Unavailable
from polyvisor.spec.forward import Forward, parse_forward
from polyvisor.values import dataclass

BRIDGE = "polyvisor0"
# Devices of cards, by which the rules know them; "b" is for the bridges of private networks.
NAT_CARDS, PRIVATE_CARDS, PRIVATE_BRIDGES = "pvn", "pvp", "pvb"
BRIDGE_MAC = "02:70:76:00:00:01"  # locally administered, and none that a card of ours can have
SUBNETS = tuple(map(IPv4Network, ("10.183.0.0/16", "172.29.0.0/16", "192.168.183.0/24")))
Forwards = tuple[Forward, ...]
_EVERYWHERE = "0.0.0.0"  # noqa: S104 - compared, not bound


@dataclass(frozen=True, kw_only=True)
class Card:
    """A guest's card; `owner` is the file whose lock says that its VM is alive. `address` is given to cards on `BRIDGE`."""

    owner: str
    mac: str
    bridge: str = BRIDGE
    address: str | None = None
    forwards: tuple[Forward, ...] = ()

    @property
    def interface(self) -> str:
        return interface_name(self.mac, self.bridge)


@dataclass(frozen=True, kw_only=True)
class State:
    """What of the host's network Polyvisor has made: kept where a boot of the host empties it, as the kernel's own is."""

    subnet: IPv4Network
    cards: tuple[Card, ...] = ()

    @property
    def gateway(self) -> str:
        return str(self.subnet[1])

    @property
    def bridges(self) -> frozenset[str]:
        """The bridges that cards are on, and the one with NAT, which stays."""
        return frozenset({BRIDGE, *(card.bridge for card in self.cards)})


def interface_name(mac: str, bridge: str = BRIDGE) -> str:
    """The host's device for a card, in 11 characters: Xen adds `-emu` for an emulated card, and Linux allows 15.

    The last four bytes of the MAC tell cards apart: the first two are the same in all that Polyvisor makes.
    """
    return (NAT_CARDS if bridge == BRIDGE else PRIVATE_CARDS) + mac.replace(":", "").lower()[-8:]


def private_bridge(network: str) -> str:
    """The bridge of a private network, whatever text names it, in the 15 characters that Linux allows."""
    return PRIVATE_BRIDGES + hashlib.sha256(network.encode()).hexdigest()[:12]


def free_subnet(routes: Iterable[str]) -> IPv4Network:
    """The first subnet that none of `routes` (destinations, such as 10.0.0.0/8 or default) touches; raises Unavailable."""
    taken = [IPv4Network(route) for route in routes if route != "default"]
    for subnet in SUBNETS:
        if not any(subnet.overlaps(network) for network in taken if network.prefixlen):
            return subnet
    names = ", ".join(map(str, SUBNETS))
    raise Unavailable(f"no network is free for guests: this host has routes into all of {names}", hint="ip route")


def with_cards(state: State, cards: Sequence[Card]) -> State:
    """`state` with `cards` as well, those on `BRIDGE` with an address: as it was last, where nobody else has got it.

    Raises InvalidInput where another card has the MAC or the port, Unavailable where no address is left.
    """
    for card in cards:
        if any(_last_bytes(card) == _last_bytes(other) for other in state.cards):
            hint = "choose another, or leave it to Polyvisor"
            raise InvalidInput("mac", card.mac, "another card has it, or one with the same last four bytes", hint=hint)
        for forward in card.forwards:
            require_unforwarded(state, forward)
        address = _free_address(state, card.mac) if card.bridge == BRIDGE else None
        state = replace(state, cards=(*state.cards, replace(card, mac=card.mac.lower(), address=address)))
    return state


def with_forwards(state: State, owner: str, position: int, change: Callable[[Forwards], Forwards]) -> State:
    """`state` with other forwards to the card of `owner` that is in `position` among its own, from 0 on.

    Raises InvalidInput where another card has the port, Unavailable where there is no such card.
    """
    own = [i for i, card in enumerate(state.cards) if card.owner == owner]
    if position >= len(own):
        raise Unavailable("the card is on no bridge of this host", hint="stop the VM, then start it")
    cards = list(state.cards)
    card = cards.pop(own[position])
    wanted = change(card.forwards)
    for forward in wanted:
        require_unforwarded(replace(state, cards=tuple(cards)), forward)
    cards.insert(own[position], replace(card, forwards=wanted))
    return replace(state, cards=tuple(cards))


def require_unforwarded(state: State, forward: Forward) -> None:
    """Raise InvalidInput where the port leads to a card already."""
    if any(_clash(forward, other) for card in state.cards for other in card.forwards):
        problem = "host forwarding: another VM has the port"
        raise InvalidInput("forwards", str(forward), problem, hint=f"use :{forward.guest_port} to have one chosen")


def _last_bytes(card: Card) -> str:
    return interface_name(card.mac)


def _clash(one: Forward, other: Forward) -> bool:
    same = (one.protocol, one.host_port) == (other.protocol, other.host_port)
    return same and (one.host_address == other.host_address or _EVERYWHERE in (one.host_address, other.host_address))


def _free_address(state: State, mac: str) -> str:
    """An address for a card, the same as ever where nobody else has got it; the first is the gateway's."""
    taken = {card.address for card in state.cards}
    size = state.subnet.num_addresses - 3
    first = int(mac.replace(":", "")[-8:], 16) % size
    for i in range(size):
        if (address := str(state.subnet[2 + (first + i) % size])) not in taken:
            return address
    raise Unavailable(f"all {size} addresses of {state.subnet} are taken", hint="stop VMs that are not needed")


def build_rules(state: State) -> str:
    """The input of `nft -f` that replaces Polyvisor's tables, and no others, in one step (nft(8))."""
    cards = [card for card in state.cards if card.bridge == BRIDGE]
    exact = [(f, c) for c in cards for f in c.forwards if f.host_address != _EVERYWHERE]
    everywhere = [(f, c) for c in cards for f in c.forwards if f.host_address == _EVERYWHERE]
    to_exact = [f"{f.host_address} . {f.protocol} . {f.host_port} : {c.address} . {f.guest_port}" for f, c in exact]
    to_everywhere = [f"{f.protocol} . {f.host_port} : {c.address} . {f.guest_port}" for f, c in everywhere]
    # An emulated card has a device of its own.
    devices = [(name, card) for card in cards for name in (card.interface, f"{card.interface}-emu")]
    return _RULES.format(
        bridge=BRIDGE,
        guests=f"{NAT_CARDS}*",
        subnet=state.subnet,
        gateway=state.gateway,
        exact=_elements(to_exact),
        everywhere=_elements(to_everywhere),
        cards=_elements(f'"{name}" . {card.mac}' for name, card in devices),
        addresses=_elements(
            f'"{name}" . {card.mac} . {other.address}'
            for name, card in devices
            # A guest with two cards answers by the one that its routes name first, whichever of its addresses was asked.
            for other in cards
            if other.owner == card.owner
        ),
    )


def _elements(items: Iterable[str]) -> str:
    text = ", ".join(items)
    return f"elements = {{ {text} }}" if text else ""


# Connections from this host to 127.0.0.1 get to a guest too, which takes the bridge's `route_localnet`; the chain `early` is
# what keeps guests from the host's 127.0.0.1 then. Nobody listens on the chains' verdicts but the kernel: `drop` here is final,
# while what is accepted here can still be dropped by other tables.
_RULES = """\
table inet polyvisor
delete table inet polyvisor
table inet polyvisor {{
  map exact {{
    type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
    {exact}
  }}
  map everywhere {{
    type inet_proto . inet_service : ipv4_addr . inet_service
    {everywhere}
  }}
  chain early {{
    type filter hook prerouting priority raw
    iifname "{bridge}" ip saddr 127.0.0.0/8 drop
    iifname "{bridge}" ip daddr 127.0.0.0/8 drop
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat
    iifname != "{bridge}" dnat ip to ip daddr . meta l4proto . th dport map @exact
    iifname != "{bridge}" fib daddr type local dnat ip to meta l4proto . th dport map @everywhere
  }}
  chain output {{
    type nat hook output priority -100
    dnat ip to ip daddr . meta l4proto . th dport map @exact
    fib daddr type local dnat ip to meta l4proto . th dport map @everywhere
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat
    oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade
    oifname != "{bridge}" ip saddr {subnet} masquerade
  }}
  chain input {{
    type filter hook input priority filter
    iifname != "{bridge}" accept
    ct state established,related accept
    udp dport 67 accept
    ip daddr {gateway} udp dport 53 accept
    ip daddr {gateway} tcp dport 53 accept
    ip daddr {gateway} icmp type echo-request accept
    drop
  }}
  chain forward {{
    type filter hook forward priority filter
    iifname "{bridge}" oifname "{bridge}" drop
    oifname "{bridge}" ct state established,related accept
    oifname "{bridge}" ct status dnat accept
    oifname "{bridge}" drop
  }}
}}
table bridge polyvisor
delete table bridge polyvisor
table bridge polyvisor {{
  set cards {{
    type ifname . ether_addr
    {cards}
  }}
  set addresses {{
    type ifname . ether_addr . ipv4_addr
    {addresses}
  }}
  chain prerouting {{
    type filter hook prerouting priority filter
    iifname "{guests}" jump guest
  }}
  chain guest {{
    iifname . ether saddr . ip saddr @addresses accept
    iifname . arp saddr ether . arp saddr ip @addresses accept
    iifname . ether saddr @cards ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
    iifname . arp saddr ether @cards arp saddr ip 0.0.0.0 accept
    drop
  }}
  chain forward {{
    type filter hook forward priority filter
    iifname "{guests}" drop
  }}
}}
"""


def build_hosts(cards: Iterable[Card]) -> str:
    """The file that tells dnsmasq which card gets which address (`dhcp-hostsfile` in dnsmasq(8))."""
    return "".join(f"{card.mac},{card.address},infinite\n" for card in cards if card.address)


def dnsmasq_arguments(state: State, hosts: Path) -> tuple[str, ...]:
    """Arguments of a dnsmasq (in the foreground) that gives the cards in `hosts` their addresses and answers DNS on the bridge.

    It reads no configuration of the host's and listens nowhere else.
    """
    return (
        "--keep-in-foreground",
        "--conf-file=",
        "--pid-file=",
        "--log-facility=-",
        "--no-hosts",
        "--bind-interfaces",
        "--except-interface=lo",
        f"--interface={BRIDGE}",
        f"--dhcp-range={state.subnet[0]},static,{state.subnet.netmask},infinite",
        f"--dhcp-hostsfile={hosts}",
        "--dhcp-authoritative",
        "--leasefile-ro",
    )


def to_json(state: State) -> str:
    cards = [{**_words(card), "forwards": [str(forward) for forward in card.forwards]} for card in state.cards]
    return json.dumps({"subnet": str(state.subnet), "cards": cards})


def _words(card: Card) -> dict[str, str | None]:
    return {"owner": card.owner, "mac": card.mac, "bridge": card.bridge, "address": card.address}


def from_json(text: str | bytes) -> State:
    """What `to_json` wrote; raises ValueError, KeyError, TypeError, InvalidInput for anything else."""
    value = json.loads(text)
    cards = [{**each, "forwards": tuple(map(parse_forward, each["forwards"]))} for each in value["cards"]]
    return State(subnet=IPv4Network(value["subnet"]), cards=tuple(Card(**each) for each in cards))
