"""One entry of the catalogue, and the file in which users write their own.

images:
  - name: house-debian
    os: Debian 12 with our settings
    url: https://images.example/house-debian.qcow2.xz
    checksums: https://images.example/SHA256SUMS     # or checksum: sha256:…
    user: admin
    memory_mib: 1024
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from polyvisor.errors import InvalidInput, PolyvisorError
from polyvisor.files import storage_errors
from polyvisor.images.checksum import parse_checksum
from polyvisor.images.formats import parse_format
from polyvisor.images.image import Seed
from polyvisor.images.store import check_image_name
from polyvisor.values import dataclass

MAX_FILE = 256 << 10
MAX_ENTRIES = 1000
_OPENING = ("[", "{", "<block sequence start>", "<block mapping start>")
_CLOSING = ("]", "}", "<block end>")
_MAX_DEPTH = 10
_MEMORY_MIB = (16, 1 << 20)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An image that can be fetched from `url`.

    Its checksum is `checksum`, or what the vendor's file at `checksums` says of the last part of `url`. `user` is whom to
    log in as, `memory_mib` what a VM gets that does not ask, `format` only needed for a raw disk without a boot signature.
    """

    name: str
    url: str
    os: str | None = None
    checksums: str | None = None
    checksum: str | None = None
    user: str | None = None
    memory_mib: int = 512
    format: str | None = None
    seed: Seed = Seed.NOCLOUD


def load_entries(path: Path) -> list[Entry]:
    """The entries of a user's catalogue file; none where there is no file. Raises InvalidInput, NotPermitted."""
    try:
        with storage_errors(f"reading {path}"), path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except PolyvisorError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    return parse_entries(data)


def parse_entries(data: bytes) -> list[Entry]:
    """The entries that the text of a catalogue file lists; raises InvalidInput, which names the field."""
    raw = _yaml(data)
    if not isinstance(raw, dict) or set(raw) != {"images"} or not isinstance(raw["images"], list):
        raise InvalidInput("catalogue.yaml", type(raw).__name__, "must be 'images:' and a list")
    if len(raw["images"]) > MAX_ENTRIES:
        raise InvalidInput("images", len(raw["images"]), f"has more than {MAX_ENTRIES} entries")
    entries = [_entry(f"images[{index}]", item) for index, item in enumerate(raw["images"])]
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInput("images", twice[0], "is there twice")
    return entries


def _yaml(data: bytes) -> object:
    import yaml

    if len(data) > MAX_FILE:
        raise InvalidInput("catalogue.yaml", f"{len(data)} bytes", f"is larger than {MAX_FILE >> 10} KiB")
    try:
        depth = 0
        for token in yaml.scan(data):
            # An alias can stand for a list of aliases, and so on: a short text that grows without end.
            if isinstance(token, yaml.AliasToken):
                raise InvalidInput("catalogue.yaml", "*", "aliases are not allowed")
            kind = getattr(token, "id", "")
            depth += (kind in _OPENING) - (kind in _CLOSING)
            if depth > _MAX_DEPTH:  # the parser's time grows with the square of it
                raise InvalidInput("catalogue.yaml", kind, "is nested too deeply")
        return yaml.safe_load(data)
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "the text"
        raise InvalidInput("catalogue.yaml", where, "is not YAML") from error


def _entry(where: str, raw: object) -> Entry:
    if not isinstance(raw, dict):
        raise InvalidInput(where, raw, "must be a mapping with name and url")
    known = {field.name: field for field in fields(Entry)}
    if unknown := [key for key in raw if key not in known]:
        raise InvalidInput(f"{where}.{unknown[0]}", raw[unknown[0]], "unknown key", hint=f"one of: {', '.join(known)}")
    for name, field in known.items():
        if name not in raw and field.default is MISSING:
            raise InvalidInput(f"{where}.{name}", "", "is missing")
    values: dict[str, Any] = {key: _value(f"{where}.{key}", key, value) for key, value in raw.items()}
    entry = Entry(**values)
    if entry.checksum is None and entry.checksums is None:
        raise InvalidInput(
            f"{where}.checksum", "", "is missing", hint="give checksum: sha256:… or checksums: the address of a list"
        )
    return entry


def _value(where: str, key: str, value: object) -> object:
    """The value of one key, checked."""
    if key == "memory_mib":
        if type(value) is not int or not _MEMORY_MIB[0] <= value <= _MEMORY_MIB[1]:
            raise InvalidInput(where, value, f"must be a number from {_MEMORY_MIB[0]} to {_MEMORY_MIB[1]}")
        return value
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 2048:
        raise InvalidInput(where, value, "must be a line of text")
    match key:
        case "name":
            return check_image_name(value)
        case "url" | "checksums" if not value.startswith(("http://", "https://")):
            raise InvalidInput(where, value, "must be an http or https address")
        case "checksum":
            return str(parse_checksum(value))
        case "format":
            return str(parse_format(value))
        case "seed" if value not in tuple(Seed):
            raise InvalidInput(where, value, f"must be one of: {', '.join(Seed)}")
        case "seed":
            return Seed(value)
    return value
