"""The command `polyvisor`: finds the verb, runs it, and turns what comes of it into output and an exit status.

A user feels a command's start-up, so nothing is imported before it is needed: each verb names its module, and only the
verb that was asked for is loaded.

Exit statuses: 0 success; 1 failure; 2 wrong input or usage; 3 not found; 4 already exists; 5 busy; 6 wrong state;
7 not permitted; 8 unavailable or unsupported here; 9 timed out; 130 interrupted; 255 SSH failed. `ssh` and `exec` exit with
the status of the guest's command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from polyvisor import __version__

TYPE_CHECKING = False  # the real one costs the import of typing, which `--version` need not wait for
if TYPE_CHECKING:
    import argparse
    from typing import NoReturn

    from polyvisor.cli.parser import Parser

# Verb → module of polyvisor.cli, and what it does. The order is that of `polyvisor --help`.
VERBS = {
    "run": ("vm", "create a VM and start it"),
    "create": ("vm", "create a VM without starting it"),
    "apply": ("vm", "create and start the VMs of a spec file"),
    "ls": ("show", "list VMs"),
    "show": ("show", "show one VM in full"),
    "start": ("lifecycle", "start VMs"),
    "stop": ("lifecycle", "shut VMs down; kill those that don't"),
    "kill": ("lifecycle", "end VMs now, as by pulling the plug"),
    "reboot": ("lifecycle", "let VMs shut down and boot again"),
    "pause": ("lifecycle", "stop the vCPUs of VMs"),
    "resume": ("lifecycle", "let paused VMs go on"),
    "rm": ("lifecycle", "delete VMs and their disks"),
    "console": ("console", "attach to the serial console"),
    "logs": ("console", "print what the serial console has said"),
    "ssh": ("ssh", "log in to the guest"),
    "exec": ("ssh", "run a command in the guest"),
    "cp": ("ssh", "copy files between this machine and a guest"),
    "forward": ("forward", "list, add and remove port forwards"),
    "events": ("show", "follow changes of VMs"),
    "image": ("image", "images: build, import, list, show, rm"),
    "host": ("host", "show this host and what it can run"),
    "doctor": ("host", "check what works here and how to mend the rest"),
    "completion": ("complete", "print the shell's completion script"),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--version"], ["-V"]):
        print(f"polyvisor {__version__}")
        sys.exit(0)
    sys.exit(run(words))


def run(words: list[str]) -> int:
    """Run the command line `words` and return the exit status."""
    # Output into a pipe that the reader has closed (`polyvisor ls | head -1`) is no failure of ours.
    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _run(words: list[str]) -> int:
    from polyvisor.cli.context import Context, report
    from polyvisor.errors import PolyvisorError

    if "_ARGCOMPLETE" in os.environ:
        from polyvisor.cli.complete import complete

        complete()
    context = Context(debug="--debug" in words, json="--json" in words)
    try:
        options = parse(words)
        context = Context(debug=options.debug, json=options.json)
        return int(options.action(context, options) or 0)
    except PolyvisorError as error:
        report(error, context)
        return error.exit_status
    except KeyboardInterrupt:
        print("polyvisor: interrupted", file=sys.stderr)
        return 130


def parse(words: list[str]) -> argparse.Namespace:
    """The options that `words` give; usage errors exit with status 2, as argparse does."""
    verb = next((word for word in words if not word.startswith("-")), None)
    import argparse

    parser = build_parser([verb] if verb in VERBS else None)
    # The common options may stand on either side of the verb, so neither parser may give them a default.
    options = parser.parse_args(_before_remainder(words), argparse.Namespace(json=False, debug=False))
    if not hasattr(options, "action"):
        parser.print_help()
        sys.exit(2 if words else 0)
    options.remainder = _remainder(words)
    return options


def build_parser(verbs: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the verbs named, or of all of them."""
    from polyvisor.cli.parser import Parser

    common = common_options()
    parser = Parser(
        prog="polyvisor",
        description="One virtual machine, any hypervisor.",
        epilog="polyvisor VERB --help tells more. Begin with: polyvisor run tiny",
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"polyvisor {__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", title="verbs")
    for verb, (module, about) in VERBS.items():
        if verbs is None or verb in verbs:
            added = import_module(f"polyvisor.cli.{module}")
            getattr(added, f"add_{verb}")(
                subparsers.add_parser(verb, help=about, description=f"{about[0].upper()}{about[1:]}.", parents=[common])
            )
    return parser


def common_options() -> Parser:
    """Options of every verb; they may stand before the verb or after it."""
    import argparse

    from polyvisor.cli.parser import Parser

    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show traces and the hypervisor's exact command"
    )
    return common


def _before_remainder(words: list[str]) -> list[str]:
    """`words` up to a `--`: what follows belongs to a command in the guest."""
    return words[: words.index("--")] if "--" in words else words


def _remainder(words: list[str]) -> list[str]:
    return words[words.index("--") + 1 :] if "--" in words else []


if __name__ == "__main__":
    main()
