"""Hosts by name, for the verbs: what --host means, and questions that SSH puts to the user."""

from __future__ import annotations

import sys

from polyvisor.cli.ssh import call_on_terminal
from polyvisor.home import default_home
from polyvisor.remote.address import Entry, Hosts, entry_of
from polyvisor.remote.host import RemoteHost


def known_hosts() -> Hosts:
    """The hosts that have names here."""
    return Hosts(default_home().path / "hosts")


def named_host(name: str) -> RemoteHost:
    """The host of that name, or at that address; raises NotFound, InvalidInput."""
    return connected(entry_of(name, known_hosts()))


def connected(entry: Entry, *, accept_new: bool = False) -> RemoteHost:
    """The host of `entry`; on a terminal SSH may ask for a password, or whether the host's key is right."""
    ask = call_on_terminal if sys.stdin.isatty() and sys.stderr.isatty() else None
    return RemoteHost(entry, default_home(), accept_new=accept_new, ask=ask)
