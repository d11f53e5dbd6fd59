"""`start`, `stop`, `kill`, `reboot`, `pause`, `resume`, `save`, `rm`: the life of VMs. Each takes several names, or --all."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Awaitable, Callable

from polyvisor.cli.context import Context, report
from polyvisor.cli.parser import seconds
from polyvisor.cli.show import describe, wait_flags
from polyvisor.errors import InvalidInput, PolyvisorError, one_line
from polyvisor.host.api import STOP_TIMEOUT_S
from polyvisor.status import VMStatus

Verb = Callable[[str], Awaitable[VMStatus | None]]


def add_start(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    parser.add_argument("--fresh", action="store_true", help="boot, and throw away what was saved")
    wait_flags(parser)
    parser.set_defaults(action=_start)


def add_stop(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    _timeout(parser, "kill a VM that is still there after SECONDS; 0 kills at once")
    parser.set_defaults(
        action=lambda c, o: each(c, o, lambda n: c.host.stop(n, timeout_s=o.timeout, progress=c.progress))
    )


def add_kill(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    parser.set_defaults(action=lambda c, o: each(c, o, c.host.kill))


def add_reboot(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    parser.add_argument("--force", action="store_true", help="press the reset button instead of asking the guest")
    _timeout(parser, "give up when the guest has not shut down after SECONDS")
    parser.set_defaults(
        action=lambda c, o: each(
            c, o, lambda n: c.host.reboot(n, force=o.force, timeout_s=o.timeout, progress=c.progress)
        )
    )


def add_pause(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    parser.set_defaults(action=lambda c, o: each(c, o, c.host.pause))


def add_resume(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    parser.set_defaults(action=lambda c, o: each(c, o, c.host.resume))


def add_save(parser: argparse.ArgumentParser) -> None:
    _names(parser, "every VM of this host that is alive")
    parser.set_defaults(
        action=lambda c, o: each(c, o, lambda n: c.host.save(n, c.progress), among=lambda status: status.state.alive)
    )


def add_rm(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    parser.add_argument(
        "-f", "--force", action="store_true", help="kill VMs that are alive; don't mind those that are gone"
    )
    parser.set_defaults(action=_rm)


async def show_command(context: Context, name: str) -> None:
    """With --debug, the exact command that runs the VM, and where."""
    if context.debug:
        details = await context.host.show(name)
        if details.argv:
            line = f"cd {shlex.quote(details.directory)} && {shlex.join(details.argv)}"
            print(one_line(line), file=sys.stderr)


def each(
    context: Context,
    options: argparse.Namespace,
    verb: Verb,
    *,
    among: Callable[[VMStatus], bool] | None = None,
    in_event_loop: bool = True,
) -> int:
    """Do `verb` to every VM named, whatever becomes of the others; the status is that of the first failure.

    With --all these are all VMs, or those `among` them that the verb is for.
    """
    if not options.names and not options.all:
        raise InvalidInput("NAME", "", "no VM is named", hint="name some, or use --all")
    statuses: list[VMStatus] = []

    async def named() -> list[str]:
        if not options.all:
            return list(options.names)
        if among is None:
            return await context.host.names()
        return [status.name for status in await context.host.vms() if among(status)]

    async def work() -> int:
        failed = 0
        for name in await named():
            try:
                status = await verb(name)
            except PolyvisorError as error:
                context.progress.close()
                report(error, context)
                failed = failed or error.exit_status
            else:
                if status is not None:
                    statuses.append(status)
                    context.say(describe(status))
        return failed

    failed = context.run(work(), in_event_loop=in_event_loop)
    if context.json:
        context.print_json(statuses)
    return failed


def _start(context: Context, options: argparse.Namespace) -> int:
    async def start(name: str) -> VMStatus:
        status = await context.host.start(name, context.progress, fresh=options.fresh)
        await show_command(context, name)
        if options.wait:
            await context.host.wait_for_ssh(name, timeout_s=options.timeout, progress=context.progress)
        return status

    return each(context, options, start, in_event_loop=False)


def _rm(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.errors import NotFound

    async def remove(name: str) -> None:
        try:
            await context.host.remove(name, force=options.force)
        except NotFound:
            if not options.force:
                raise
        context.say(f"{name} is removed")

    return each(context, options, remove)


def _names(parser: argparse.ArgumentParser, every: str = "every VM of this host") -> None:
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help=every)


def _timeout(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument(
        "-t",
        "--timeout",
        type=seconds,
        default=STOP_TIMEOUT_S,
        metavar="SECONDS",
        help=f"{about} (default: %(default).0f)",
    )
