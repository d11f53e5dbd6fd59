"""`fork`: copies of a running VM, memory and all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import count

from polyvisor.cli.context import Context
from polyvisor.cli.parser import seconds
from polyvisor.cli.show import describe
from polyvisor.errors import InvalidInput, one_line
from polyvisor.status import Forked

WAIT_S = 120.0


def add_fork(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a VM that runs, or is paused")
    parser.add_argument("fork", nargs="?", metavar="FORK", help="name of the fork, where there is to be one")
    parser.add_argument("-n", "--count", type=int, default=1, metavar="N", help="how many forks (default: 1)")
    parser.add_argument("--prefix", metavar="TEXT", help="forks are TEXT1, TEXT2, … (default: NAME-)")
    parser.add_argument(
        "-w", "--wait", action="store_true", help="wait until each fork answers by SSH under its own key"
    )
    parser.add_argument(
        "--timeout", type=seconds, default=WAIT_S, metavar="SECONDS", help="how long to wait (default: %(default).0f)"
    )
    parser.set_defaults(action=_fork)


def chosen(taken: Iterable[str], prefix: str, number: int) -> list[str]:
    """`number` names that begin with `prefix` and are not `taken`, the lowest numbers first."""
    there = set(taken)
    free = (name for name in (f"{prefix}{i}" for i in count(1)) if name not in there)
    return [name for name, _ in zip(free, range(number), strict=False)]


def _fork(context: Context, options: argparse.Namespace) -> int:
    if options.count < 1:
        raise InvalidInput("count", options.count, "is not a number of forks", hint="use 1 or more")
    if options.fork and (options.count > 1 or options.prefix):
        raise InvalidInput("FORK", options.fork, "names one fork", hint="use --prefix with --count")

    async def work() -> int:
        host = context.host
        names = (
            [options.fork]
            if options.fork
            else chosen(
                await host.names(), options.prefix if options.prefix is not None else f"{options.name}-", options.count
            )
        )
        forked = await host.fork(options.name, names, context.progress)
        context.progress.close()
        if options.wait:
            for name in names:
                await host.wait_for_ssh(name, timeout_s=options.timeout, progress=context.progress)
            context.progress.close()
        if context.json:
            context.print_json(forked)
            return 0
        for line in told(options.name, forked):
            context.say(line)
        say_same_identity(options.name, forked)
        return 0

    return context.run(work())


def told(name: str, forked: Forked) -> Iterator[str]:
    """What a person is told of forks."""
    for status in forked.forks:
        yield describe(status)
    number, ms = len(forked.forks), 1000
    copied = f"copied in {forked.copy_s * ms:.0f} ms, in which it stood still for {forked.pause_s * ms:.0f} ms"
    begun = f"begun in {forked.begin_s * ms:.0f} ms, {forked.begin_s / number * ms:.0f} ms each"
    yield f"{number} fork{'s' if number > 1 else ''} of {name}: {copied}; {begun}"


def say_same_identity(name: str, forked: Forked) -> None:
    """Where guests could not be told who they are, say so, and why."""
    if forked.same_identity:
        kept = f"host name, host keys, machine-id and random numbers of {name}"
        print(one_line(f"note: the guests keep {kept}: {forked.same_identity}"), file=sys.stderr)
