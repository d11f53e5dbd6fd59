"""`template`: the memory of a running VM, kept, and VMs that begin from it (`run --from`)."""

from __future__ import annotations

import argparse
import dataclasses

from polyvisor.cli.context import Context
from polyvisor.cli.fork import say_same_identity
from polyvisor.cli.show import describe
from polyvisor.cli.table import age, memory, table
from polyvisor.errors import InvalidInput
from polyvisor.spec.vm import VMSpec
from polyvisor.status import Forked, StoredTemplate


def add_template(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    sub = verbs.add_parser("create", help="keep memory and devices of a VM, which goes on")
    sub.add_argument("name", metavar="NAME", help="name of the template")
    sub.add_argument("--from", dest="vm", required=True, metavar="VM", help="a VM that runs, or is paused")
    sub.set_defaults(action=_create)
    sub = verbs.add_parser("ls", help="list the templates")
    sub.set_defaults(action=_ls)
    sub = verbs.add_parser("warm", help="have VMs ready that begin from it in milliseconds: polyvisor run --from NAME")
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("vms", nargs="*", metavar="VM", help="names of the VMs (by default NAME-1, NAME-2, …)")
    sub.add_argument("-n", "--count", type=int, metavar="N", help="how many are to be ready; 0 ends them (default: 1)")
    sub.set_defaults(action=_warm)
    sub = verbs.add_parser("rm", help="delete templates; VMs that have begun from them go on")
    sub.add_argument("names", nargs="+", metavar="NAME")
    sub.set_defaults(action=_rm)


def run_from(context: Context, options: argparse.Namespace) -> int:
    """`run --from TEMPLATE`: the VMs are as the template's was, so that no other settings go with it."""
    _require_no_settings(options)
    if options.name is not None and options.count not in (None, 1):
        raise InvalidInput("name", options.name, f"can't name {options.count} VMs", hint="leave --name out")
    if options.count is not None and options.count < 1:
        raise InvalidInput("count", options.count, "is not a number of VMs", hint="use 1 or more")

    async def work() -> Forked:
        names = [options.name] if options.name is not None else []
        forked = await context.host.run_from(options.template, names, options.count or 1, context.progress)
        if options.wait or options.ssh:
            for status in forked.forks:
                await context.host.wait_for_ssh(status.name, timeout_s=options.timeout, progress=context.progress)
        return forked

    forked = context.run(work())
    if options.ssh:
        from polyvisor.cli.ssh import log_in

        return log_in(context, forked.forks[0].name, [])
    if context.json:
        context.print_json(forked)
        return 0
    for status in forked.forks:
        context.say(describe(status))
    context.say(f"begun from template {options.template} in {forked.begin_s * 1000:.0f} ms")
    say_same_identity(options.template, forked)
    return 0


def _require_no_settings(options: argparse.Namespace) -> None:
    if options.image is not None:
        hint = "leave the image out, or --from"
        raise InvalidInput("image", options.image, "a template has its own image", hint=hint)
    fields = [field.name for field in dataclasses.fields(VMSpec) if field.name not in ("name", "image")]
    for name in (*fields, "publish"):
        if value := getattr(options, name, None):
            hint = "polyvisor set and polyvisor forward add change a VM that runs"
            raise InvalidInput(name, value, "what begins from a template is as the template's VM was", hint=hint)


def _create(context: Context, options: argparse.Namespace) -> int:
    _say(context, context.run(context.host.template_create(options.name, options.vm, context.progress)))
    return 0


def _ls(context: Context, options: argparse.Namespace) -> int:
    templates = context.run(context.host.template_list())
    if context.json:
        context.print_json(templates)
    elif templates:
        rows = [
            (
                *(each.name, each.source, each.image, str(each.vcpus), memory(each.memory_mib)),
                *(f"{each.size_bytes >> 20} MiB", age(each.created_at), ", ".join(each.warm)),
            )
            for each in templates
        ]
        print(table(("NAME", "FROM", "IMAGE", "VCPUS", "MEMORY", "SIZE", "AGE", "READY"), rows))
    else:
        context.note("no templates here; make one: polyvisor template create NAME --from VM")
    return 0


def _warm(context: Context, options: argparse.Namespace) -> int:
    count = options.count if options.count is not None else 1
    if count < 0:
        raise InvalidInput("count", count, "is not a number of VMs", hint="use 0 or more")
    if options.vms and options.count is not None:
        raise InvalidInput("count", count, "VMs are named", hint="name them, or use --count")
    work = context.host.template_warm(options.name, count, options.vms, context.progress)
    _say(context, context.run(work))
    return 0


def _rm(context: Context, options: argparse.Namespace) -> int:
    async def work() -> None:
        for name in options.names:
            await context.host.template_remove(name)
            context.say(f"template {name} is removed")

    context.run(work())
    return 0


def _say(context: Context, template: StoredTemplate) -> None:
    if context.json:
        context.print_json(template)
        return
    ready = f"; ready: {', '.join(template.warm)}" if template.warm else ""
    context.say(f"template {template.name} of {template.source} ({template.size_bytes >> 20} MiB){ready}")
