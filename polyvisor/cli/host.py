"""`host` and `doctor`: this machine and others, what they can run, and how to mend what they can't."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.cli.context import Context
from polyvisor.cli.table import memory, pairs, table
from polyvisor.errors import InvalidInput, PolyvisorError, one_line
from polyvisor.status import CheckResult, HostStatus

if TYPE_CHECKING:
    from polyvisor.remote.address import Entry, Hosts


def add_host(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_host, name=None)
    verbs = parser.add_subparsers(metavar="VERB")
    sub = verbs.add_parser("add", help="give a machine that SSH reaches a name, after trying it out")
    sub.add_argument("name", metavar="HOST", help="a name of your choice")
    sub.add_argument(
        "address", metavar="ADDRESS", help="ssh://user@host:port; user and port may be left to ~/.ssh/config"
    )
    sub.add_argument("-i", "--identity", metavar="FILE", help="the private key to log in with")
    sub.add_argument(
        "--known-hosts", metavar="FILE", help="where the host's key is known, in place of ~/.ssh/known_hosts"
    )
    sub.add_argument("--accept-new", action="store_true", help="take a key that was never seen without asking")
    sub.add_argument("--home", metavar="DIR", help="where VMs are kept there (default: as for every user there)")
    sub.add_argument("-f", "--force", action="store_true", help="add it though it does not answer, or can run no VMs")
    sub.set_defaults(action=_add)
    sub = verbs.add_parser("ls", aliases=["list"], help="list the hosts, and how they are")
    sub.add_argument("-q", "--quiet", action="store_true", help="print names alone, without asking the hosts")
    sub.set_defaults(action=_ls)
    for verb, about in (("show", "show a host and what it can run"), ("check", "check what works there")):
        sub = verbs.add_parser(verb, help=about)
        sub.add_argument("name", metavar="HOST", nargs="?", help="by default this machine")
        sub.set_defaults(action=_host if verb == "show" else _doctor)
    from polyvisor.cli.prepare import add_prepare

    add_prepare(verbs.add_parser("prepare", help="make a machine a KVM or a Xen host: tell how, and do it with --yes"))
    sub = verbs.add_parser("rm", help="forget hosts; nothing is changed there")
    sub.add_argument("names", nargs="+", metavar="HOST")
    sub.set_defaults(action=_rm)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=_doctor, name=None)


def _add(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.remote import connected, known_hosts
    from polyvisor.errors import AlreadyExists, Unavailable
    from polyvisor.remote.address import Entry, parse_address

    hosts = known_hosts()
    entry = Entry(
        name=options.name,
        url=str(parse_address(options.address)),
        added_at=time.time(),
        identity=_file(options.identity, "identity"),
        known_hosts=_file(options.known_hosts, "known_hosts"),
        home=options.home,
    )
    old = hosts.find(entry.name)
    if old is not None and dataclasses.replace(old, added_at=entry.added_at) != entry:
        hint = f"choose another name, or: polyvisor host rm {entry.name}"
        raise AlreadyExists(f"there is a host '{entry.name}' already, at {old.url}", hint=hint)
    host = context.host = connected(entry, accept_new=options.accept_new)

    async def try_out() -> HostStatus:
        await host.stop_sharing()
        return await host.status()

    try:
        status = context.run(try_out())
        if status.hypervisor is None:
            raise Unavailable(
                f"host '{entry.name}' can run no VMs: {status.hypervisor_reason}",
                hint="install a hypervisor there (apt-get install qemu-system-x86), or add it all the same with --force",
            )
    except PolyvisorError as error:
        if not options.force:
            raise
        context.note(f"added all the same: {error.message}")
    hosts.add(entry)
    if context.json:
        context.print_json(entry)
    context.say(f"host {entry.name} is {entry.url}; use it: polyvisor --host {entry.name} run tiny")
    return 0


def _file(path: str | None, field: str) -> str | None:
    """The absolute path of a file that has to be there."""
    if path is None:
        return None
    absolute = Path(path).expanduser().absolute()
    if field == "identity" and not absolute.is_file():
        raise InvalidInput(field, path, "is not a file", hint="name the private key, as ~/.ssh/id_ed25519")
    return str(absolute)


def _ls(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.remote import known_hosts

    hosts = known_hosts()
    if options.quiet:
        for name in hosts.names():
            print(name)
        return 0
    seen = context.run(_look(hosts))
    if context.json:
        context.print_json([{**dataclasses.asdict(entry), **_seen(status)} for entry, status in seen])
    elif seen:
        print(
            table(("NAME", "STATE", "RUNS ON", "VMS", "MEMORY", "AVAILABLE", "ADDRESS"), [_row(*one) for one in seen])
        )
    else:
        context.note("no hosts but this machine; add one: polyvisor host add NAME ssh://user@host")
    return 0


async def _look(hosts: Hosts) -> list[tuple[Entry, HostStatus | PolyvisorError]]:
    """Every host, and what it says, or why it says nothing; all are asked at once."""
    from polyvisor.cli.remote import connected
    from polyvisor.remote.address import Entry

    async def ask(name: str) -> tuple[Entry, HostStatus | PolyvisorError]:
        try:
            entry = hosts.get(name)
        except PolyvisorError as error:
            return Entry(name=name, url="", added_at=0.0), error
        host = connected(entry)
        try:
            return entry, await host.status()
        except PolyvisorError as error:
            return entry, error
        finally:
            await host.close()

    return await asyncio.gather(*map(ask, hosts.names()))


def _seen(status: HostStatus | PolyvisorError) -> dict[str, object]:
    if isinstance(status, PolyvisorError):
        return {"status": None, "error": status.to_dict()}
    return {"status": dataclasses.asdict(status), "error": None}


def _row(entry: Entry, status: HostStatus | PolyvisorError) -> tuple[str, ...]:
    if isinstance(status, PolyvisorError):
        return (entry.name, f"{status.code}: {one_line(status.message)}", "", "", "", "", entry.url)
    count = str(sum(status.vms_by_state.values()))
    free = memory(status.memory_free_mib)
    return (entry.name, "ok", status.hypervisor or "-", count, memory(status.memory_mib), free, entry.url)


def _rm(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.remote import known_hosts

    for name in options.names:
        known_hosts().remove(name)
        context.say(f"host {name} is forgotten")
    return 0


def _host(context: Context, options: argparse.Namespace) -> int:
    _choose(context, options)
    status = context.run(context.host.status())
    if context.json:
        context.print_json(status)
    else:
        print(pairs(_lines(status)))
    return 0


def _choose(context: Context, options: argparse.Namespace) -> None:
    if options.name is not None:
        context.on_host = options.name


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
        # Of a driver whose hypervisor is not there, the lines above have said all.
        *((f"no {verb}", reason) for c in status.capabilities if c.version for verb, reason in c.missing.items()),
        ("runs on", status.hypervisor or f"nothing: {status.hypervisor_reason}"),
        ("VMs", ", ".join(f"{count} {state}" for state, count in status.vms_by_state.items()) or "none"),
    ]


def _doctor(context: Context, options: argparse.Namespace) -> int:
    """Exits with 1 where something is missing that every VM needs."""
    _choose(context, options)
    checks = context.run(context.host.check())
    if context.json:
        context.print_json(checks)
    else:
        print(table(("", "CHECK", "FOUND"), [(_MARKS[c.result], c.name, c.detail) for c in checks]))
        if remedies := [(c.name, c.remedy) for c in checks if c.remedy and c.result is not CheckResult.OK]:
            print("\nto mend:\n" + "\n".join(context.line(f"  {name}: {remedy}") for name, remedy in remedies))
    return int(any(check.result is CheckResult.MISSING for check in checks))


_MARKS = {CheckResult.OK: "ok", CheckResult.WARNING: "warning", CheckResult.MISSING: "MISSING"}
