"""What is compared: a way to run guests, on a host, with settings; or the host itself. Pure functions.

A target is written `[LABEL=]KIND[:SETTING=VALUE]…[@HOST]`: `tcg`, `xen-pv@lab-xen1`, `slow=tcg:cpu_limit=50:vcpus=2`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import field
from enum import StrEnum
from typing import Any

from polyvisor.errors import InvalidInput
from polyvisor.spec.parse import structure
from polyvisor.spec.vm import VMSpec
from polyvisor.status import HostStatus
from polyvisor.values import dataclass


class Kind(StrEnum):
    """Hypervisor and mode; `NATIVE` is the host itself, without a guest."""

    KVM = "kvm"
    XEN_PV = "xen-pv"
    XEN_PVH = "xen-pvh"
    XEN_HVM = "xen-hvm"
    TCG = "tcg"
    NATIVE = "native"

    @property
    def on_xen(self) -> bool:
        return self.value.startswith("xen-")

    @property
    def hypervisor(self) -> str:
        """Its name in a spec."""
        return self.value.partition("-")[0]


# Settings of a VM that may tell targets apart; those of `native` are fewer.
SETTINGS = ("vcpus", "memory_mib", "cpu_limit", "cpu_weight", "cpu_affinity", "cpu", "devices", "mode", "firmware")
_NUMBERS = ("vcpus", "memory_mib", "cpu_limit", "cpu_weight")
_TEXT = re.compile(r"(?:(?P<label>[a-z0-9][a-z0-9-]{0,30})=)?(?P<kind>[a-z0-9-]+)(?P<settings>(?::[^:@=]*=[^:@]*)*)\Z")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One of the things that are compared; `host` None is the host that the command is about."""

    label: str
    kind: Kind
    host: str | None = None
    settings: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As `parse_target` reads it."""
        settings = "".join(f":{key}={value}" for key, value in self.settings.items())
        return f"{self.label}={self.kind}{settings}" + (f"@{self.host}" if self.host else "")

    @property
    def cpu_cap(self) -> int | None:
        """The limit of CPU time, in percent of one CPU, that is not the hypervisor's own to keep."""
        limit = self.settings.get("cpu_limit")
        return int(limit) if limit and not self.kind.on_xen else None


def parse_target(text: str) -> Target:
    """The target that `text` describes; raises InvalidInput, with the nearest name of one."""
    what, at, host = text.partition("@")
    match = _TEXT.match(what)
    if match is None:
        raise InvalidInput("targets", text, "is not a target", hint="write it as kvm, xen-pv@HOST or slow=tcg:vcpus=2")
    kind = _kind(match["kind"])
    if at and not host:
        raise InvalidInput("targets", text, "names no host after @", hint="polyvisor host ls shows those known")
    pairs = [pair.partition("=") for pair in match["settings"].split(":")[1:]]
    settings = {key: value for key, _, value in pairs}
    target = Target(label=match["label"] or _label(what, host), kind=kind, host=host or None, settings=settings)
    _check(target, text)
    return target


def _label(what: str, host: str) -> str:
    """The name of a target that the user did not name: what it is, as a name."""
    return re.sub(r"[^a-z0-9]+", "-", (what + (f"-at-{host}" if host else "")).lower()).strip("-")[:31].strip("-")


def _kind(text: str) -> Kind:
    try:
        return Kind(text)
    except ValueError:
        raise InvalidInput("targets", text, "is not a target", hint=nearest(text, [k.value for k in Kind])) from None


def nearest(text: str, known: Sequence[str]) -> str:
    """A hint: the names nearest to `text` among `known`, or all of them."""
    from difflib import get_close_matches

    near = get_close_matches(text[:100], known, 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"


def _check(target: Target, text: str) -> None:
    for key in target.settings:
        if key not in SETTINGS:
            raise InvalidInput("targets", key, "is not a setting of a target", hint=nearest(key, SETTINGS))
        if target.kind is Kind.NATIVE and key != "cpu_limit":
            raise InvalidInput("targets", text, f"native has no guest, whose {key} could be set", hint="leave it out")
        if key == "mode" and target.kind.on_xen:
            raise InvalidInput("targets", text, "names its mode already", hint="leave mode out")
    spec_of(target, "name", "image")


def spec_of(target: Target, name: str, image: str, labels: dict[str, str] | None = None) -> VMSpec:
    """The spec of the guest that stands for `target`; raises InvalidInput for settings that can't be meant."""
    values: dict[str, Any] = {key: _value(key, text) for key, text in target.settings.items()}
    cap = values.get("cpu_limit")
    if target.kind is Kind.NATIVE:
        values = {"cpu_limit": cap} if cap is not None else {}
    else:
        values["hypervisor"] = target.kind.hypervisor
    if target.kind.on_xen:
        values["mode"] = target.kind.value.removeprefix("xen-")
    spec = structure({"name": name, "image": image, "labels": labels or {}, **values}, VMSpec, "targets")
    if target.cpu_cap is None:
        return spec
    from dataclasses import replace

    return replace(spec, cpu_limit=None)


def _value(key: str, text: str) -> str | int:
    if key not in _NUMBERS:
        return text
    if not re.fullmatch(r"\d{1,9}", text):
        raise InvalidInput(f"targets.{key}", text, "is not a whole number", hint=f"write {key}=2")
    return int(text)


def refusal(target: Target, host: HostStatus) -> str | None:
    """Why `target` can't be had on `host`, or None."""
    if target.kind is Kind.NATIVE:
        return None
    name = target.kind.hypervisor
    for driver in host.capabilities:
        for accelerator in driver.accelerators:
            if accelerator.name == name:
                return _driver_refusal(target, driver) if accelerator.available else accelerator.reason
    return "this is no Xen host: it has not been booted by Xen" if target.kind.on_xen else "no driver here knows it"


def _driver_refusal(target: Target, driver: Any) -> str | None:
    mode = target.kind.value.removeprefix("xen-") if target.kind.on_xen else target.settings.get("mode")
    if mode and mode not in driver.modes:
        return str(driver.missing.get(mode, f"{driver.driver} does not offer mode {mode}"))
    return None


def offered(host: HostStatus, name: str | None) -> list[Target]:
    """Every kind of guest that `host` can run, as targets there; `name` is the host's, None where it is not to be said."""
    kinds = [kind for kind in Kind if kind is not Kind.NATIVE]
    targets = [Target(label=_label(kind.value, name or ""), kind=kind, host=name) for kind in kinds]
    return [target for target in targets if refusal(target, host) is None]
