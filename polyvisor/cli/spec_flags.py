"""Flags of `run` and `create`, made from the spec's own fields, and the spec that they add up to.

Each field of `VMSpec` says in its metadata what it is about and how its flag is called; nothing is declared twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from polyvisor.errors import InvalidInput, NotFound, PolyvisorError
from polyvisor.files import storage_errors
from polyvisor.spec.forward import parse_forward
from polyvisor.spec.parse import structure, unstructure
from polyvisor.spec.resources import LIMITS
from polyvisor.spec.vm import MAX_USER_DATA, Disk, Nic, VMSpec

_SIZE = re.compile(r"(\d{1,12})(?:\.(\d{1,3}))?\s*(?:([KMGT])(?:i?B)?)?\Z", re.IGNORECASE)
_MIB = {"M": 1, "G": 1 << 10, "T": 1 << 20}


def add_spec_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting of a VM but its image."""
    kinds = get_type_hints(VMSpec)
    for field in dataclasses.fields(VMSpec):
        if field.name != "image":
            parser.add_argument(*_flags(field), dest=field.name, **_options(field, kinds[field.name]))
    parser.add_argument(
        "-p",
        "--publish",
        metavar="FORWARD",
        action="append",
        default=[],
        help="a port forward: 8080:80, :80, 53:53/udp",
    )


def spec_from_flags(options: argparse.Namespace, name: str) -> VMSpec:
    """The spec that the flags ask for; raises InvalidInput, NotFound."""
    given = {
        field.name: value
        for field in dataclasses.fields(VMSpec)
        if field.name not in ("name", "image") and (value := getattr(options, field.name)) is not None
    }
    readers: dict[str, Callable[[Any], Any]] = {
        "memory_mib": lambda v: size_mib(v, "memory"),
        "memory_max_mib": lambda v: size_mib(v, "memory_max"),
        "disks": lambda v: tuple(_disk(item, f"disks[{i}]") for i, item in enumerate(v)),
        "nics": lambda v: tuple(structure({"network": item}, Nic, f"nics[{i}]") for i, item in enumerate(v)),
        "ssh_keys": _keys,
        "user_data": _user_data,
        "labels": _labels,
    }
    values: dict[str, Any] = {key: readers.get(key, lambda v: v)(value) for key, value in given.items()}
    return _published(VMSpec(name=name, image=options.image, **values), options.publish)


def size_mib(text: str, field: str) -> int:
    """``512``, ``512M``, ``1.5G`` → MiB; raises InvalidInput."""
    match = _SIZE.match(text.strip())
    unit = (match[3] or "").upper() if match else ""
    if match is None or unit == "K":
        raise InvalidInput(field, text, "is not an amount of memory", hint="write 512M or 2G")
    number = float(f"{match[1]}.{match[2] or 0}") * _MIB[unit or "M"]
    if number != int(number):
        raise InvalidInput(field, text, "is not a whole number of MiB", hint="write 512M or 2G")
    return int(number)


def size_gib(text: str, field: str) -> int:
    """``10``, ``10G``, ``2T`` → GiB; raises InvalidInput."""
    match = _SIZE.match(text.strip())
    unit = (match[3] or "").upper() if match else ""
    if match is None or match[2] or unit not in ("", "G", "T"):
        raise InvalidInput(field, text, "is not a size of a disk in whole GiB", hint="write 10G")
    return int(match[1]) * (1024 if unit == "T" else 1)


def _disk(text: str, place: str) -> Disk:
    return structure({"size_gib": size_gib(text, place)}, Disk, place)


def _flags(field: dataclasses.Field[Any]) -> list[str]:
    about = field.metadata
    flag = about.get("flag", f"--{field.name.replace('_', '-')}")
    return [*filter(None, [about.get("short")]), flag, *about.get("aliases", [])]


def _options(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    about: dict[str, Any] = {"help": field.metadata["about"], "default": None}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {**about, "type": _choice(kind, field.name), "metavar": "|".join(member.value for member in kind)}
    if kind is int or field.name in ("vcpus_max", *LIMITS):
        metavar = {"cpu_limit": "PERCENT", "disk_rate_limit_mib": "MIB"}.get(field.name, "N")
        return {**about, "type": whole(field.name), "metavar": metavar}
    metavars = {"memory_mib": "SIZE", "memory_max_mib": "SIZE", "disks": "SIZE", "nics": "NETWORK"}
    metavars |= {"labels": "KEY=VALUE", "user_data": "FILE", "cpu_affinity": "CPUS"}
    about["metavar"] = metavars.get(field.name, field.name.removesuffix("s").upper())
    if field.name in ("disks", "nics", "ssh_keys", "labels"):
        about |= {"action": "append", "help": f"{about['help']} (may be repeated)"}
    return about


def whole(field: str) -> Any:
    """A reader of whole numbers whose errors are ours, not argparse's."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text):
            raise InvalidInput(field, text, "is not a whole number", hint="write a number, as 2")
        return int(text)

    return read


def _choice(kind: type[Enum], field: str) -> Any:
    def read(text: str) -> Enum:
        choices = [member.value for member in kind]
        if text not in choices:
            raise InvalidInput(
                field, text, "is not a choice here", hint=f"use {', '.join(choices[:-1])} or {choices[-1]}"
            )
        return kind(text)

    return read


def _keys(texts: list[str]) -> tuple[str, ...]:
    from polyvisor.spec.load import read_ssh_key

    return tuple(read_ssh_key(text, f"ssh_keys[{i}]") for i, text in enumerate(texts))


def _user_data(name: str) -> str:
    try:
        with storage_errors(f"reading {name}"), Path(name).open("rb") as file:
            raw = file.read(MAX_USER_DATA + 1)
    except PolyvisorError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise NotFound(f"user data: there is no file {name}", hint="name a file for cloud-init") from error
        raise
    if len(raw) > MAX_USER_DATA:
        raise InvalidInput("user_data", name, "is larger than 512 KiB", hint="let it fetch what is large")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput("user_data", name, "is not text in UTF-8") from error


def _labels(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise InvalidInput("labels", text, "is not KEY=VALUE", hint="write --label tier=web")
    return dict(text.split("=", 1) for text in texts)


def _published(spec: VMSpec, forwards: list[str]) -> VMSpec:
    """`spec` with `forwards` on its first network card."""
    if not forwards:
        return spec
    for i, text in enumerate(forwards):
        parse_forward(text, f"publish[{i}]")
    if not spec.nics:
        raise InvalidInput(
            "publish", forwards[0], "the VM has no network card", hint="leave --nic out, or use --nic user"
        )
    first = structure({**unstructure(spec.nics[0]), "forwards": forwards}, Nic, "nics[0]")
    return dataclasses.replace(spec, nics=(first, *spec.nics[1:]))
