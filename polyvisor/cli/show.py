"""`ls`, `show` and `events`: looking at VMs."""

from __future__ import annotations

import argparse
import shlex

from polyvisor.cli.context import Context, to_json
from polyvisor.cli.parser import seconds
from polyvisor.cli.table import age, memory, pairs, table
from polyvisor.errors import NotFound, one_line
from polyvisor.host.api import Details
from polyvisor.host.observed import shown
from polyvisor.spec.resources import SCHEDULING
from polyvisor.spec.vm import Nic, VMSpec, check_name, disk_size
from polyvisor.ssh import READY_S
from polyvisor.status import Saved, VMState, VMStatus


def wait_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of verbs that may wait for the guest."""
    parser.add_argument("-w", "--wait", action="store_true", help="return when the guest's SSH server answers")
    parser.add_argument(
        "--timeout", type=seconds, default=READY_S, metavar="SECONDS", help="how long to wait (default: %(default).0f)"
    )


def add_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these VMs")
    parser.add_argument(
        "-l", "--label", action="append", default=[], metavar="KEY[=VALUE]", help="only VMs with this label"
    )
    parser.add_argument("--state", choices=[state.value for state in VMState], help="only VMs in this state")
    parser.add_argument("-q", "--quiet", action="store_true", help="print names alone")
    parser.add_argument(
        "-u",
        "--usage",
        action="store_true",
        help="also what each occupies of the host's memory: of its own, and shared",
    )
    parser.set_defaults(action=_ls)


def add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.set_defaults(action=_show)


def add_events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these VMs")
    parser.set_defaults(action=_events)


def _ls(context: Context, options: argparse.Namespace) -> int:
    every = context.begin(context.host.vms())
    for name in options.names:
        if check_name(name) not in {status.name for status in every}:
            raise NotFound(f"there is no VM '{name}'", hint="polyvisor ls shows those that are")
    statuses = [status for status in every if _wanted(status, options)]
    if options.usage:
        return _ls_usage(context, statuses)
    if context.json:
        context.print_json(statuses)
    elif options.quiet:
        for status in statuses:
            print(one_line(status.name))
    elif statuses:
        print(
            table(
                ("NAME", "STATE", "IMAGE", "ON", "VCPUS", "MEMORY", "SSH", "UP", "REASON"), [_row(s) for s in statuses]
            )
        )
    else:
        context.note("no VMs here; begin with: polyvisor run tiny")
    return 0


def _ls_usage(context: Context, statuses: list[VMStatus]) -> int:
    """Each VM and what it occupies, and what all of them do."""
    used = context.run(context.host.memory_use([status.name for status in statuses])) if statuses else {}
    if context.json:
        context.print_json([{"status": each, "memory_use": used.get(each.name)} for each in statuses])
        return 0
    rows = [
        (status.name, status.state.value, memory(status.memory_mib), f"{use.own_mib:.1f}M", f"{use.shared_mib:.1f}M")
        if (use := used.get(status.name))
        else (status.name, status.state.value, memory(status.memory_mib), "", "")
        for status in statuses
    ]
    own, shared = (sum(getattr(use, key) for use in used.values()) for key in ("own_mib", "shared_mib"))
    print(table(("NAME", "STATE", "MEMORY", "OWN", "SHARED"), rows))
    if used:
        print(f"{len(used)} VMs occupy {own + shared:.0f} MiB: {own:.0f} of their own, {shared:.0f} that they share")
    return 0


def _wanted(status: VMStatus, options: argparse.Namespace) -> bool:
    if options.names and status.name not in options.names:
        return False
    if options.state and status.state != options.state:
        return False
    for label in options.label:
        key, equals, value = label.partition("=")
        if key not in status.labels or (equals and status.labels[key] != value):
            return False
    return True


def _row(status: VMStatus) -> tuple[str, ...]:
    on = f"{status.hypervisor}/{status.mode}" if status.hypervisor else ""
    port = next((f"{f.host_address}:{f.host_port}" for f in status.forwards if f.guest_port == 22), "")
    up = age(status.started_at) if status.state.alive else ""
    amount = f"{memory(status.memory_mib)}{_mark(status, 'memory')}" if status.memory_mib else ""
    cpus = f"{status.vcpus}{_mark(status, 'vcpus', 'cpu')}" if status.vcpus else ""
    return (status.name, status.state.value, status.image or "", on, cpus, amount, port, up, status.reason or "")


def _mark(status: VMStatus, *kinds: str) -> str:
    """A star at what the next boot changes; `show` tells more."""
    return "*" if any(setting.startswith(kinds) for setting in status.pending) else ""


def describe(status: VMStatus) -> str:
    """One VM in one line."""
    on = f" on {status.hypervisor} ({status.mode})" if status.hypervisor and status.state.alive else ""
    reason = f": {status.reason}" if status.reason else ""
    return f"{status.name} is {status.state.value}{on}{reason}"


def _show(context: Context, options: argparse.Namespace) -> int:
    details = context.begin(context.host.show(options.name))
    if context.json:
        context.print_json(details)
    else:
        print(pairs(_lines(details, debug=context.debug)))
    return 0


def _lines(details: Details, *, debug: bool) -> list[tuple[str, str]]:
    status, spec = details.status, details.spec
    lines = [
        ("name", status.name),
        ("id", status.id),
        ("state", status.state.value + (f": {status.reason}" if status.reason else "")),
        ("image", spec.image),
        (
            "on",
            f"{status.hypervisor} ({status.mode}): {details.hypervisor_reason}"
            if status.hypervisor
            else "not started yet",
        ),
        ("vcpus", _vcpus(details)),
        ("memory", _memory(details)),
        *_share_lines(spec),
        *(("pending", f"{p.setting}: {p.now} now, {p.then} at the next boot") for p in details.pending),
        ("devices", spec.devices.value),
        *((name, disk_size(disk.size_gib)) for name, disk in zip(details.disk_names, spec.disks, strict=True)),
        *((name, f"{nic.network}, {mac}") for name, nic, mac in _cards(details)),
        (
            "forwards",
            "  ".join(map(str, status.forwards)) or ("  ".join(t for n in spec.nics for t in n.forwards) or "none"),
        ),
        ("labels", "  ".join(f"{k}={v}" for k, v in status.labels.items()) or "none"),
        ("created", f"{age(status.created_at)} ago"),
        ("up", age(status.started_at) or "-"),
        ("pid", str(status.pid or "-")),
        *_saved_lines(details.saved),
        ("directory", details.directory),
    ]
    return [*lines, ("command", shlex.join(details.argv or ()))] if debug else lines


def _vcpus(details: Details) -> str:
    has = details.usage.vcpus if details.usage else None
    given, most = details.status.vcpus, details.spec.vcpus_max
    really = f" (it has {has})" if has is not None and has != given else ""
    return f"{given}{really}" + (f", at most {most}" if most else "")


def _memory(details: Details) -> str:
    has = details.usage.memory_mib if details.usage else None
    given, most = details.status.memory_mib, details.spec.memory_max_mib
    really = f" (it has {memory(has)})" if has is not None and has != given else ""
    return memory(given) + really + (f", at most {memory(most)}" if most else "")


def _share_lines(spec: VMSpec) -> list[tuple[str, str]]:
    """What is not as by default."""
    plain = VMSpec(name=spec.name, image=spec.image)
    wanted = {name: getattr(spec, name) for name in SCHEDULING if getattr(spec, name) != getattr(plain, name)}
    return [(name.removesuffix("_mib").replace("_", " "), shown(name, value)) for name, value in wanted.items()]


def _saved_lines(saved: Saved | None) -> list[tuple[str, str]]:
    if saved is None:
        return []
    paused = ", paused" if saved.paused else ""
    return [("saved", f"{age(saved.at)} ago{paused}, {memory(max(1, saved.size_bytes >> 20))} on disk")]


def _cards(details: Details) -> list[tuple[str, Nic, str]]:
    return list(zip(details.nic_names, details.spec.nics, details.mac_addresses, strict=True))


def _events(context: Context, options: argparse.Namespace) -> int:
    import time

    async def work() -> None:
        async for event in context.host.events(options.names):
            if context.json:
                print(to_json(event, indent=None), flush=True)
            else:
                at = time.strftime("%H:%M:%S", time.localtime(event.at))
                detail = f": {event.detail}" if event.detail else ""
                print(one_line(f"{at}  {event.vm}  {event.event}{detail}"), flush=True)

    context.run(work())
    return 0
