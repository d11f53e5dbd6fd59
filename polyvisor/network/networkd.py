"""systemd-networkd, where a host has it: told that guests' devices are not its own.

A file such as `Type=ether` makes it bring up and configure every Ethernet device that appears. Linux before 6.2 refuses to
rename a device that is up, as Xen's script does, and a host that asks a guest's network for an address is wrong on any.
"""

from __future__ import annotations

from pathlib import Path

from polyvisor.files import storage_errors, write_atomic
from polyvisor.network.nat import NAT_CARDS, PRIVATE_CARDS
from polyvisor.process import run, which

# The first file that matches a device counts (systemd.network(5)). vif: Xen's name of a card before its script gives it ours.
_FILE = "00-polyvisor.network"
_TEXT = f"""# Written by Polyvisor when it starts a guest; gone after a boot.
[Match]
Name={NAT_CARDS}* {PRIVATE_CARDS}* vif*

[Link]
Unmanaged=yes
"""
_RELOAD_S = 30.0


async def leave_guests_alone(run_directory: Path = Path("/run/systemd")) -> None:
    """Let networkd leave guests' devices alone until the next boot; nothing happens where it does, or where it does not run.

    Raises StorageFull, NotPermitted, ProcessFailed, TimedOut.
    """
    if not (run_directory / "netif" / "state").exists() or (networkctl := which("networkctl")) is None:
        return
    file = run_directory / "network" / _FILE
    if file.exists() and file.read_text() == _TEXT:
        return
    with storage_errors("telling systemd-networkd of the guests' devices"):
        file.parent.mkdir(mode=0o755, exist_ok=True)
        write_atomic(file, _TEXT)
        file.chmod(0o644)  # networkd is not root
    try:
        await run([networkctl, "reload"], timeout_s=_RELOAD_S)
    except BaseException:
        file.unlink()  # what networkd does not know of must not look as if it did
        raise
