"""`disk`: disks of a VM, at rest and while it runs."""

from __future__ import annotations

import argparse

from polyvisor.cli.context import Context
from polyvisor.cli.spec_flags import size_gib
from polyvisor.cli.table import memory, table
from polyvisor.status import DiskStatus


def add_disk(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, about in (
        ("ls", "list the disks of a VM"),
        ("add", "give it an empty disk"),
        ("grow", "make a disk larger"),
        ("rm", "remove a disk and what is on it"),
    ):
        sub = verbs.add_parser(verb, help=about)
        sub.add_argument("name", metavar="NAME")
        if verb in ("grow", "rm"):
            sub.add_argument("disk", metavar="DISK", help="disk0, disk1 and so on, as ls shows them")
        if verb == "add":
            sub.add_argument(
                "--name", dest="disk", metavar="DISK", help="its name, as disk2; by default the first free one"
            )
        if verb in ("add", "grow"):
            sub.add_argument("--size", required=True, metavar="GIB", help="size, as 10, 10G or 1T")
        if verb == "rm":
            sub.add_argument("-f", "--force", action="store_true", help="what is on it is lost, and may be")
        sub.set_defaults(action=_disk, verb=verb)


def _disk(context: Context, options: argparse.Namespace) -> int:
    host, name = context.host, options.name
    if options.verb == "ls":
        work = host.disk_list(name)
    elif options.verb == "add":
        work = host.disk_add(name, size_gib(options.size, "size_gib"), disk=options.disk)
    elif options.verb == "grow":
        work = host.disk_grow(name, options.disk, size_gib(options.size, "size_gib"))
    else:
        work = host.disk_remove(name, options.disk, force=options.force)
    disks: list[DiskStatus] = context.run(work)
    if context.json:
        context.print_json(disks)
    elif disks:
        rows = [(disk.name, memory(disk.size_mib), pending(disk.pending, disk.reason)) for disk in disks]
        print(table(("DISK", "SIZE", "PENDING"), rows))
    else:
        context.note(f"{name} has no disk")
    return 0


def pending(what: str | None, why: str | None) -> str:
    """What waits for the next boot, with the reason where there is one."""
    return f"{what}: {why}" if what and why else what or ""
