"""Port forwards as people write them: ``2222:22``, ``0.0.0.0:8080:80``, ``53:53/udp``, ``:80`` (any free port)."""

from __future__ import annotations

from polyvisor.errors import InvalidInput, shortened
from polyvisor.values import dataclass

_FORMS = "write HOST_PORT:GUEST_PORT, ADDRESS:HOST_PORT:GUEST_PORT or :GUEST_PORT, with /udp at the end for UDP"


@dataclass(frozen=True, kw_only=True)
class Forward:
    """A port of the host that leads to a port of the guest; `host_port` 0 asks for any free one."""

    host_port: int
    guest_port: int
    host_address: str = "127.0.0.1"
    protocol: str = "tcp"

    def __str__(self) -> str:
        suffix = "" if self.protocol == "tcp" else f"/{self.protocol}"
        return f"{self.host_address}:{self.host_port or ''}:{self.guest_port}{suffix}"


def parse_forward(text: str, field: str = "forward") -> Forward:
    """The forward that `text` asks for; raises InvalidInput, which names `field`."""
    body, slash, protocol = text.partition("/")
    if slash and protocol not in ("tcp", "udp"):
        raise InvalidInput(field, text, f"the protocol {shortened(protocol)} is neither tcp nor udp", hint=_FORMS)
    address, host, guest = _split(body, text, field)
    return Forward(
        host_port=_port(host, text, field, lowest=0) if host else 0,
        guest_port=_port(guest, text, field, lowest=1),
        host_address=address or "127.0.0.1",
        protocol=protocol or "tcp",
    )


def _split(body: str, text: str, field: str) -> tuple[str, str, str]:
    """Address, host port and guest port of a forward, as text."""
    parts = body.split(":")
    if len(parts) == 1:
        return "", "", parts[0]
    if len(parts) == 2:
        return "", parts[0], parts[1]
    if len(parts) != 3:
        raise InvalidInput(field, text, "is not a port forward", hint=_FORMS)
    import ipaddress

    try:
        ipaddress.IPv4Address(parts[0])
    except ValueError as error:
        problem = f"{shortened(parts[0])} is not an IPv4 address of this host"
        raise InvalidInput(field, text, problem, hint=_FORMS) from error
    return parts[0], parts[1], parts[2]


def _port(digits: str, text: str, field: str, *, lowest: int) -> int:
    if not (digits.isascii() and digits.isdigit() and lowest <= int(digits[:6]) <= 65535 and len(digits) <= 5):
        raise InvalidInput(field, text, f"{shortened(digits)} is not a port from {lowest} to 65535", hint=_FORMS)
    return int(digits)
