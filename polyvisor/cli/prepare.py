"""`host prepare`: what makes a machine a KVM or a Xen host, and, where the user agrees, do it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator

from polyvisor.cli.context import Context
from polyvisor.cli.spec_flags import size_mib
from polyvisor.errors import InvalidInput, PolyvisorError, one_line
from polyvisor.host.setup.wish import Wish
from polyvisor.status import HostKind, Setup, SetupStep, StepState

_MARKS = {StepState.DONE: "ok", StepState.TODO: "to do", StepState.BY_HAND: "by hand", StepState.BLOCKED: "BLOCKED"}


def add_prepare(parser: argparse.ArgumentParser) -> None:
    kinds = [kind.value for kind in HostKind]
    parser.add_argument(
        "kind",
        metavar="KIND",
        nargs="?",
        choices=kinds,
        help="kvm or xen; by default what the machine runs, or else kvm",
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do it without asking")
    parser.add_argument("--undo", action="store_true", help="the way back: boot Linux without Xen; packages stay")
    parser.add_argument(
        "--dom0-memory",
        metavar="SIZE",
        help="memory of Xen's dom0 (default: 1G and a twentieth of the machine's, at most 8G)",
    )
    parser.add_argument(
        "--dom0-vcpus", metavar="N", help="vCPUs of Xen's dom0 (default: all up to 4, a quarter beyond)"
    )
    parser.set_defaults(action=_prepare)


def _prepare(context: Context, options: argparse.Namespace) -> int:
    """Exits with 1 where something is left to do; but for the reboot, once --yes has done the rest."""
    wish = _wish(options)
    setup = context.run(context.host.prepare_host(wish))
    wish = Wish(**{**vars(wish), "kind": setup.kind})
    if not (options.yes or _agrees(context, setup)):
        _show(context, setup)
        return int(len(setup.in_state(StepState.DONE)) < len(setup.steps))
    try:
        after = context.run(context.host.prepare_host(wish, context.progress, act=True))
    except PolyvisorError:
        if options.yes:  # who was asked has seen it
            _show(context, setup)
        raise
    _show(context, after)
    return int(any(not step.reboot for step in after.in_state(StepState.BY_HAND)))


def _wish(options: argparse.Namespace) -> Wish:
    memory, vcpus = options.dom0_memory, options.dom0_vcpus
    if vcpus is not None and not (vcpus.isascii() and vcpus.isdecimal() and len(vcpus) < 6):
        raise InvalidInput("dom0-vcpus", vcpus, "is not a number of vCPUs", hint="write --dom0-vcpus 2")
    return Wish(
        kind=HostKind(options.kind) if options.kind else None,
        undo=options.undo,
        dom0_memory_mib=size_mib(memory, "dom0-memory") if memory is not None else None,
        dom0_vcpus=int(vcpus) if vcpus is not None else None,
    )


def _agrees(context: Context, setup: Setup) -> bool:
    """Whether somebody at a terminal, who is shown the plan, says yes to it."""
    asked = not context.json and sys.stdin.isatty() and sys.stderr.isatty()
    if not asked or not setup.in_state(StepState.TODO) or setup.in_state(StepState.BLOCKED):
        return False
    _show(context, setup)
    print("\nDo what is marked 'to do'? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    raise PolyvisorError("nothing was changed")


def _show(context: Context, setup: Setup) -> None:
    if context.json:
        context.print_json(setup)
        return
    print(context.line(f"{setup.system} as a {'KVM' if setup.kind is HostKind.KVM else 'Xen'} host:"))
    for step in setup.steps:
        for line in _lines(context, step):
            print(one_line(line))
    for note in setup.notes:
        print(context.line(f"note: {note}"))
    if todo := setup.in_state(StepState.TODO):
        names = ", ".join(step.name for step in todo)
        context.note(f"to do it ({names}): polyvisor host prepare {setup.kind} --yes")


def _lines(context: Context, step: SetupStep) -> Iterator[str]:
    """What a step is, and, where it is not done, why it matters, and exactly what it changes, to the letter."""
    yield context.advice(f"  {_MARKS[step.state]:<8} {step.name:<11} {step.found}")
    if step.state is StepState.DONE:
        return
    indent = " " * 23
    if step.why:
        yield context.advice(f"{indent}{step.why}")
    for change in step.files:
        yield f"{indent}{'delete' if change.content is None else 'write'} {change.path}"
        yield from (f"{indent}  | {line}" for line in (change.content or "").splitlines())
    for command in step.commands:
        yield f"{indent}$ {shlex.join(command)}"
