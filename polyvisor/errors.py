"""Every error that Polyvisor raises on purpose.

    PolyvisorError
    ├── InvalidInput        a field, a flag or a file is wrong; names field, value and remedy
    ├── NotFound            no such VM, image or file
    ├── AlreadyExists       the name is taken by something else
    ├── Busy                another command holds the VM
    ├── WrongState          the VM can't do that as it is now
    ├── NotPermitted        the user lacks the rights
    │   ├── LoginRefused    a host's SSH server does not let the user in
    │   ├── HostKeyUnknown  nobody has said yet that a host's SSH key is right
    │   └── HostKeyChanged  a host shows another SSH key than before
    ├── Unavailable         this host lacks a program, a device or a resource; or a host can't be reached
    │   ├── StorageFull     the disk is full
    │   └── ConnectionLost  the connection to a host broke after it had been there
    ├── ProtocolError       a host said something that Polyvisor's agents don't say
    ├── Unsupported         a driver declares in its Capabilities that it can't
    ├── ImageRefused        an image is corrupt, of an unknown format, or names files outside itself
    ├── CannotStart         the hypervisor refused the VM; carries its own last words
    ├── ProcessFailed       a program that Polyvisor called failed; carries command and stderr
    ├── DownloadFailed      a file could not be fetched, or is not what its checksum promises
    └── TimedOut            it did not happen in the time allowed

An error says what failed and on what; its `hint` says what to do. `code` is stable and meant for
programs, `exit_status` is what the command line exits with, `http_status` what an API answers.
`details` names the attributes that an error has beside them, for those who carry errors elsewhere.
Foreign exceptions are translated at the edge where they arise, with `from`. Only the command line exits.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import ClassVar


class PolyvisorError(Exception):
    """Base of all errors that Polyvisor raises on purpose."""

    code = "error"
    exit_status = 1
    http_status = 500
    details: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def about(self, what: str) -> None:
        """Say first what failed by it: ``VM 'a' was not saved: …``."""
        self.message = f"{what}: {self.message}"
        self.args = (self.message,)

    def to_dict(self) -> dict[str, str | None]:
        return {"code": self.code, "message": self.message, "hint": self.hint}


class InvalidInput(PolyvisorError):
    """A value that the user gave is not acceptable.

    `field` is a path such as ``disks[0].size_gib``; `value` is shown shortened.
    """

    code = "invalid-input"
    exit_status = 2
    http_status = 422
    details = ("field", "value", "problem")

    def __init__(self, field: str, value: object, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{shortened(field)[1:-1]}: {shortened(value)}: {problem}", hint=hint)
        self.field = field
        self.value = value
        self.problem = problem


class NotFound(PolyvisorError):
    code = "not-found"
    exit_status = 3
    http_status = 404


class AlreadyExists(PolyvisorError):
    code = "already-exists"
    exit_status = 4
    http_status = 409


class Busy(PolyvisorError):
    code = "busy"
    exit_status = 5
    http_status = 409


class WrongState(PolyvisorError):
    code = "wrong-state"
    exit_status = 6
    http_status = 409


class NotPermitted(PolyvisorError):
    code = "not-permitted"
    exit_status = 7
    http_status = 403


class LoginRefused(NotPermitted):
    code = "login-refused"


class HostKeyUnknown(NotPermitted):
    code = "host-key-unknown"


class HostKeyChanged(NotPermitted):
    code = "host-key-changed"


class Unavailable(PolyvisorError):
    code = "unavailable"
    exit_status = 8
    http_status = 503


class StorageFull(Unavailable):
    code = "storage-full"
    http_status = 507


class ConnectionLost(Unavailable):
    code = "connection-lost"


class ProtocolError(PolyvisorError):
    code = "protocol"
    http_status = 502


class Unsupported(PolyvisorError):
    code = "unsupported"
    exit_status = 8
    http_status = 501


class ImageRefused(PolyvisorError):
    code = "image-refused"
    exit_status = 2
    http_status = 422


class CannotStart(PolyvisorError):
    code = "cannot-start"


class DownloadFailed(PolyvisorError):
    code = "download-failed"
    http_status = 502


class TimedOut(PolyvisorError):
    code = "timed-out"
    exit_status = 9
    http_status = 504


class ProcessFailed(PolyvisorError):
    """A program that Polyvisor called ended with an error."""

    code = "process-failed"
    details = ("argv", "status", "stderr")

    def __init__(self, argv: Sequence[str], status: int, stderr: str, *, hint: str | None = None) -> None:
        last = stderr.strip().splitlines()[-1:] or [f"exit status {status}"]
        super().__init__(f"{argv[0]}: {last[0]}", hint=hint)
        self.argv = list(argv)
        self.status = status
        self.stderr = stderr

    def command(self) -> str:
        """The failed command, quoted for a shell."""
        return shlex.join(self.argv)


def shortened(value: object, limit: int = 60) -> str:
    """`value` as one printable line of at most `limit` characters, for an error message."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        text = f"{type(value).__name__} of very many digits"
    except RecursionError:
        text = f"{type(value).__name__} of very many levels"
    text = text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return f"'{text}'" if isinstance(value, str) else text


def one_line(text: str) -> str:
    """`text` on one line, for a terminal: what would not print, or would steer the terminal, is escaped."""
    if text.isprintable():  # as most are, and a list has thousands
        return text
    return escaped(" ".join(text.replace("\t", " ").splitlines()))


def escaped(text: str) -> str:
    """`text` with what would not print, or would steer the terminal, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
