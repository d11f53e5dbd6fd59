"""`image inspect`: which hypervisors and modes an image can boot in."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.cli.context import Context
from polyvisor.cli.table import pairs, table
from polyvisor.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from polyvisor.images.inspection.findings import Inspection

_TARGETS = {
    "qemu-pvh": "QEMU pvh",
    "qemu-hvm-bios": "QEMU hvm, BIOS",
    "qemu-hvm-uefi": "QEMU hvm, UEFI",
    "xen-pv": "Xen pv",
    "xen-pvh": "Xen pvh",
    "xen-hvm": "Xen hvm",
}


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image",
        metavar="IMAGE|PATH",
        help="an image of the store, or a file of this machine: a disk or an exported image",
    )
    parser.add_argument("--format", help="take the file for this format, where its content does not tell")
    parser.set_defaults(action=_inspect)


def _inspect(context: Context, options: argparse.Namespace) -> int:
    found = context.run(_inspected(context, options.image, options.format))
    if context.json:
        context.print_json(found)
        return 0
    from polyvisor.images.inspection.told import lines

    rows = [(_TARGETS[verdict.target], verdict.boots.value, verdict.reason) for verdict in found.verdicts]
    print(table(("TARGET", "BOOTS", "WHY"), rows))
    print("\nFINDINGS")
    print(pairs(list(lines(found.findings))))
    return 0


async def _inspected(context: Context, image: str, form: str | None) -> Inspection:
    """What image `image` of the host can boot in, or what the file of that name here can.

    A word with a slash is a path; another one is an image's name, and where there is none such, perhaps a file here.
    """
    if "/" in image or form is not None:
        return await _file(context, image, form)
    try:
        return await context.host.image_inspect(image, context.progress)
    except (NotFound, InvalidInput):
        if not Path(image).is_file():
            raise
    return await _file(context, image, form)


async def _file(context: Context, path: str, form: str | None) -> Inspection:
    from polyvisor.home import default_home
    from polyvisor.host.images import Images

    if context.is_elsewhere:
        context.note(f"{path} is a file of this machine, and is read here")
    return await Images(default_home()).inspect_file(path, context.progress, format=form)
