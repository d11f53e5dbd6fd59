"""`image`: what VMs boot from."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from pathlib import Path
from typing import Any

from polyvisor.cli.context import Context
from polyvisor.cli.progress import human_size
from polyvisor.cli.table import age, memory, pairs, table
from polyvisor.host.api import Obtainable, StoredImage
from polyvisor.images.image import Image, Seed


def add_image(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_build(verbs.add_parser("build", help="build an image from Debian's packages, without root"))
    _add_import(verbs.add_parser("import", help="take in a disk image, or an exported image, from a file or a URL"))
    _add_export(verbs.add_parser("export", help="write an image into one file"))
    _add_copy(verbs.add_parser("copy", help="send an image to another host"))
    sub = verbs.add_parser("ls", aliases=["list"], help="list images")
    sub.add_argument("-a", "--all", action="store_true", help="also those that can be built or fetched")
    sub.set_defaults(action=_ls)
    sub = verbs.add_parser("show", help="show one image in full")
    sub.add_argument("name", metavar="IMAGE")
    sub.set_defaults(action=_show)
    from polyvisor.cli.inspect import add_inspect

    add_inspect(verbs.add_parser("inspect", help="tell which hypervisors and modes an image can boot in, and why"))
    sub = verbs.add_parser("pull", help="fetch an image of the catalogue now, rather than when a VM needs it")
    sub.add_argument("name", metavar="IMAGE")
    sub.set_defaults(action=_pull)
    sub = verbs.add_parser("rm", help="delete images that no VM uses")
    sub.add_argument("names", nargs="+", metavar="IMAGE")
    sub.set_defaults(action=_rm)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=["tiny", "debian", "bench", "lab-kvm", "lab-xen"],
        help="tiny: kernel and busybox, in seconds; debian: a full system; bench: the same, with what compare measures by; "
        "lab-kvm, lab-xen: hosts of the lab",
    )
    parser.add_argument("--name", help="name of the image (default: tiny, debian-12, …)")
    parser.add_argument("--suite", help="Debian release: bookworm or trixie (default: bookworm)")
    parser.add_argument("--mirror", metavar="URL", help="Debian mirror (default: this host's)")
    parser.add_argument("--size", metavar="SIZE", help="size of the disk, for debian")
    parser.set_defaults(action=_build)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="PATH|URL", help="qcow2, raw, vmdk, vhd, vhdx, vdi, ova or an exported image, also compressed"
    )
    parser.add_argument("--name", help="name of the image; an exported one has its own")
    parser.add_argument("--checksum", metavar="SHA256", help="refuse the file unless it has this checksum")
    parser.add_argument("--format", help="take the file for this format, where its content does not tell")
    parser.add_argument("--user", help="whom to log in to the guest as")
    parser.add_argument(
        "--seed",
        choices=[Seed.NOCLOUD.value, Seed.NONE.value],
        help="has it cloud-init or not (default: nocloud)",
    )
    parser.add_argument("--memory", metavar="SIZE", help="what VMs get that don't ask (default: 512M)")
    parser.set_defaults(action=_import)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="IMAGE")
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write (default: IMAGE.polyvisor.tar)")
    parser.add_argument("-f", "--force", action="store_true", help="replace a file that is there")
    parser.set_defaults(action=_export)


def _add_copy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="IMAGE")
    parser.add_argument("--to", metavar="HOST", required=True, help="the host that gets it (polyvisor host ls)")
    parser.add_argument("--name", dest="new_name", metavar="NAME", help="what it is called there (default: as here)")
    parser.set_defaults(action=_copy)


def _build(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.spec_flags import size_gib

    given = {"name": options.name, "suite": options.suite, "mirror": options.mirror}
    size = size_gib(options.size, "size") if options.size else None
    image = context.run(context.host.image_build(options.kind, context.progress, size_gib=size, **given))
    return _announce(context, image)


def _import(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.spec_flags import size_mib

    given: dict[str, Any] = {key: getattr(options, key) for key in ("name", "checksum", "format", "user", "seed")}
    if options.memory is not None:
        given["memory_mib"] = size_mib(options.memory, "memory")
    image = context.run(context.host.image_import(options.source, progress=context.progress, **given))
    return _announce(context, image)


def _export(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.images.portable import SUFFIX
    from polyvisor.images.store import check_image_name
    from polyvisor.remote.transfer import export_image

    path = Path(options.output or f"{check_image_name(options.name)}{SUFFIX}")
    image = context.run(export_image(context.host, options.name, path, context.progress, replacing=options.force))
    if context.json:
        context.print_json({"file": str(path.absolute()), "size": path.stat().st_size, "image": image})
    context.say(f"image {image.name} ({image.id}) is in {path}, {human_size(path.stat().st_size)}")
    return 0


def _copy(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.remote import named_host
    from polyvisor.remote.transfer import copy_image

    target = named_host(options.to)

    async def work() -> Image:
        try:
            return await copy_image(context.host, options.name, target, context.progress, new_name=options.new_name)
        finally:
            await target.close()

    image = context.run(work())
    if context.json:
        context.print_json(image)
    context.say(f"image {image.name} ({image.id}) is on {options.to}: polyvisor --host {options.to} run {image.name}")
    return 0


def _pull(context: Context, options: argparse.Namespace) -> int:
    return _announce(context, context.run(context.host.image_pull(options.name, context.progress)))


def _announce(context: Context, image: Image) -> int:
    if context.json:
        context.print_json(image)
    context.say(
        f"image {image.name} ({image.id}, {human_size(image.size)}) is ready; run it: polyvisor run {image.name}"
    )
    return 0


def _ls(context: Context, options: argparse.Namespace) -> int:
    async def work() -> tuple[list[StoredImage], list[Obtainable]]:
        return await context.host.image_list(), await context.host.image_catalogue() if options.all else []

    stored, obtainable = context.run(work())
    here = {one.image.name for one in stored}
    others = [one for one in obtainable if one.name not in here]
    if context.json:
        images = [_plain(one) for one in stored]
        context.print_json(images if not options.all else {"here": images, "obtainable": [o.name for o in others]})
        return 0
    rows = [_row(one) for one in stored] + [(one.name, "", one.about, "", "", "") for one in others]
    if rows:
        print(table(("NAME", "ID", "SYSTEM", "SIZE", "BOOTS BY", "AGE"), rows))
    else:
        context.note("no images here; begin with: polyvisor image build tiny, or see: polyvisor image ls --all")
    return 0


def _row(stored: StoredImage) -> tuple[str, ...]:
    image = stored.image
    name = image.name if stored.current else ""
    return (name, image.id, image.os or "", human_size(image.size), _boots(image), age(image.created_at))


def _plain(stored: StoredImage) -> dict[str, object]:
    """An image for JSON: what its manifest says, and where it is."""
    return {**dataclasses.asdict(stored.image), "current": stored.current, "directory": stored.directory}


def _boots(image: Image) -> str:
    return ", ".join((*(["direct kernel"] if image.kernel else []), *image.firmware))


def _show(context: Context, options: argparse.Namespace) -> int:
    stored = context.run(context.host.image_show(options.name))
    image = stored.image
    if context.json:
        context.print_json(_plain(stored))
        return 0
    made = datetime.datetime.fromtimestamp(image.created_at).astimezone().isoformat(" ", "seconds")
    lines = [
        ("name", image.name),
        ("id", image.id),
        ("system", image.os or "unknown"),
        ("architecture", image.architecture),
        ("source", image.source),
        ("made", made),
        ("boots by", _boots(image) or "unknown"),
        ("disk", memory(image.disk_size_mib) if image.disk_size_mib else "none"),
        ("memory", memory(image.memory_mib)),
        ("log in as", image.user or "unknown"),
        ("seed", image.seed.value),
        *((file.name, f"{human_size(file.size)}, sha256 {file.sha256}") for file in image.files),
        ("directory", stored.directory),
    ]
    print(pairs(lines))
    return 0


def _rm(context: Context, options: argparse.Namespace) -> int:
    async def work() -> None:
        for name in options.names:
            await context.host.image_remove(name)
            context.say(f"image {name} is removed")

    context.run(work())
    return 0
