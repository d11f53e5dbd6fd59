"""Networks of guests whose rules for nft are kept as golden files (tests/golden/nat/NAME.nft)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from polyvisor.network.nat import SUBNETS, Card, State, private_bridge, with_cards
from polyvisor.spec.forward import parse_forward

NETWORKS_DIRECTORY = Path(__file__).parent / "nat"
_EMPTY = State(subnet=SUBNETS[0])


def _card(last: int, *forwards: str) -> Card:
    return Card(
        owner=f"/vms/vm{last}/alive", mac=f"52:54:00:00:00:{last:02x}", forwards=tuple(map(parse_forward, forwards))
    )


NETWORKS = {
    "nobody": _EMPTY,
    "two-guests": with_cards(_EMPTY, [_card(1, "2222:22", "0.0.0.0:8080:80", "192.0.2.1:53:53/udp"), _card(2)]),
    "two-cards": with_cards(_EMPTY, [replace(_card(last), owner="/vms/vm1/alive") for last in (1, 2)]),
    "private": with_cards(
        _EMPTY, [Card(owner="a", mac="52:54:00:00:00:01", bridge=private_bridge("239.192.0.1:20000"))]
    ),
}


def network_golden(name: str) -> Path:
    return NETWORKS_DIRECTORY / f"{name}.nft"
