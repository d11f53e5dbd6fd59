"""`move`: a stopped VM from one host to another."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from polyvisor.cli.context import Context
from polyvisor.errors import InvalidInput, one_line
from polyvisor.spec.vm import Hypervisor, Mode

if TYPE_CHECKING:
    from polyvisor.host.api import HostApi
    from polyvisor.host.moves import Move
    from polyvisor.remote.move import Place
    from polyvisor.status import VMStatus

LOCAL = "local"


def add_move(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a VM that is stopped")
    parser.add_argument("--to", metavar="HOST", help="the host that gets it (polyvisor host ls); local: this machine")
    parser.add_argument("--name", dest="new_name", metavar="NEW", help="what it is called there (default: as here)")
    parser.add_argument(
        "--hypervisor", choices=[h.value for h in Hypervisor], help="what runs it there (default: as its spec says)"
    )
    parser.add_argument("--mode", choices=[m.value for m in Mode], help="its mode there (default: as its spec says)")
    parser.add_argument("--cancel", action="store_true", help="keep it: take back a move that has not come to its end")
    parser.set_defaults(action=_move)


def _move(context: Context, options: argparse.Namespace) -> int:
    if options.cancel:
        return _cancel(context, options)
    if options.to is None:
        raise InvalidInput("to", "", "no host is named", hint="say where: --to HOST; polyvisor host ls lists them")
    from polyvisor.remote.move import Wish, move_vm
    from polyvisor.spec.vm import check_name

    wish = Wish(
        name=None if options.new_name is None else check_name(options.new_name),
        hypervisor=Hypervisor(options.hypervisor) if options.hypervisor else None,
        mode=Mode(options.mode) if options.mode else None,
    )
    target = _place(options.to)

    async def work() -> tuple[VMStatus, tuple[str, ...]]:
        try:
            return await move_vm(_source(context), check_name(options.name), target, wish, context.progress)
        finally:
            await target.host.close()

    status, notes = context.run(work())
    if context.json:
        context.print_json(status)
        return 0
    for note in notes:
        context.note(f"{status.name}: {note}")
    host = "" if options.to == LOCAL else f"--host {options.to} "
    print(
        one_line(
            f"{status.name} is on {options.to}, {status.state.value}; start it: polyvisor {host}start {status.name}"
        )
    )
    return 0


def _cancel(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.remote.move import cancel_move
    from polyvisor.spec.vm import check_name

    opened: list[HostApi] = []

    def find(move: Move) -> Place:
        place = _place(options.to or move.target)
        opened.append(place.host)
        return place

    async def work() -> tuple[VMStatus, str | None]:
        try:
            return await cancel_move(_source(context), check_name(options.name), find)
        finally:
            for host in opened:
                await host.close()

    status, left = context.run(work())
    if left:
        context.note(left)
    if context.json:
        context.print_json(status)
    context.say(f"{status.name} stays; start it: polyvisor start {status.name}")
    return 0


def _place(name: str) -> Place:
    """The host that a user calls `name`; raises NotFound, InvalidInput."""
    from polyvisor.remote.move import Place

    if name == LOCAL:
        from polyvisor.host.host import Host

        return Place(name, Host())
    from polyvisor.cli.remote import named_host

    return Place(name, named_host(name))


def _source(context: Context) -> Place:
    from polyvisor.remote.host import RemoteHost
    from polyvisor.remote.move import Place

    host = context.host
    return Place(host.entry.name if isinstance(host, RemoteHost) else LOCAL, host)
