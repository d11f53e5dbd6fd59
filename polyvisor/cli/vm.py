"""`run`, `create` and `apply`: from flags or a file to VMs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from polyvisor.cli.context import Context
from polyvisor.cli.lifecycle import show_command
from polyvisor.cli.parser import UsageError
from polyvisor.cli.show import describe, wait_flags
from polyvisor.cli.spec_flags import add_spec_flags, spec_from_flags
from polyvisor.errors import AlreadyExists, InvalidInput, WrongState
from polyvisor.spec.vm import VMSpec
from polyvisor.status import VMStatus


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", nargs="?", help="image to run: tiny, debian-12, … (polyvisor image ls --all); none with --from"
    )
    parser.add_argument(
        "--from",
        dest="template",
        metavar="TEMPLATE",
        help="begin with the memory of a template (polyvisor template ls)",
    )
    parser.add_argument("--count", type=int, metavar="N", help="with --from: make N VMs")
    add_spec_flags(parser)
    wait_flags(parser)
    parser.add_argument("--ssh", action="store_true", help="log in as soon as the guest answers")
    parser.set_defaults(action=_run)


def add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="image of the VM: tiny, debian-12, … (polyvisor image ls --all)")
    add_spec_flags(parser)
    parser.set_defaults(action=_create)


def add_apply(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--file", required=True, help="spec file (YAML or JSON, one VM a document); - for standard input"
    )
    parser.add_argument("--no-start", action="store_true", help="create the VMs without starting them")
    wait_flags(parser)
    parser.set_defaults(action=_apply)


def _run(context: Context, options: argparse.Namespace) -> int:
    if options.template is not None:
        from polyvisor.cli.template import run_from

        return run_from(context, options)
    if options.image is None:
        raise UsageError("the following arguments are required: image", hint="polyvisor run --help")
    if options.count is not None:
        raise InvalidInput("count", options.count, "is for VMs that begin from a template", hint="use --from TEMPLATE")

    async def work() -> VMStatus:
        status = await _make(context, options, context.host.run)
        await show_command(context, status.name)
        if options.wait or options.ssh:
            await context.host.wait_for_ssh(status.name, timeout_s=options.timeout, progress=context.progress)
        return status

    status = context.begin(work())
    if options.ssh:
        from polyvisor.cli.ssh import log_in

        return log_in(context, status.name, [])
    _announce(context, status)
    return 0


def _create(context: Context, options: argparse.Namespace) -> int:
    status = context.begin(_make(context, options, context.host.create))
    _announce(context, status)
    return 0


async def _make(context: Context, options: argparse.Namespace, verb: Callable[..., Awaitable[VMStatus]]) -> VMStatus:
    """Create or run what the flags ask for: without a name one more VM, under a name that no other command gets."""
    if options.name is not None:
        return await verb(spec_from_flags(options, options.name), context.progress)
    while True:
        try:
            spec = spec_from_flags(options, await _free_name(context, options.image))
            return await verb(spec, context.progress, new=True)
        except AlreadyExists:  # taken since we looked
            continue


def _apply(context: Context, options: argparse.Namespace) -> int:
    specs = _read(options.file)
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput("name", name, "stands in two documents of the file", hint="give each VM its own name")

    async def work() -> list[VMStatus]:
        statuses = []
        for spec in specs:
            verb = context.host.create if options.no_start else context.host.run
            statuses.append(await verb(spec, context.progress))
        if options.wait:
            for spec in specs:
                await context.host.wait_for_ssh(spec.name, timeout_s=options.timeout, progress=context.progress)
        return statuses

    statuses = context.begin(work())
    if context.json:
        context.print_json(statuses)
    for status in statuses:
        context.say(describe(status))
    return 0


def _read(name: str) -> list[VMSpec]:
    from polyvisor.spec.load import MAX_FILE, load_specs, read_specs

    if name != "-":
        return read_specs(Path(name))
    return load_specs(sys.stdin.buffer.read(MAX_FILE + 1), "standard input")


async def _free_name(context: Context, image: str) -> str:
    """A name that no VM has: the image's and a number."""
    taken = set(await context.host.names())
    base = "".join(c if c.isascii() and c.isalnum() else "-" for c in image.lower())[:40].strip("-") or "vm"
    for number in range(1, 100_000):
        if (name := f"{base}-{number}") not in taken:
            return name
    raise WrongState(f"there are too many VMs called {base}-…", hint="give a name: --name NAME")


def _announce(context: Context, status: VMStatus) -> None:
    if context.json:
        context.print_json(status)
        return
    context.say(describe(status))
    if status.state.alive:
        context.say(f"log in: polyvisor ssh {status.name}    console: polyvisor console {status.name}")
