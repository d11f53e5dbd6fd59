"""`image`: what VMs boot from."""

from __future__ import annotations

import argparse
import dataclasses
import datetime

from polyvisor.cli.context import Context
from polyvisor.cli.progress import human_size
from polyvisor.cli.table import age, memory, pairs, table
from polyvisor.host.api import Obtainable, StoredImage
from polyvisor.images.image import Image, Seed


def add_image(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_build(verbs.add_parser("build", help="build an image from Debian's packages, without root"))
    _add_import(verbs.add_parser("import", help="take in a disk image from a file or a URL"))
    sub = verbs.add_parser("ls", aliases=["list"], help="list images")
    sub.add_argument("-a", "--all", action="store_true", help="also those that can be built or fetched")
    sub.set_defaults(action=_ls)
    sub = verbs.add_parser("show", help="show one image in full")
    sub.add_argument("name", metavar="IMAGE")
    sub.set_defaults(action=_show)
    sub = verbs.add_parser("pull", help="fetch an image of the catalogue now, rather than when a VM needs it")
    sub.add_argument("name", metavar="IMAGE")
    sub.set_defaults(action=_pull)
    sub = verbs.add_parser("rm", help="delete images that no VM uses")
    sub.add_argument("names", nargs="+", metavar="IMAGE")
    sub.set_defaults(action=_rm)


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=["tiny", "debian", "lab-kvm", "lab-xen"],
        help="tiny: kernel and busybox, in seconds; debian: a full system; lab-kvm, lab-xen: hosts of the lab",
    )
    parser.add_argument("--name", help="name of the image (default: tiny, debian-12, …)")
    parser.add_argument("--suite", help="Debian release: bookworm or trixie (default: bookworm)")
    parser.add_argument("--mirror", metavar="URL", help="Debian mirror (default: this host's)")
    parser.add_argument("--size", metavar="SIZE", help="size of the disk, for debian")
    parser.set_defaults(action=_build)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="PATH|URL", help="qcow2, raw, vmdk, vhd, vhdx, vdi or ova, also compressed")
    parser.add_argument("--name", required=True, help="name of the image")
    parser.add_argument("--checksum", metavar="SHA256", help="refuse the file unless it has this checksum")
    parser.add_argument("--format", help="take the file for this format, where its content does not tell")
    parser.add_argument("--user", help="whom to log in to the guest as")
    parser.add_argument(
        "--seed",
        choices=[Seed.NOCLOUD.value, Seed.NONE.value],
        default=Seed.NOCLOUD.value,
        help="has it cloud-init or not",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", default="512M", help="what VMs get that don't ask (default: %(default)s)"
    )
    parser.set_defaults(action=_import)


def _build(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.spec_flags import size_gib

    given = {"name": options.name, "suite": options.suite, "mirror": options.mirror}
    size = size_gib(options.size, "size") if options.size else None
    image = context.run(context.host.image_build(options.kind, context.progress, size_gib=size, **given))
    return _announce(context, image)


def _import(context: Context, options: argparse.Namespace) -> int:
    from polyvisor.cli.spec_flags import size_mib

    given = {key: getattr(options, key) for key in ("name", "checksum", "format", "user", "seed")}
    amount = size_mib(options.memory, "memory")
    image = context.run(
        context.host.image_import(options.source, progress=context.progress, memory_mib=amount, **given)
    )
    return _announce(context, image)


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
