"""What two Polyvisors say to each other: JSON-RPC 2.0, a message a line, and typed values as plain data.

The verbs are those of `HostApi`; the types of their arguments are read from it, so that there is one place that says what
a verb takes. A call that changes something carries a key: sent again after a lost connection it is not done
again (see `calls.py`). While it is under way the other side may send

    {"jsonrpc": "2.0", "method": "progress", "params": {"id": 7, "step": {"phase": "downloading", "done": 1}}}

and is told that nobody waits any more by the method `cancel`. Specification: https://www.jsonrpc.org/specification
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from polyvisor.errors import InvalidInput, PolyvisorError, ProcessFailed, ProtocolError, shortened
from polyvisor.host.api import HostApi
from polyvisor.spec.parse import convert, unstructure
from polyvisor.values import dataclass

PARSE_ERROR, INVALID_REQUEST, NO_METHOD = -32700, -32600, -32601
FAILED = -32000  # the verb raised a PolyvisorError, which `data` describes
MAX_LINE = 64 << 20

# These give bytes or events without end, and have a connection of their own.
STREAMS = ("console", "log", "events", "image_export", "parcel", "arrive", "vm_export")
# These change nothing, so a call may be sent again without a key.
LOOKS = (
    "status",
    "check",
    "names",
    "vms",
    "show",
    "ssh_target",
    "wait_for_ssh",
    "host_id",
    "move_show",
    "arrival_check",
    "snapshot_list",
    "disk_list",
    "nic_list",
    "snapshot_show",
    "image_list",
    "image_show",
    "image_inspect",
    "image_catalogue",
    "template_list",
    "memory_use",
)
# These do nothing more when they are done again; of the others nobody knows after half of them was done.
REPEATABLE = (
    "start",
    "save",
    "stop",
    "kill",
    "pause",
    "resume",
    "image_build",
    "image_import",
    "image_pull",
    "add_forward",
    "set",
    "prepare_host",
    "move_begin",
    "move_finish",
    "move_cancel",
    "arrival_release",
    "arrival_cancel",
    "template_warm",
    "snapshot_revert",
    "disk_grow",
)

# Types of answers that `HostApi` names without having them imported; whoever calls knows how to read an answer.
_ANSWERS = {"Inspection": object}


@dataclass(frozen=True, kw_only=True)
class Access:
    """An `SSHTarget` for another machine: what is in the files, rather than where they are.

    `own` says that the identity is for this VM alone, which brought it from another host.
    """

    address: str
    port: int
    user: str
    alias: str
    identity: str
    known_hosts: str
    own: bool = False


@dataclass(frozen=True)
class Verb:
    """A method of HostApi, and the types of its arguments; `options` says that it takes others beside, text and numbers."""

    name: str
    parameters: Mapping[str, Any]
    required: frozenset[str]
    options: bool
    progress: bool

    def arguments(self, raw: object) -> dict[str, Any]:
        """Typed arguments from plain data; raises InvalidInput."""
        if not isinstance(raw, dict):
            raise InvalidInput("params", raw, "is not a mapping of names to values")
        known = {**self.parameters, **(dict.fromkeys(raw, str | int | None) if self.options else {})}
        for key in raw:
            if key not in known:
                raise InvalidInput(key, raw[key], f"is unknown to {self.name}")
        if missing := self.required - raw.keys():
            raise InvalidInput(sorted(missing)[0], None, f"is missing for {self.name}")
        return {
            key: _option(key, raw[key]) if key not in self.parameters else convert(raw[key], known[key], key)
            for key in known
            if key in raw
        }


def _option(key: str, value: object) -> object:
    if value is not None and not isinstance(value, (str, int)):
        raise InvalidInput(key, value, "is neither text nor a whole number")
    return value


@cache
def verbs() -> dict[str, Verb]:
    """All verbs that are called and answered, by name."""
    found = {name: member for name, member in vars(HostApi).items() if inspect.iscoroutinefunction(member)}
    return {name: _verb(name, member) for name, member in found.items() if name not in (*STREAMS, "close")}


def _verb(name: str, method: Any) -> Verb:
    hints = typing.get_type_hints(method, localns=_ANSWERS)
    parameters = {
        p.name: p for p in inspect.signature(method).parameters.values() if p.name not in ("self", "progress")
    }
    plain = {key: hints[key] for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    return Verb(
        name=name,
        parameters=plain,
        required=frozenset(key for key in plain if parameters[key].default is inspect.Parameter.empty),
        options=len(plain) < len(parameters),
        progress="progress" in hints,
    )


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as it goes over the wire; dataclasses in it become plain data."""
    return json.dumps({"jsonrpc": "2.0", **message}, default=_plain).encode() + b"\n"


def _plain(value: object) -> object:
    return unstructure(value) if dataclasses.is_dataclass(value) else str(value)


def decode(line: bytes) -> dict[str, Any]:
    """The message of a line; raises ProtocolError."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"what came is not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise ProtocolError(f"what came is not JSON-RPC 2.0: {line[:80]!r}")
    return message


def failure(error: PolyvisorError) -> dict[str, Any]:
    """`error` as the member `error` of an answer."""
    details = {key: getattr(error, key) for key in error.details}
    return {"code": FAILED, "message": error.message, "data": {**error.to_dict(), "details": details}}


def raised(error: object) -> PolyvisorError:
    """The error that the member `error` of an answer describes."""
    if not isinstance(error, dict):
        return ProtocolError(f"an error that is none: {shortened(error)}")
    data = error.get("data")
    if not isinstance(data, dict):
        return ProtocolError(f"the host answered: {_text(error.get('message')):.200}")
    kind = next((kind for kind in _kinds(PolyvisorError) if kind.code == data.get("code")), PolyvisorError)
    made = kind.__new__(kind)
    hint = data.get("hint")
    PolyvisorError.__init__(made, _text(data.get("message")), hint=None if hint is None else _text(hint))
    details = data.get("details")
    for key in kind.details:
        setattr(made, key, details.get(key) if isinstance(details, dict) else None)
    if isinstance(made, ProcessFailed):  # its parts are shown with --debug
        made.argv = [_text(word) for word in made.argv] if isinstance(made.argv, list) else []
        made.stderr = _text(made.stderr)
    return made


def _text(value: object) -> str:
    return value if isinstance(value, str) else shortened(value)


def _kinds(kind: type[PolyvisorError]) -> list[type[PolyvisorError]]:
    return [kind, *(each for sub in kind.__subclasses__() for each in _kinds(sub))]
