"""Where Polyvisor keeps things on one machine.

    <home>/vms/<name>/       a VM: its record, launch record, lock, sockets, logs, disks
    <home>/images/           the image store
    <home>/layers/           frozen layers of disks, which snapshots and clones stand on
    <home>/templates/        memory and devices of VMs, from which others begin
    <home>/keys/             the SSH key pair that Polyvisor logs in to guests with
    <home>/locks/            one lock file per VM name
    <home>/cache/            downloads and probe results; may be deleted at any time
    <home>/hosts/            other hosts that have names here
    <home>/access/           keys of their guests
    <home>/run/              SSH connections that commands share
    <home>/id                who this host is, whatever others call it
    <home>/moved/            which VMs have left it for other hosts
    <home>/arrived/          which have come from there
    <home>/calls/            what users of other machines had done here in the last day

The home is $POLYVISOR_HOME; without it /var/lib/polyvisor for root and $XDG_DATA_HOME/polyvisor
(~/.local/share/polyvisor) for others.
"""

from __future__ import annotations

import os
from pathlib import Path

from polyvisor.files import make_directory, storage_errors
from polyvisor.values import dataclass


@dataclass(frozen=True)
class Home:
    """The directories of one Polyvisor home; none needs to exist before `prepare`."""

    path: Path

    @property
    def vms(self) -> Path:
        return self.path / "vms"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def layers(self) -> Path:
        return self.path / "layers"

    @property
    def templates(self) -> Path:
        return self.path / "templates"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def locks(self) -> Path:
        return self.path / "locks"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def next_user(self) -> Path:
        """The number of the next VM's user, where root runs VMs."""
        return self.path / "next-user"

    def prepare(self) -> None:
        """Make the directories that are missing; raises NotPermitted or StorageFull.

        For root the way to VMs and images can be traversed (not listed) by others: each QEMU runs as a user of its own.
        """
        mode = 0o711 if os.geteuid() == 0 else 0o700
        with storage_errors(f"preparing {self.path}"):
            for directory, bits in (
                (self.path, mode),
                (self.vms, mode),
                (self.images, mode),
                (self.keys, 0o700),
                (self.locks, 0o700),
                (self.cache, 0o700),
            ):
                make_directory(directory, bits)


def default_home() -> Home:
    """The home that the environment asks for."""
    if path := os.environ.get("POLYVISOR_HOME"):
        return Home(Path(path).absolute())
    if os.geteuid() == 0:
        return Home(Path("/var/lib/polyvisor"))
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    # A relative one is to be ignored: XDG Base Directory Specification.
    return Home((data if data.is_absolute() else Path.home() / ".local" / "share") / "polyvisor")
