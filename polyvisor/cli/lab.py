"""`lab`: real KVM and Xen hosts inside emulation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polyvisor.cli.context import Context
from polyvisor.cli.table import memory, table
from polyvisor.errors import NotFound, Unsupported

if TYPE_CHECKING:
    from polyvisor.lab.lab import Lab, LabStatus


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
    sub.add_argument("--shutdown", action="store_true", help="shut them down instead; the next up has to boot them")
    sub.set_defaults(action=_down)
    sub = verbs.add_parser("rm", help="delete the hosts and everything on them; their images stay")
    sub.set_defaults(action=_rm)


def _add_up(parser: argparse.ArgumentParser) -> None:
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
    from polyvisor.lab.plan import Kind, lab_hosts

    lab = _lab(context)
    amount = size_mib(options.memory, "memory") if options.memory else None

    async def up() -> list[LabStatus]:
        there = [host.kind for host, _ in await lab.members()]
        asked = options.kvm is not None or options.xen is not None
        # Whoever asks for one kind wants that beside what is there; who asks for nothing wants the lab.
        counts = {
            kind: given if (given := getattr(options, kind)) is not None else there.count(kind) or int(not asked)
            for kind in Kind
        }
        wanted = lab_hosts(counts[Kind.KVM], counts[Kind.XEN])
        return await lab.up(
            wanted, suite=options.suite, vcpus=options.vcpus, memory_mib=amount, progress=context.progress
        )

    _show(context, context.run(up()))
    if not context.json:
        context.note("use them as hosts: polyvisor --host lab-kvm1 run tiny    save them: polyvisor lab down")
    return 0


def _status(context: Context, options: argparse.Namespace) -> int:
    statuses = context.run(_lab(context).status())
    _show(context, statuses)
    if not statuses:
        context.note("there is no lab yet; make one: polyvisor lab up")
    return 0


def _ssh(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.ssh import log_in

    names = [host.name for host, _ in context.run(_lab(context).members())]
    name = options.name if options.name.startswith("lab-") else f"lab-{options.name}"
    if name not in names:
        known = ", ".join(names)
        hint = f"there are {known}" if known else "make one: polyvisor lab up"
        raise NotFound(f"the lab has no host '{options.name}'", hint=hint)
    return log_in(context, name, [*options.command, *options.remainder])


def _down(context: Context, options: argparse.Namespace) -> int:
    _show(context, context.run(_lab(context).down(shut_down=options.shutdown, progress=context.progress)))
    return 0


def _rm(context: Context, options: argparse.Namespace) -> int:
    removed = context.run(_lab(context).remove())
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
