"""The one place that calls `xl`, Xen's own toolstack (xl(1)), and reads what it prints."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence

from polyvisor.errors import ProcessFailed, Unavailable
from polyvisor.process import run
from polyvisor.values import dataclass

ANSWER_S = 60.0


@dataclass(frozen=True, kw_only=True)
class XenInfo:
    """What `xl info` says of a Xen host; memory in MiB."""

    version: str
    virt_caps: tuple[str, ...]
    capabilities: tuple[str, ...]
    cpus: int
    total_memory_mib: int
    free_memory_mib: int
    command_line: str

    @property
    def modes(self) -> tuple[str, ...]:
        """Virtualization modes of guests: paravirtual ones need no hardware, the others do (`hvm` in virt_caps).

        Before Xen 4.14 virt_caps had no word for `pv`, and every x86 Xen ran paravirtual guests.
        """
        pv = "pv" in self.virt_caps or not any(word.startswith(("pv", "hap")) for word in self.virt_caps)
        hvm = "hvm" in self.virt_caps
        return (*(("pvh", "hvm") if hvm else ()), *(("pv",) if pv else ()))


async def info() -> XenInfo:
    """What Xen this host runs; raises Unavailable without `xl`, ProcessFailed where it fails, TimedOut where it hangs."""
    return parse_info((await xl("info")).strip())


async def xl(*words: str) -> str:
    """What `xl` prints; raises Unavailable without it, ProcessFailed, TimedOut."""
    return (await run([program(), *words], timeout_s=ANSWER_S)).stdout


def program() -> str:
    """Where `xl` is; raises Unavailable."""
    found = shutil.which("xl", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise Unavailable(
            "the program 'xl' is not installed", hint="install Xen's tools: apt-get install xen-system-amd64"
        )
    return found


def parse_info(text: str) -> XenInfo:
    """`xl info` as printed by Xen 4.14 to 4.20: a name, a colon and a value a line. Raises ProcessFailed for anything else."""
    pairs = (line.partition(":") for line in text.splitlines())
    values = {name.strip(): value.strip() for name, colon, value in pairs if colon}
    try:
        return XenInfo(
            version=f"{values['xen_major']}.{values['xen_minor']}{values['xen_extra']}",
            virt_caps=_words(values.get("virt_caps", "")),
            capabilities=_words(values["xen_caps"]),
            cpus=int(values["nr_cpus"]),
            total_memory_mib=int(values["total_memory"]),
            free_memory_mib=int(values["free_memory"]),
            command_line=values.get("xen_commandline", ""),
        )
    except (KeyError, ValueError) as error:
        raise ProcessFailed(["xl", "info"], 0, f"what it printed has no good {error}") from error


def release(version: str) -> tuple[int, ...]:
    """The release that a version is of, as numbers to be compared: 4.17.5-pre is of (4, 17)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def missing_modes(modes: Sequence[str]) -> dict[str, str]:
    """Why a Xen lacks modes, by mode."""
    reasons = {
        "pvh": "the CPU offers Xen no hardware virtualization (no hvm in virt_caps)",
        "hvm": "the CPU offers Xen no hardware virtualization (no hvm in virt_caps)",
        "pv": "this Xen was built without paravirtual guests (no pv in virt_caps)",
    }
    return {mode: reason for mode, reason in reasons.items() if mode not in modes}
