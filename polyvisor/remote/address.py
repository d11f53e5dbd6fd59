"""Where a host is: `ssh://user@host:port`, and which hosts a user has given names (`<home>/hosts/<name>.json`)."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from polyvisor.errors import InvalidInput, NotFound, PolyvisorError
from polyvisor.files import make_directory, storage_errors, write_atomic
from polyvisor.spec.parse import structure, unstructure
from polyvisor.values import dataclass

FORMAT = 1
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?\Z")
_ADDRESS = re.compile(
    r"(?:ssh://)?(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9._-]*)@)?"
    r"(?P<host>[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?\Z"
)


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where SSH finds a host. What is None is left to the user's own configuration of SSH."""

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{f'{self.user}@' if self.user else ''}{host}{f':{self.port}' if self.port else ''}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A host that has a name here.

    `identity` and `known_hosts` are files for SSH, in place of those of its configuration; `home` is where VMs are kept there.
    """

    name: str
    url: str
    added_at: float
    identity: str | None = None
    known_hosts: str | None = None
    home: str | None = None

    @property
    def address(self) -> Address:
        return parse_address(self.url)


def parse_address(text: str) -> Address:
    """The address in ssh://user@host:port; user, port and ssh:// may be left out. Raises InvalidInput."""
    match = _ADDRESS.match(text)
    if match is None:
        raise InvalidInput("address", text, "is not the address of a host", hint="write ssh://user@host:port")
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise InvalidInput("address", text, "has no such port", hint="use 1 to 65535")
    return Address(host=match["host"].strip("[]"), user=match["user"], port=port)


class Hosts:
    """The hosts that have names in a home."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def names(self) -> list[str]:
        if not self.directory.is_dir():
            return []
        with storage_errors("listing the hosts"):
            return sorted(path.stem for path in self.directory.glob("[a-z0-9]*.json"))

    def find(self, name: str) -> Entry | None:
        """The host called `name`, or None; raises InvalidInput for what is no name, PolyvisorError for a damaged entry."""
        path = self._path(name)
        try:
            raw = json.loads(path.read_bytes())
            if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
                raise ValueError(f"it is not of format {FORMAT}")
            return structure({"name": name, **raw}, Entry)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError, InvalidInput) as error:
            raise PolyvisorError(
                f"the entry of host '{name}' can't be read: {error}", hint=f"add it anew: polyvisor host rm {name}"
            ) from error

    def get(self, name: str) -> Entry:
        """The host called `name`; raises NotFound, and as `find`."""
        if entry := self.find(name):
            return entry
        known = ", ".join(self.names()) or "none yet"
        raise NotFound(f"there is no host '{name}'", hint=f"known: {known}; polyvisor host add {name} ssh://user@host")

    def add(self, entry: Entry) -> None:
        """Note a host, in place of one of this name."""
        path = self._path(entry.name)
        plain = {key: value for key, value in unstructure(entry).items() if key != "name"}
        with storage_errors(f"adding host '{entry.name}'"):
            make_directory(self.directory, 0o700)
            write_atomic(path, json.dumps({"format": FORMAT, **plain}, indent=2) + "\n")

    def remove(self, name: str) -> None:
        """Forget a host; raises NotFound."""
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            self.get(name)

    def _path(self, name: str) -> Path:
        if not _NAME.match(name):
            raise InvalidInput("host", name, "is not a host's name", hint="use 1 to 63 of a-z 0-9 . -")
        return self.directory / f"{name}.json"


def entry_of(text: str, hosts: Hosts) -> Entry:
    """The host that `text` names, or whose address it is; raises NotFound, InvalidInput."""
    if "@" in text or "://" in text:
        return Entry(name=str(parse_address(text)), url=str(parse_address(text)), added_at=time.time())
    return hosts.get(text)
