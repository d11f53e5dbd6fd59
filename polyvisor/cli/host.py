"""`host` and `doctor`: the machine, what it can run, and how to mend what it can't."""

from __future__ import annotations

import argparse

from polyvisor.cli.context import Context
from polyvisor.cli.table import memory, pairs, table
from polyvisor.status import CheckResult, HostStatus


def add_host(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_host)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_doctor)


def _host(context: Context, options: argparse.Namespace) -> int:
    status = context.run(context.host.status())
    if context.json:
        context.print_json(status)
    else:
        print(pairs(_lines(status)))
    return 0


def _lines(status: HostStatus) -> list[tuple[str, str]]:
    free = f"{status.storage_free_mib / 1024:.1f} GiB free" if status.storage_free_mib is not None else "unknown"
    return [
        ("host", status.name),
        ("kernel", f"{status.kernel} ({status.architecture})"),
        ("cpu", f"{status.cpus} × {status.cpu_model}"),
        ("memory", f"{memory(status.memory_mib)}, {memory(status.memory_free_mib)} available"),
        ("home", f"{status.home}, {free}"),
        *((f"driver {c.driver}", c.version or "not found") for c in status.capabilities),
        *(
            (a.name, f"{'yes' if a.available else 'no'}: {a.reason}")
            for c in status.capabilities
            for a in c.accelerators
        ),
        *((f"no {verb}", reason) for c in status.capabilities for verb, reason in c.missing.items()),
        ("runs on", status.hypervisor or f"nothing: {status.hypervisor_reason}"),
        ("VMs", ", ".join(f"{count} {state}" for state, count in status.vms_by_state.items()) or "none"),
    ]


def _doctor(context: Context, options: argparse.Namespace) -> int:
    """Exits with 1 where something is missing that every VM needs."""
    checks = context.run(context.host.check())
    if context.json:
        context.print_json(checks)
    else:
        print(table(("", "CHECK", "FOUND"), [(_MARKS[c.result], c.name, c.detail) for c in checks]))
        if remedies := [(c.name, c.remedy) for c in checks if c.remedy and c.result is not CheckResult.OK]:
            print("\nto mend:\n" + "\n".join(f"  {name}: {remedy}" for name, remedy in remedies))
    return int(any(check.result is CheckResult.MISSING for check in checks))


_MARKS = {CheckResult.OK: "ok", CheckResult.WARNING: "warning", CheckResult.MISSING: "MISSING"}
