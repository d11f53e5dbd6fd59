"""`set`: vCPUs, memory, and shares of CPUs and disks of a VM, at rest and while it runs."""

from __future__ import annotations

import argparse

from polyvisor.cli.context import Context
from polyvisor.cli.show import describe
from polyvisor.cli.spec_flags import size_mib, whole
from polyvisor.host.observed import shown
from polyvisor.spec.parse import structure
from polyvisor.spec.resources import LIMITS, SETTINGS, Changes
from polyvisor.status import Resized

NONE = "none"


def add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    for flags, dest, metavar, about in (
        (("-c", "--vcpus", "--cpus"), "vcpus", "N", "number of virtual CPUs"),
        (("-m", "--memory"), "memory_mib", "SIZE", "memory, as 512M or 2G"),
        (("--vcpus-max",), "vcpus_max", "N", "how many virtual CPUs it can have while it runs; from the next boot"),
        (("--memory-max",), "memory_max_mib", "SIZE", "how much memory it can have while it runs; from the next boot"),
        (("--cpu-weight",), "cpu_weight", "N", "share of the host's CPUs where they are scarce; 100 is the usual one"),
        (("--cpu-limit",), "cpu_limit", "PERCENT", "most CPU time in percent of one of the host's CPUs, or none"),
        (("--cpu-affinity",), "cpu_affinity", "CPUS", "CPUs of the host that it runs on, as 0-3,6, or all"),
        (("--disk-iops-limit",), "disk_iops_limit", "N", "most requests a second of all its disks together, or none"),
        (("--disk-rate-limit",), "disk_rate_limit_mib", "MIB", "most MiB a second of all its disks together, or none"),
    ):
        parser.add_argument(*flags, dest=dest, metavar=metavar, help=about)
    parser.set_defaults(action=_set)


def _set(context: Context, options: argparse.Namespace) -> int:
    changes = _changes(options)
    resized = context.run(context.host.set(options.name, changes))
    if context.json:
        context.print_json(resized)
    else:
        context.say(describe(resized.status))
        for line in _lines(resized, changes):
            context.say(line)
    return 0


def _changes(options: argparse.Namespace) -> Changes:
    """What the flags ask for; raises InvalidInput."""
    given = {name: _read(name, text) for name in SETTINGS if (text := getattr(options, name)) is not None}
    return structure(given, Changes)


def _read(name: str, text: str) -> int | str:
    if name == "cpu_affinity":
        return text
    if name in ("memory_mib", "memory_max_mib"):
        return size_mib(text, name.removesuffix("_mib"))
    if name in LIMITS:
        return 0 if text == NONE else max(-1, _whole(name, text)) or -1  # 0 is no limit that can be meant
    return _whole(name, text)


def _whole(name: str, text: str) -> int:
    number: int = whole(name)(text)
    return number


def _lines(resized: Resized, changes: Changes) -> list[str]:
    """What is in force, and what waits and why."""
    lines = [f"  {name}: {shown(name, getattr(changes, name) or None)}, now" for name in resized.applied]
    for each in resized.pending:
        reason = f" ({resized.reasons[each.setting]})" if each.setting in resized.reasons else ""
        lines.append(f"  {each.setting}: {each.now} now, {each.then} at the next boot{reason}")
    if not resized.status.state.keeps_devices:
        lines.append("  in force when it starts")
    return lines
