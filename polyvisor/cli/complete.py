"""Shell completion, by argcomplete: verbs, flags, and the names of VMs, images and hosts."""

from __future__ import annotations

import argparse
import os
from typing import Any

from polyvisor.cli.context import Context
from polyvisor.errors import PolyvisorError
from polyvisor.home import default_home

SHELLS = ("bash", "zsh", "fish")


def add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="shell to print it for")
    parser.set_defaults(action=_completion)


def _completion(context: Context, options: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["polyvisor"], shell=options.shell))
    return 0


def complete() -> None:
    """Answer the shell, which has called `polyvisor` to ask for completions, and exit."""
    import argcomplete

    from polyvisor.cli.main import build_parser

    parser = build_parser()
    for action in _actions(parser):
        if action.dest in ("name", "names") and action.metavar in ("NAME", "IMAGE"):
            action.completer = _images if action.metavar == "IMAGE" else _vms  # type: ignore[attr-defined]
        elif action.metavar == "IMAGE|PATH":
            action.completer = _images_and_files  # type: ignore[attr-defined]
        elif action.dest == "image":
            action.completer = _images  # type: ignore[attr-defined]
        elif action.metavar == "SNAPSHOT" and "--name" not in action.option_strings:
            action.completer = _snapshots  # type: ignore[attr-defined]
        elif action.metavar in ("DISK", "NIC"):
            action.completer = _disks if action.metavar == "DISK" else _nics  # type: ignore[attr-defined]
        elif action.metavar == "HOST":
            action.completer = _hosts  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All the arguments of a parser and of those below it."""
    found: list[argparse.Action] = []
    for action in parser._actions:
        found.append(action)
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found += _actions(sub)
    return found


def _vms(parsed_args: argparse.Namespace | None = None, **_: Any) -> list[str]:
    if _elsewhere(parsed_args):
        return []
    from polyvisor.host.store import VMStore

    return VMStore(default_home()).names()


def _snapshots(parsed_args: argparse.Namespace | None = None, **_: Any) -> list[str]:
    from polyvisor.host.store import VMDirectory

    name = getattr(parsed_args, "name", None)
    if _elsewhere(parsed_args) or name not in _vms(parsed_args):
        return []
    snapshots = VMDirectory(default_home().vms / name).path / "snapshots"
    return sorted(path.name for path in snapshots.glob("[!.]*") if path.is_dir())


def _disks(parsed_args: argparse.Namespace | None = None, **_: Any) -> list[str]:
    return [each for each in _devices(parsed_args) if each.startswith("disk")]


def _nics(parsed_args: argparse.Namespace | None = None, **_: Any) -> list[str]:
    return [each for each in _devices(parsed_args) if each.startswith("nic")]


def _devices(parsed_args: argparse.Namespace | None) -> list[str]:
    from polyvisor.host.record import devices_of
    from polyvisor.host.store import VMDirectory

    name = getattr(parsed_args, "name", None)
    if _elsewhere(parsed_args) or name not in _vms(parsed_args):
        return []
    try:
        found = devices_of(VMDirectory(default_home().vms / name).record)
    except PolyvisorError:
        return []
    return [*found.disks, *found.nics]


def _elsewhere(options: argparse.Namespace | None) -> bool:
    """Whether another host is meant: what is there is not asked for at every press of the key."""
    return bool(getattr(options, "on_host", None) or os.environ.get("POLYVISOR_HOST"))


def _hosts(**_: Any) -> list[str]:
    from polyvisor.cli.remote import known_hosts

    return known_hosts().names()


def _images(parsed_args: argparse.Namespace | None = None, **_: Any) -> list[str]:
    if _elsewhere(parsed_args):
        return []
    from polyvisor.host.images import BUILDABLE
    from polyvisor.images import catalogue
    from polyvisor.images.store import ImageStore

    home = default_home()
    return [*ImageStore(home.images).names(), *BUILDABLE, *(entry.name for entry in catalogue.entries(home.path))]


def _images_and_files(prefix: str, parsed_args: argparse.Namespace | None = None, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return [*_images(parsed_args), *FilesCompleter()(prefix)]
