"""Private networks: VMs of one home on this host reach each other, and nothing else, without any rights.

Every card sends its frames to one multicast group on the loopback interface, where the cards of the same network
listen (qemu(1), `-netdev socket,mcast=`). The host keeps no process and no bridge for it. What goes over such a network can
be read, and sent, by every process of this host: it keeps VMs apart from the outside, not from the host's users.
"""

from __future__ import annotations

_FIRST_PORT, _PORTS = 20000, 12000  # below the range that Linux gives to clients


def multicast_group(place: str, network: str) -> str:
    """ADDRESS:PORT for private network `network`; `place` tells apart networks of the same name.

    In the organization-local scope 239.192.0.0/14, which no router lets out (RFC 2365, 6.2).
    """
    import hashlib  # loads OpenSSL, for which starts without such a network need not wait

    digest = hashlib.sha256(f"{place}\0{network}".encode()).digest()
    port = _FIRST_PORT + int.from_bytes(digest[3:5], "big") % _PORTS
    return f"239.{192 + digest[0] % 4}.{digest[1]}.{digest[2]}:{port}"
