"""`lab`: real KVM and Xen hosts inside emulation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polyvisor.cli.context import Context
from polyvisor.cli.table import memory, table
from polyvisor.errors import InvalidInput, NotFound, Unsupported

if TYPE_CHECKING:
    from polyvisor.lab.lab import Lab, LabStatus
    from polyvisor.lab.plan import LabHost


def add_lab(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_status)
    verbs = parser.add_subparsers(metavar="VERB")
    _add_up(verbs.add_parser("up", help="bring the hosts up: build and boot them the first time, restore them later"))
    verbs.add_parser("status", aliases=["ls"], help="show the hosts of the lab").set_defaults(action=_status)
    sub = verbs.add_parser("ssh", help="log in to a host of the lab as root")
    sub.add_argument("name", metavar="HOST", help="lab-kvm1, or kvm1 for short")
    sub.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="run this instead of a shell")
    sub.set_defaults(action=_ssh)
    sub = verbs.add_parser("down", help="save the hosts and free their memory; guests on them are there again after up")
    sub.add_argument("names", nargs="*", metavar="HOST", help="these alone, such as lab-kvm1 or kvm1 (default: all)")
    sub.add_argument("--shutdown", action="store_true", help="shut them down instead; the next up has to boot them")
    sub.set_defaults(action=_down)
    sub = verbs.add_parser("rm", help="delete the hosts and everything on them; their images stay")
    sub.add_argument("names", nargs="*", metavar="HOST", help="these alone, such as lab-kvm1 or kvm1 (default: all)")
    sub.set_defaults(action=_rm)


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="HOST", help="these alone, such as lab-kvm1 or kvm1")
    about = "number of hosts that run {} (default: as many as there are, or 1)"
    parser.add_argument("--kvm", type=int, metavar="N", help=about.format("KVM"))
    parser.add_argument("--xen", type=int, metavar="N", help=about.format("Xen"))
    parser.add_argument("--suite", help="Debian release of new hosts: bookworm or trixie (default: bookworm)")
    parser.add_argument(
        "-c", "--vcpus", type=int, help="of each new host (default: 2; 1 with KVM where QEMU < 8.1 emulates)"
    )
    parser.add_argument("-m", "--memory", metavar="SIZE", help="of each new host (default: 3G with KVM, 4G with Xen)")
    parser.set_defaults(action=_up)


def _lab(context: Context) -> Lab:
    """The lab of this machine; on another one its hosts could not be reached from here."""
    from polyvisor.host.host import Host
    from polyvisor.lab.lab import Lab

    if not isinstance(context.host, Host):
        raise Unsupported("a lab is run by the machine that it is on", hint="log in there: ssh, then polyvisor lab")
    return Lab(context.host)


def _up(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.spec_flags import size_mib

    lab = _lab(context)
    amount = size_mib(options.memory, "memory") if options.memory else None

    async def up() -> list[LabStatus]:
        wanted = _wanted(options, [host for host, _ in await lab.members()])
        return await lab.up(
            wanted, suite=options.suite, vcpus=options.vcpus, memory_mib=amount, progress=context.progress
        )

    _show(context, context.run(up()))
    if not context.json:
        context.note("use them as hosts: polyvisor --host lab-kvm1 run tiny    save them: polyvisor lab down")
    return 0


def _wanted(options: argparse.Namespace, there: Sequence[LabHost]) -> list[LabHost]:
    """The hosts to bring up, where `there` are those that the lab has; raises InvalidInput."""
    from polyvisor.lab.plan import Kind, lab_hosts, parse_host

    asked = options.kvm is not None or options.xen is not None
    if options.names:
        if asked:
            raise InvalidInput("host", options.names[0], "stands beside a number of hosts", hint="use names or numbers")
        return [parse_host(name) for name in dict.fromkeys(options.names)]
    kinds = [host.kind for host in there]
    # Whoever asks for one kind wants that beside what is there; who asks for nothing wants the lab.
    counts = {
        kind: given if (given := getattr(options, kind)) is not None else kinds.count(kind) or int(not asked)
        for kind in Kind
    }
    return lab_hosts(counts[Kind.KVM], counts[Kind.XEN])


def _status(context: Context, options: argparse.Namespace) -> int:
    statuses = context.run(_lab(context).status())
    _show(context, statuses)
    if not statuses:
        context.note("there is no lab yet; make one: polyvisor lab up")
    return 0


def _ssh(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.ssh import log_in
    from polyvisor.lab.plan import parse_host

    names = [host.name for host, _ in context.run(_lab(context).members())]
    name = parse_host(options.name).name
    if name not in names:
        known = ", ".join(names)
        hint = f"there are {known}" if known else "make one: polyvisor lab up"
        raise NotFound(f"the lab has no host '{options.name}'", hint=hint)
    return log_in(context, name, [*options.command, *options.remainder])


def _down(context: Context, options: argparse.Namespace) -> int:
    lab, wanted = _lab(context), _named(options)
    _show(context, context.run(lab.down(wanted, shut_down=options.shutdown, progress=context.progress)))
    return 0


def _named(options: argparse.Namespace) -> list[LabHost] | None:
    """The hosts that the user names, or None; raises InvalidInput."""
    from polyvisor.lab.plan import parse_host

    return [parse_host(name) for name in options.names] or None


def _rm(context: Context, options: argparse.Namespace) -> int:
    removed = context.run(_lab(context).remove(_named(options)))
    if context.json:
        context.print_json(removed)
    for name in removed:
        context.say(f"{name} is removed")
    return 0


def _show(context: Context, statuses: Sequence[LabStatus]) -> None:
    if context.json:
        context.print_json(list(statuses))
    elif statuses:
        print(
            table(("NAME", "RUNS", "STATE", "VCPUS", "MEMORY", "ADDRESS", "SSH", "REASON"), [_row(s) for s in statuses])
        )


def _row(status: LabStatus) -> tuple[str, ...]:
    return (
        status.name,
        status.kind.value,
        status.state.value,
        str(status.vcpus),
        memory(status.memory_mib),
        status.address,
        status.url or "-",
        status.reason or "-",
    )
