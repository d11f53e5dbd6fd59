"""What `xl list -v` prints, and what `xl create -F` says in its log: which domains there are, and why one ended.

    Name          ID   Mem VCPUs  State   Time(s)   UUID   Reason-Code  Security Label

One line a domain (tools/xl/xl_list.c, list_domains). State is six columns: running, blocked, paused, shut down, why (a
letter of `-rscwS`, a dash for power-off), dying; all dashes for a domain that waits for a CPU. The reason is the same as a
number. Names of other people's domains may hold blanks, so lines are read from the right end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from polyvisor.errors import ProcessFailed
from polyvisor.status import VMState
from polyvisor.values import dataclass

_LINE = re.compile(
    r"(?P<name>.*\S)\s+(?P<id>\d+)\s+(?P<memory>\d+)\s+(?P<vcpus>\d+)\s+(?P<state>[-r][-b][-p][-s][-rscwS?][-d])\s+[\d.]+\s+"
    r"(?P<uuid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\s+(?P<reason>-|\d+)(?:\s.*)?\Z"
)
_BEGUN = re.compile(r"Waiting for domain \S+ \(domid (\d+)\) to die \[pid (\d+)\]\Z")
_SHUT_DOWN = re.compile(r"Domain \d+ has shut down, reason code (\d+) 0x[0-9a-f]+\Z")
_DESTROYED = re.compile(r"Domain \d+ has been destroyed\.\Z")
_GOING_ON = "Done. Rebooting now"
# tools/libs/light/libxl_internal.c, libxl__logv, and tools/libs/ctrl/xc_private.c, xc_report_error: where in the source it was.
_WHERE = re.compile(r"(?:libxl|xc): error: (?:panic: )?[\w.]+:\d+: ?(?:\w+: )?(?:Domain \d+:)?")
OURS = "polyvisor: destroyed on request"

# xen/include/public/sched.h, SHUTDOWN_*.
POWEROFF, REBOOT, SUSPEND, CRASH, WATCHDOG, SOFT_RESET = range(6)
_CRASHES = {
    CRASH: "the guest's kernel has crashed",
    WATCHDOG: "the guest's watchdog has run out",
    SUSPEND: "the guest has suspended itself, and its memory was given up",
}


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A domain of Xen; `reason` is its shutdown code where it is shut down, `vcpus` how many of them are online."""

    id: int
    name: str
    state: str
    reason: int | None = None
    memory_mib: int = 0
    vcpus: int = 0

    @property
    def shut_down(self) -> bool:
        return self.state[3] == "s"

    @property
    def suspended(self) -> bool:
        """Whether its guest has suspended itself, as it does to be saved, and was not told to go on yet."""
        return self.shut_down and self.reason == SUSPEND

    @property
    def dying(self) -> bool:
        """Whether only its memory is left to be given back."""
        return self.state[5] == "d"

    @property
    def paused(self) -> bool:
        return self.state[2] == "p"


def parse_list(text: str) -> Mapping[str, Domain]:
    """The domains in what `xl list -v` printed, by UUID, the control domain among them; raises ProcessFailed for anything else.

    A name that is not known is `(null)`: xl prints this for a domain which is just being made or taken down.
    """
    header, _, rest = text.lstrip().partition("\n")
    if header.split()[:2] != ["Name", "ID"] or "UUID" not in header:
        raise ProcessFailed(["xl", "list", "-v"], 0, f"what it printed begins with {header[:40]!r}")
    domains = {}
    for line in filter(str.strip, rest.splitlines()):
        if (match := _LINE.match(line)) is None:
            raise ProcessFailed(["xl", "list", "-v"], 0, f"what it printed has no good line {line[:80]!r}")
        reason = None if match["reason"] == "-" else int(match["reason"])
        domains[match["uuid"]] = Domain(
            id=int(match["id"]),
            name=match["name"],
            state=match["state"],
            reason=reason,
            memory_mib=int(match["memory"]),
            vcpus=int(match["vcpus"]),
        )
    return domains


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the log of an `xl create -F` tells of its VM.

    `domain` is the number of the domain that it waits for, or waited for last; None where none was made. `pid` is its own.
    `state` is None for as long as nothing has ended: xl lives, or was killed itself.
    """

    domain: int | None = None
    pid: int | None = None
    boots: int = 0
    state: VMState | None = None
    reason: str | None = None


def read_log(text: str) -> Told:
    """What happened, by the lines that xl writes as it sees the domain end (tools/xl/xl_vmcontrol.c, create_domain)."""
    domain = pid = code = None
    boots, state, reason = 0, None, None
    for line in map(str.strip, text.splitlines()):
        if match := _BEGUN.match(line):
            domain, pid, boots, state, reason, code = int(match[1]), int(match[2]), boots + 1, None, None, None
        elif match := _SHUT_DOWN.match(line):
            code = int(match[1])
            state = VMState.CRASHED if code in _CRASHES else VMState.STOPPED
            reason = _CRASHES.get(code)
        elif line == _GOING_ON:
            state, reason = None, None
        elif line == OURS:
            state, reason = VMState.STOPPED, None
        elif _DESTROYED.match(line) and state is None:
            state, reason = VMState.CRASHED, "its domain was destroyed by somebody else"
    return Told(domain=domain, pid=pid, boots=boots, state=state, reason=reason)


def read_errors(text: str, most: int = 2) -> str | None:
    """What xl says went wrong in a creation, at most the first `most` errors: the later ones are consequences."""
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower() or "failed" in line.lower()]
    return "; ".join(dict.fromkeys(_WHERE.sub("", line) for line in lines[:most])) or None
