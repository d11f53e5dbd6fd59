"""`ssh`, `exec` and `cp`: into the guest."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence

from polyvisor.cli.context import Context
from polyvisor.cli.parser import seconds
from polyvisor.errors import InvalidInput
from polyvisor.host.api import SSHTarget
from polyvisor.ssh import READY_S, guest_named, scp_argv, ssh_argv


def add_ssh(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="run this instead of a shell")
    parser.set_defaults(action=lambda c, o: log_in(c, o.name, [*o.command, *o.remainder], timeout_s=o.timeout))


def add_exec(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="program and arguments, after --")
    parser.set_defaults(action=_exec)


def add_cp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-r", "--recursive", action="store_true", help="copy directories")
    _timeout(parser)
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="a file here, or NAME:PATH in a guest")
    parser.add_argument("target", metavar="TARGET", help="a path here, or NAME:PATH in a guest")
    parser.set_defaults(action=_cp)


def log_in(context: Context, name: str, command: Sequence[str], *, timeout_s: float = READY_S) -> int:
    """Run a shell, or `command` as a shell takes it, in the guest; returns its exit status."""
    return call_on_terminal(ssh_argv(_wait(context, name, timeout_s), *command))


def _exec(context: Context, options: argparse.Namespace) -> int:
    """Each word arrives in the guest as it was given: unlike `ssh`, no second round of quoting."""
    words = [*options.command, *options.remainder]
    if not words:
        raise InvalidInput("COMMAND", "", "is missing", hint=f"polyvisor exec {options.name} -- uname -a")
    return log_in(context, options.name, [shlex.join(words)], timeout_s=options.timeout)


def _cp(context: Context, options: argparse.Namespace) -> int:
    target = _wait(context, guest_named([*options.source, options.target]), options.timeout)
    return call_on_terminal(scp_argv(target, options.source, options.target, recursive=options.recursive))


def _wait(context: Context, name: str, timeout_s: float) -> SSHTarget:
    return context.run(context.host.wait_for_ssh(name, timeout_s=timeout_s, progress=context.progress))


def call_on_terminal(argv: list[str]) -> int:
    """Run a program on this terminal; Ctrl-C is the program's. Returns its exit status, as a shell has it."""
    sys.stdout.flush()
    status = subprocess.call(argv)
    return status if status >= 0 else 128 - status


def _target(parser: argparse.ArgumentParser) -> None:
    _timeout(parser)
    parser.add_argument("name", metavar="NAME")


def _timeout(parser: argparse.ArgumentParser) -> None:
    about = "wait this long for the guest (default: %(default).0f)"
    parser.add_argument("--timeout", type=seconds, default=READY_S, metavar="SECONDS", help=about)
