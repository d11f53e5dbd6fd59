"""`snapshot`, `clone`, `export`, `import`: what VMs were, copies of them, and VMs as files."""

from __future__ import annotations

import argparse
import contextlib
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

from polyvisor.cli.context import Context
from polyvisor.cli.progress import human_size
from polyvisor.cli.show import describe
from polyvisor.cli.table import age, pairs, table
from polyvisor.errors import PolyvisorError
from polyvisor.host.snapshots import Snapshot
from polyvisor.images.image import Seed
from polyvisor.status import VMState, VMStatus


def add_snapshot(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    sub = verbs.add_parser("create", help="keep what a VM is at this moment")
    sub.add_argument("name", metavar="NAME", help="a VM, stopped or running")
    sub.add_argument("--name", dest="snapshot", metavar="SNAPSHOT", help="what it is called (default: s1, s2, …)")
    sub.add_argument("--description", default="", metavar="TEXT", help="a line that says what it is for")
    sub.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep memory too, or disks alone (default: memory, where the VM is alive)",
    )
    sub.set_defaults(action=_create)
    sub = verbs.add_parser("ls", aliases=["list"], help="list the snapshots of a VM, as a tree")
    sub.add_argument("name", metavar="NAME", help="a VM")
    sub.set_defaults(action=_ls)
    sub = _one(verbs, "show", "show one snapshot in full")
    sub.set_defaults(action=_show)
    sub = _one(verbs, "revert", "let a VM be as it was; what it has become since its last snapshot is lost")
    sub.add_argument("-f", "--force", action="store_true", help="kill the VM if it is alive")
    sub.add_argument("--start", action="store_true", help="start it from there")
    sub.set_defaults(action=_revert)
    sub = verbs.add_parser("rm", help="delete snapshots; those after them stay")
    sub.add_argument("name", metavar="NAME", help="a VM")
    sub.add_argument("snapshots", nargs="+", metavar="SNAPSHOT", help="snapshots of it: polyvisor snapshot ls")
    sub.set_defaults(action=_rm)


