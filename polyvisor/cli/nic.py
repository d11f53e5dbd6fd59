"""`nic`: network cards of a VM, at rest and while it runs."""

from __future__ import annotations

import argparse

from polyvisor.cli.context import Context
from polyvisor.cli.disk import pending
from polyvisor.cli.table import table
from polyvisor.status import NicStatus


def add_nic(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, about in (
        ("ls", "list the network cards of a VM"),
        ("add", "give it another card"),
        ("rm", "remove a card, with the port forwards through it"),
    ):
        sub = verbs.add_parser(verb, help=about)
        sub.add_argument("name", metavar="NAME")
        if verb == "add":
            sub.add_argument(
                "--name", dest="nic", metavar="NIC", help="its name, as nic1; by default the first free one"
            )
            sub.add_argument(
                "--network", default="user", metavar="NETWORK", help="user (default), private:NAME or none"
            )
            sub.add_argument("--mac", metavar="MAC", help="MAC address; by default derived from the VM's id")
        if verb == "rm":
            sub.add_argument("nic", metavar="NIC", help="nic0, nic1 and so on, as ls shows them")
        sub.set_defaults(action=_nic, verb=verb)


def _nic(context: Context, options: argparse.Namespace) -> int:
    host, name = context.host, options.name
    if options.verb == "ls":
        work = host.nic_list(name)
    elif options.verb == "add":
        work = host.nic_add(name, options.network, mac=options.mac, nic=options.nic)
    else:
        work = host.nic_remove(name, options.nic)
    cards: list[NicStatus] = context.run(work)
    if context.json:
        context.print_json(cards)
    elif cards:
        rows = [(nic.name, nic.network, nic.mac, pending(nic.pending, nic.reason)) for nic in cards]
        print(table(("NIC", "NETWORK", "MAC", "PENDING"), rows))
    else:
        context.note(f"{name} has no network card")
    return 0
