"""Whether the disks of a domain are served, by what is in xenstore.

A disk of ours is served by a QEMU. One that can't open it says so in its own log, and in xenstore its half of the disk stays in
its first state; `xl` starts the guest all the same, without it. QEMU has opened disks before xl lets the guest go.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from polyvisor.errors import CannotStart
from polyvisor.process import find_program, run
from polyvisor.waiting import pause

OPENED_S = 10.0
_ANSWER_S = 30.0
_POLL_S = 0.1
_INITIALISING = 1  # xen/include/public/io/xenbus.h
_LINE = re.compile(r"^(?P<path>\S+/\d+)/(?P<key>dev|state) = \"(?P<value>\w+)\"$", re.MULTILINE)
_LOGS = Path("/var/log/xen")
_FAILED = re.compile(r"(?:error|failed|could not|unknown|unsupported)", re.IGNORECASE)


async def require_served(domain: int, name: str) -> None:
    """Raise CannotStart, with the QEMU's own words, where one of the disks of `domain` is not served."""
    deadline = time.monotonic() + OPENED_S
    while missing := unserved(await _backends(domain)):
        if time.monotonic() > deadline:
            said = _said(name)
            raise CannotStart(
                f"Xen's QEMU does not serve the disk {', '.join(missing)}" + (f": {said}" if said else ""),
                hint=f"see {_LOGS}/qemu-dm-{name}.log on that host",
            )
        await pause(_POLL_S)


def unserved(text: str) -> list[str]:
    """The disks, as xvda, that nobody serves, by what `xenstore-ls -f` prints of their backends."""
    disks: dict[str, dict[str, str]] = {}
    for match in _LINE.finditer(text):
        disks.setdefault(match["path"], {})[match["key"]] = match["value"]
    return [each["dev"] for each in disks.values() if "dev" in each and int(each.get("state", 0)) <= _INITIALISING]


async def _backends(domain: int) -> str:
    program = find_program("xenstore-ls", package="xenstore-utils")
    # It fails where there is nothing: a guest without disks.
    done = await run([program, "-f", f"/local/domain/0/backend/qdisk/{domain}"], timeout_s=_ANSWER_S, check=False)
    return done.stdout


def _said(name: str) -> str:
    """What QEMU said went wrong with the disks of domain `name`."""
    try:
        lines = (_LOGS / f"qemu-dm-{name}.log").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in lines if _FAILED.search(line)), "")
