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
    "fork": ("fork", "copy a running VM, memory and all, as often as wanted"),
    "template": ("template", "keep the memory of a running VM, so that others begin from it: create, ls, warm, rm"),
    "save": ("lifecycle", "write the memory of VMs to disk and end them, until they are started"),
    "snapshot": ("snapshot", "snapshots of VMs: create, ls, show, revert, rm"),
    "clone": ("snapshot", "make a new VM of a stopped one, or of a snapshot"),
    "export": ("snapshot", "write a stopped VM, with its image, into one file"),
    "import": ("snapshot", "take in a VM that was exported"),
    "move": ("move", "carry a stopped VM, with its disks, to another host"),
    "set": ("set", "change vCPUs, memory, and shares of CPUs and disks of a VM, also while it runs"),
    "disk": ("disk", "disks of a VM, also while it runs: ls, add, grow, rm"),
    "nic": ("nic", "network cards of a VM, also while it runs: ls, add, rm"),
    "rm": ("lifecycle", "delete VMs and their disks"),
    "console": ("console", "attach to the serial console"),
    "logs": ("console", "print what the serial console has said"),
    "ssh": ("ssh", "log in to the guest"),
    "exec": ("ssh", "run a command in the guest"),
    "cp": ("ssh", "copy files between this machine and a guest"),
    "forward": ("forward", "list, add and remove port forwards"),
    "events": ("show", "follow changes of VMs"),
    "image": ("image", "images: build, import, export, copy, list, show, rm"),
    "lab": ("lab", "real KVM and Xen hosts inside emulation: up, status, ssh, down, rm"),
    "compare": ("compare", "measure hypervisors against each other, with intervals and verdicts"),
    "host": ("host", "hosts: add, list, show, check, prepare, rm; alone: show this one"),
    "doctor": ("host", "check what works here and how to mend the rest"),
    "completion": ("complete", "print the shell's completion script"),
}
# Verbs that end with a command for the guest, after `--`.
_WITH_COMMAND = ("ssh", "exec")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["--version"], ["-V"]):
        print(f"polyvisor {__version__}")
        sys.exit(0)
    status = run(words)
    # All is said and done. The interpreter would spend a fifth of a short command on taking itself apart.
    sys.stderr.flush()
    os._exit(status)


def run(words: list[str]) -> int:
    """Run the command line `words` and return the exit status."""
    # Output into a pipe that the reader has closed (`polyvisor ls | head -1`) is no failure of ours.
    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return 0
    except OSError as error:
        return _failed_output(words, error)
    return status


def _discard_output() -> None:
    """Let what can't be written go nowhere, or the interpreter would complain of it at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed_output(words: list[str], error: OSError) -> int:
    """Report output that can't be written; what reads or writes files of ours translates its own errors."""
    from polyvisor.cli.context import Context, report
    from polyvisor.files import translated

    failure = translated(error, f"polyvisor {_verb(words) or ''}".strip())
    report(failure, Context(debug="--debug" in words, json="--json" in words))
    _discard_output()
    return failure.exit_status


def _run(words: list[str]) -> int:
    from polyvisor.cli import startup

    startup.quicken()
    from polyvisor.cli.context import Context, report
    from polyvisor.errors import PolyvisorError

    if "_ARGCOMPLETE" in os.environ:
        from polyvisor.cli.complete import complete

        complete()
    context = Context(debug="--debug" in words, json="--json" in words)
    if words[:1] == ["agent"]:  # what `RemoteHost` starts on its host; nothing for people
        from polyvisor.remote.agent import main as be_agent

        return be_agent(words[1:])
    try:
        options = parse(words)
        context = Context(debug=options.debug, json=options.json, on_host=options.on_host)
        return int(options.action(context, options) or 0)
    except PolyvisorError as error:
        report(error, context)
        return error.exit_status
    except KeyboardInterrupt:
        print("polyvisor: interrupted", file=sys.stderr)
        return 130


def parse(words: list[str]) -> argparse.Namespace:
    """The options that `words` give; usage errors exit with status 2, as argparse does."""
    verb = _verb(words)
    import argparse

    parser = build_parser([verb] if verb in VERBS else None)
    ours, remainder = _split(words) if verb in _WITH_COMMAND else (words, [])
    options = parser.parse_args(ours, argparse.Namespace(json=False, debug=False, on_host=None))
    if not hasattr(options, "action"):
        parser.print_help()
        sys.exit(2 if words else 0)
    # A -- after the command's first word is the command's own: polyvisor exec a git log -- FILE.
    options.remainder = ["--", *remainder] if remainder and options.__dict__.get("command") else remainder
    return options


def _verb(words: Sequence[str]) -> str | None:
    before = ["", *words]  # the word after --host names a host
    return next((word for word, last in zip(words, before, strict=False) if word[:1] != "-" and last != "--host"), None)


def build_parser(verbs: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the verbs named, or of all of them."""
    from polyvisor.cli.parser import Parser

    parser = Parser(
        prog="polyvisor",
        description="One virtual machine, any hypervisor.",
        epilog="polyvisor VERB --help tells more. Begin with: polyvisor run tiny",
    )
    parser.add_argument("-V", "--version", action="version", version=f"polyvisor {__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", title="verbs")
    for verb, (module, about) in VERBS.items():
        if verbs is None or verb in verbs:
            added = import_module(f"polyvisor.cli.{module}")
            getattr(added, f"add_{verb}")(
                subparsers.add_parser(verb, help=about, description=f"{about[0].upper()}{about[1:]}.")
            )
    return parser


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """`words` up to a `--`, and those after it, which belong to a command in the guest."""
    where = words.index("--") if "--" in words else len(words)
    return words[:where], words[where + 1 :]


if __name__ == "__main__":
    main()
