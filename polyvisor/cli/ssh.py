"""`ssh`, `exec` and `cp`: into the guest, by OpenSSH. The one place that opens SSH to guests."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from polyvisor.cli.context import Context
from polyvisor.cli.show import WAIT_S
from polyvisor.errors import InvalidInput
from polyvisor.host.api import SSHTarget
from polyvisor.process import find_program


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


def log_in(context: Context, name: str, command: Sequence[str], *, timeout_s: float = WAIT_S) -> int:
    """Run a shell, or `command` as a shell takes it, in the guest; returns its exit status."""
    target = _wait(context, name, timeout_s)
    program = find_program("ssh", package="openssh-client")
    return _call([program, *_options(target), "-p", str(target.port), f"{target.user}@{target.address}", *command])


def _exec(context: Context, options: argparse.Namespace) -> int:
    """Each word arrives in the guest as it was given: unlike `ssh`, no second round of quoting."""
    words = [*options.command, *options.remainder]
    if not words:
        raise InvalidInput("COMMAND", "", "is missing", hint=f"polyvisor exec {options.name} -- uname -a")
    return log_in(context, options.name, [shlex.join(words)], timeout_s=options.timeout)


def _cp(context: Context, options: argparse.Namespace) -> int:
    paths = [*options.source, options.target]
    names = {name for path in paths if (name := _guest_of(path))}
    if len(names) != 1:
        problem = "names no guest" if not names else "names several guests"
        hint = "polyvisor cp FILE NAME:PATH, or polyvisor cp NAME:PATH FILE"
        raise InvalidInput("cp", " ".join(paths), problem, hint=hint)
    target = _wait(context, names.pop(), options.timeout)
    program = find_program("scp", package="openssh-client")
    flags = [*(["-r"] if options.recursive else []), *([] if sys.stderr.isatty() else ["-q"])]
    remote = [_remote(path, target) for path in paths]
    return _call([program, *flags, *_options(target), "-P", str(target.port), "--", *remote])


def _guest_of(path: str) -> str | None:
    """The VM in NAME:PATH; a path with a slash before the colon is a file here, as scp has it."""
    name, colon, _ = path.partition(":")
    return name if colon and name and "/" not in name else None


def _remote(path: str, target: SSHTarget) -> str:
    if _guest_of(path) is None:
        return path if path.startswith(("/", ".")) else f"./{path}"
    return f"{target.user}@{target.address}:{path.partition(':')[2]}"


def _options(target: SSHTarget) -> list[str]:
    """OpenSSH options: this VM's own key file and known hosts, nothing of the user's configuration."""
    settings = {
        "IdentityFile": f'"{target.identity}"',
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": f'"{target.known_hosts}"',
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": target.alias,
        "StrictHostKeyChecking": "accept-new",
        "ConnectTimeout": "15",
        "LogLevel": "ERROR",
    }
    return ["-F", "none", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]


def _wait(context: Context, name: str, timeout_s: float) -> SSHTarget:
    return context.run(context.host.wait_for_ssh(name, timeout_s=timeout_s, progress=context.progress))


def _call(argv: list[str]) -> int:
    """Run an interactive program on this terminal; Ctrl-C is the program's."""
    sys.stdout.flush()
    status = subprocess.call(argv, env={**os.environ})
    return status if status >= 0 else 128 - status


def _target(parser: argparse.ArgumentParser) -> None:
    _timeout(parser)
    parser.add_argument("name", metavar="NAME")


def _timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=float,
        default=WAIT_S,
        metavar="SECONDS",
        help="wait this long for the guest (default: %(default).0f)",
    )
