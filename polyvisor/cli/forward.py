"""`forward`: ports of the host that lead to guests, also of VMs that run."""

from __future__ import annotations

import argparse

from polyvisor.cli.context import Context
from polyvisor.cli.table import table
from polyvisor.spec.forward import parse_forward
from polyvisor.status import VMStatus


def add_forward(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, about in (("ls", "list the forwards of a VM"), ("add", "open a port"), ("rm", "close a port")):
        sub = verbs.add_parser(verb, help=about)
        sub.add_argument("name", metavar="NAME")
        if verb != "ls":
            sub.add_argument(
                "forward", metavar="FORWARD", help="8080:80, 0.0.0.0:8080:80, :80 (any free port), 53:53/udp"
            )
        sub.set_defaults(action=_forward, verb=verb)


def _forward(context: Context, options: argparse.Namespace) -> int:
    async def work() -> VMStatus:
        if options.verb == "ls":
            return (await context.host.show(options.name)).status
        forward = parse_forward(options.forward)
        verb = context.host.add_forward if options.verb == "add" else context.host.remove_forward
        return await verb(options.name, forward)

    status = context.run(work())
    if context.json:
        context.print_json(status.forwards)
    elif status.forwards:
        rows = [(f"{f.host_address}:{f.host_port}", str(f.guest_port), f.protocol) for f in status.forwards]
        print(table(("HOST", "GUEST", "PROTOCOL"), rows))
    else:
        context.note(f"{options.name} is {status.state}: its ports are opened when it starts")
    return 0