def add_clone(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a VM that is stopped, or has snapshots")
    parser.add_argument("new_name", metavar="NEW", help="name of the clone")
    parser.add_argument("--snapshot", metavar="SNAPSHOT", help="what the VM was at this snapshot")
    parser.add_argument(
        "--full", action="store_true", help="copy the disks; without, clone and source share what they hold"
    )
    parser.set_defaults(action=_clone)


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a VM that is stopped")
    parser.add_argument("file", metavar="FILE", help="file to write")
    parser.add_argument("-f", "--force", action="store_true", help="replace a file that is there")
    parser.set_defaults(action=_export)


def add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a file that polyvisor export has written")
    parser.add_argument("--name", dest="new_name", metavar="NEW", help="name of the VM (default: its own)")
    parser.set_defaults(action=_import)


def _one(verbs: argparse._SubParsersAction[argparse.ArgumentParser], verb: str, about: str) -> argparse.ArgumentParser:
    sub = verbs.add_parser(verb, help=about)
    sub.add_argument("name", metavar="NAME", help="a VM")
    sub.add_argument("snapshot", metavar="SNAPSHOT", help="a snapshot of it: polyvisor snapshot ls")
    return sub


def _create(context: Context, options: argparse.Namespace) -> int:
    given = {"snapshot": options.snapshot, "memory": options.memory, "description": options.description}
    made = context.run(context.host.snapshot_create(options.name, context.progress, **given))
    if context.json:
        context.print_json(made)
    context.say(f"{options.name} has the snapshot {made.name}, {_what(made)}")
    return 0


def _ls(context: Context, options: argparse.Namespace) -> int:
    found = context.run(context.host.snapshot_list(options.name))
    if context.json:
        context.print_json(found)
        return 0
    if not found:
        context.note(f"no snapshots; make one: polyvisor snapshot create {options.name}")
        return 0
    rows = [
        (
            f"{'  ' * depth}{one.name}{' *' if one.current else ''}",
            age(one.created_at),
            "" if one.memory_bytes is None else human_size(one.memory_bytes),
            human_size(one.disk_bytes),
            one.description,
        )
        for depth, one in tree(found)
    ]
    print(table(("NAME", "AGE", "MEMORY", "DISKS", "DESCRIPTION"), rows))
    return 0


def tree(found: Sequence[Snapshot]) -> Iterator[tuple[int, Snapshot]]:
    """The snapshots, each after its parent and how deep it stands, those with the same parent by age."""
    names = {one.name for one in found}
    # Whatever the parents say: each is shown once, and a circle ends.
    todo = [(0, one) for one in reversed(found) if one.parent not in names]
    seen: set[str] = set()
    while todo or len(seen) < len(found):
        depth, one = todo.pop() if todo else (0, next(each for each in found if each.name not in seen))
        if one.name in seen:
            continue
        seen.add(one.name)
        yield depth, one
        todo += [(depth + 1, each) for each in reversed(found) if each.parent == one.name]


def _show(context: Context, options: argparse.Namespace) -> int:
    one = context.run(context.host.snapshot_show(options.name, options.snapshot))
    if context.json:
        context.print_json(one)
        return 0
    made = datetime.datetime.fromtimestamp(one.created_at).astimezone().isoformat(" ", "seconds")
    lines = [
        ("name", one.name),
        ("made", made),
        ("after", one.parent or "none"),
        ("current", "yes" if one.current else "no"),
        ("memory", "none" if one.memory_bytes is None else human_size(one.memory_bytes)),
        ("disks", human_size(one.disk_bytes)),
        ("holds", _what(one)),
        *([("description", one.description)] if one.description else []),
    ]
    print(context.advice(pairs(lines)))
    return 0


def _what(one: Snapshot) -> str:
    """What is in a snapshot, for people."""
    if one.memory_bytes is not None:
        return "with its memory"
    if one.running:
        return "without its memory: its disks are as after a power cut"
    return "of its disks"


def _revert(context: Context, options: argparse.Namespace) -> int:
    async def work() -> VMStatus:
        status = await context.host.snapshot_revert(
            options.name, options.snapshot, context.progress, force=options.force
        )
        return await context.host.start(options.name, context.progress) if options.start else status

    status = context.run(work())
    if context.json:
        context.print_json(status)
    goes_on = f"; it goes on: polyvisor start {options.name}" if status.state is VMState.SAVED else ""
    context.say(f"{options.name} is as it was at {options.snapshot}: {status.state}{goes_on}")
    return 0


def _rm(context: Context, options: argparse.Namespace) -> int:
    async def work() -> None:
        for snapshot in options.snapshots:
            await context.host.snapshot_remove(options.name, snapshot, context.progress)
            context.say(f"snapshot {snapshot} of {options.name} is removed")

    context.run(work())
    return 0


def _clone(context: Context, options: argparse.Namespace) -> int:
    async def work() -> tuple[VMStatus, Seed | None]:
        status = await context.host.clone(
            options.name, options.new_name, context.progress, snapshot=options.snapshot, full=options.full
        )
        with contextlib.suppress(PolyvisorError):  # its image may have lost that name, and the clone is there
            return status, (await context.host.image_show(status.image or "")).image.seed
        return status, None

    status, seed = context.run(work())
    if context.json:
        context.print_json(status)
    context.say(f"{describe(status)}, a clone of {options.name}; start it: polyvisor start {options.new_name}")
    if seed is Seed.NONE:
        context.note(f"its image has no cloud-init: host keys and machine-id on its disk are those of {options.name}")
    return 0


def _export(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.remote.transfer import export_vm

    path = Path(options.file)
    context.run(export_vm(context.host, options.name, path, context.progress, replacing=options.force))
    size = path.stat().st_size
    if context.json:
        context.print_json({"file": str(path.absolute()), "size": size, "vm": options.name})
    context.say(f"VM {options.name} is in {path}, {human_size(size)}")
    return 0


def _import(context: Context, options: argparse.Namespace) -> int:
    status = context.run(context.host.vm_import(options.file, name=options.new_name, progress=context.progress))
    if context.json:
        context.print_json(status)
    context.say(f"{describe(status)}, from {options.file}; start it: polyvisor start {status.name}")
    return 0
