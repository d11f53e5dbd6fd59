"""The hosts of a comparison: what each can run, its shell, and which targets are measured where."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from polyvisor.compare.cap import cap_refusal
from polyvisor.compare.machine import Shell
from polyvisor.compare.target import Kind, Target, offered, parse_target, refusal
from polyvisor.errors import InvalidInput, Unavailable
from polyvisor.host.api import HostApi
from polyvisor.process import Completed, run
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.link import explained
from polyvisor.ssh import SSH_FAILED
from polyvisor.status import HostStatus
from polyvisor.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Place:
    """A host by the name that targets have for it; None is the one that the command is about."""

    name: str | None
    api: HostApi
    status: HostStatus

    @property
    def shell(self) -> Shell:
        return shell_of(self.api)

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        return not isinstance(self.api, RemoteHost)

    def __str__(self) -> str:
        return self.name or "this host"


def shell_of(api: HostApi) -> Shell:
    """What runs scripts on the host behind `api`."""

    async def here(script: str, timeout_s: float) -> Completed:
        return await run(["sh", "-c", script], timeout_s=timeout_s, check=False)

    if not isinstance(api, RemoteHost):
        return here

    async def there(script: str, timeout_s: float) -> Completed:
        argv = api.link.argv(f"sh -c {shlex.quote(script)}")
        completed = await run(argv, timeout_s=timeout_s, check=False)
        if completed.status == SSH_FAILED:
            raise explained(api.entry, completed.stderr)
        return completed

    return there


def refused(target: Target, place: Place) -> str | None:
    """Why `target` can't be measured at `place`, or None."""
    if reason := refusal(target, place.status):
        return reason
    if target.cpu_cap is None:
        return None
    return cap_refusal() if place.is_here else "outside of Xen, cpu_limit works on this machine alone"


def choose_targets(texts: Sequence[str], places: Sequence[Place], *, everywhere: bool) -> list[Target]:
    """The targets that `texts` name, each with the host where it is to be had.

    One without a host is taken at the first of `places` that has it, or, with `everywhere`, at each that has it. Without
    `texts` it is everything that the places can run. Raises InvalidInput, Unavailable with the reasons.
    """
    if not texts:
        alone = len(places) == 1
        found = [t for place in places for t in offered(place.status, place.name)]
        found = [replace(t, label=t.kind.value) for t in found] if alone else found
        if not found:
            raise Unavailable(f"nothing here can run a guest: {places[0].status.hypervisor_reason}")
        return found
    return [target for text in texts for target in _placed(parse_target(text), text, places, everywhere)]


def _placed(target: Target, text: str, places: Sequence[Place], everywhere: bool) -> list[Target]:
    candidates = [place for place in places if target.host is None or place.name == target.host]
    able = [place for place in candidates if refused(target, place) is None]
    if not able:
        reasons = "; ".join(f"{place}: {refused(target, place)}" for place in candidates)
        raise Unavailable(
            f"target '{text}' is not available: {reasons}", hint="polyvisor host shows what works; polyvisor lab up"
        )
    if target.host is not None or not everywhere:
        return [replace(target, host=able[0].name)]
    if len(able) == 1:
        return [replace(target, host=able[0].name)]
    return [parse_target(f"{text}@{place.name}" if place.name else text) for place in able]


def seeks_hosts(texts: Sequence[str]) -> bool:
    """Whether hosts that nobody has named may be needed: emulation, and a host itself, are to be had on any."""
    targets = [parse_target(text) for text in texts]
    return not targets or any(t.host is None and t.kind not in (Kind.TCG, Kind.NATIVE) for t in targets)


def hosts_named(texts: Sequence[str], hosts: Sequence[str]) -> list[str]:
    """The hosts that `--hosts` and the targets name, each once; raises InvalidInput for targets that are none."""
    named = [target.host for target in map(parse_target, texts) if target.host]
    for host in hosts:
        if not host:
            raise InvalidInput("hosts", ",".join(hosts), "names no host", hint="write --hosts big,small")
    return list(dict.fromkeys((*hosts, *named)))
