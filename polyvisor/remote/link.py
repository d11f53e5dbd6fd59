"""The one place that opens SSH to hosts, through OpenSSH's own program.

So everything that a user has set up for SSH holds here too: the agent, key files, ~/.ssh/config with its jump hosts, known
hosts, security keys. The first command opens a connection that the next ones share for a minute (ControlMaster, ssh_config(5)).
Why OpenSSH and not a library: docs/design/remote-hosts.md.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from polyvisor.errors import HostKeyChanged, HostKeyUnknown, LoginRefused, PolyvisorError, TimedOut, Unavailable
from polyvisor.process import find_program
from polyvisor.remote.address import Entry

# OpenSSH makes the socket under a longer name first; the path of a Unix socket has at most 107 bytes (unix(7)).
_LOGIN = 8
_LONGEST_DIRECTORY = 107 - len("/0123456789012345678901234567890123456789.0123456789012345") - _LOGIN
KEEPALIVE_S, KEEPALIVES = 5, 3


class Link:
    """SSH to one host. `shared` is the directory for sockets of shared connections; None shares none."""

    def __init__(self, entry: Entry, shared: Path | None, *, accept_new: bool = False) -> None:
        self.entry = entry
        self.accept_new = accept_new
        self._shared = shared

    def argv(self, command: str, *, interactive: bool = False) -> list[str]:
        """The command that has the host's shell run `command`; raises Unavailable without OpenSSH.

        Unless `interactive`, SSH asks nothing: what it would ask for is an error.
        """
        return [*self._ssh(interactive), "-T", "--", self._destination, command]

    def stop_sharing(self) -> list[str] | None:
        """The command after which no new session goes through the shared connection; those that do go on."""
        return [*self._ssh(interactive=False), "-O", "stop", "--", self._destination] if self._shared else None

    def tunnel(self, address: str, port: int) -> str:
        """The command (for a shell) whose stdin and stdout lead to a port of the host, as ProxyCommand of another ssh."""
        where = f"[{address}]:{port}"
        return shlex.join([*self._ssh(interactive=False), "-W", where, "--", self._destination]).replace("%", "%%")

    @property
    def _login(self) -> str:
        """What tells apart the shared connections of one user: a host may give other keys other rights."""
        files = f"{self.entry.identity}\n{self.entry.known_hosts}"
        own = self.entry.identity or self.entry.known_hosts
        return hashlib.sha256(files.encode()).hexdigest()[:_LOGIN] if own else ""

    @property
    def _destination(self) -> str:
        address = self.entry.address
        return f"{address.user}@{address.host}" if address.user else address.host

    def _ssh(self, interactive: bool) -> list[str]:
        entry = self.entry
        settings = {
            "BatchMode": "no" if interactive else "yes",
            "ConnectTimeout": "10",
            "ServerAliveInterval": str(KEEPALIVE_S),
            "ServerAliveCountMax": str(KEEPALIVES),
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "ClearAllForwardings": "yes",
        }
        if self.accept_new:
            settings["StrictHostKeyChecking"] = "accept-new"
        if entry.known_hosts:
            settings["UserKnownHostsFile"] = quoted(Path(entry.known_hosts))
        if entry.identity:
            settings |= {"IdentityFile": quoted(Path(entry.identity)), "IdentitiesOnly": "yes"}
        if self._shared is not None:
            settings |= {
                "ControlMaster": "auto",
                "ControlPath": quoted(self._shared, "/%C" + self._login),
                "ControlPersist": "60",
            }
        port = ["-p", str(entry.address.port)] if entry.address.port else []
        words = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        return [find_program("ssh", package="openssh-client"), *words, *port]


def quoted(path: Path, tokens: str = "") -> str:
    """`path`, and `tokens` after it, as OpenSSH reads them in a setting (ssh_config(5)).

    % begins a token, quotes and backslashes are escaped.
    """
    escaped = str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}{tokens}"'


def shared_directory(home: Path) -> Path | None:
    """A directory of this user alone for the sockets of shared connections; None where no path is short enough."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    for directory in ([Path(runtime, "polyvisor")] if runtime else []) + [home / "run"]:
        if len(os.fsencode(directory)) > _LONGEST_DIRECTORY or re.search(r"\s", str(directory)):
            continue
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            status = directory.stat()
        except OSError:
            continue
        if status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077:
            return directory
    return None


# What ssh says (its last words, in the C locale), what it means, and what to do about it.
_MEANINGS: Sequence[tuple[str, type[PolyvisorError], str, str]] = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        HostKeyChanged,
        "its host key is not the one it had before: it was reinstalled, or somebody stands between",
        "if you know why: ssh-keygen {file}-R {known_as}",
    ),
    (
        "Host key verification failed",
        HostKeyUnknown,
        "its host key is not known here",
        "polyvisor host add shows its fingerprint and asks, on a terminal; with --accept-new it is taken as it is",
    ),
    ("Permission denied", LoginRefused, "it refuses the login", "check the user, and the key: ssh {destination} true"),
    (
        "Too many authentication failures",
        LoginRefused,
        "it refuses the login after too many keys",
        "name the key: polyvisor host add --identity FILE",
    ),
    (
        "Could not resolve hostname",
        Unavailable,
        "its name is not known",
        "check the spelling; a number as 192.0.2.1 works as well",
    ),
    ("No route to host", Unavailable, "there is no route to it", "is it switched on, and the network right?"),
    ("Network is unreachable", Unavailable, "there is no route to it", "check this machine's network"),
    ("Connection refused", Unavailable, "nothing answers at its SSH port", "is sshd running there, on this port?"),
    ("timed out", TimedOut, "it does not answer", "is it switched on? Does a firewall drop SSH?"),
    ("not responding", TimedOut, "it has stopped answering", "check the network"),
    ("Connection reset", Unavailable, "it broke the connection off", "does another service listen at that port?"),
    ("Connection closed", Unavailable, "it closed the connection", "its sshd's log says why"),
    ("kex_exchange_identification", Unavailable, "what answers there is not SSH", "check the port"),
)


def explained(entry: Entry, stderr: str) -> PolyvisorError:
    """The error that ssh's words on stderr mean."""
    address = entry.address
    known_as = f"[{address.host}]:{address.port}" if address.port not in (None, 22) else address.host
    for words, kind, meaning, hint in _MEANINGS:
        if words in stderr:
            destination = (
                (f"-i {shlex.quote(entry.identity)} " if entry.identity else "")
                + (f"-p {address.port} " if address.port else "")
                + (f"{address.user}@{address.host}" if address.user else address.host)
            )
            file = f"-f {shlex.quote(entry.known_hosts)} " if entry.known_hosts else ""
            hint = hint.format(known_as=shlex.quote(known_as), file=file, destination=destination)
            return kind(f"host '{entry.name}' ({entry.url}): {meaning}", hint=hint)
    return unexplained(entry, stderr)


def unexplained(entry: Entry, stderr: str) -> PolyvisorError:
    """An error with the last words on stderr."""
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "ssh ended without a word")
    return Unavailable(f"host '{entry.name}' ({entry.url}): {last.strip()}", hint="ssh -v tells more")
