"""The manifest of an image that comes from elsewhere: nothing in it is believed before it was looked at.

What the store wrote itself is read by `image.image_from_json`. Here the keys must be known, each value of its type and
something that can be meant; names of files are plain, and no text can steer a terminal or a command.
"""

from __future__ import annotations

import json
import re
from typing import Any

from polyvisor.errors import InvalidInput
from polyvisor.images.formats.firmware import BIOS, UEFI
from polyvisor.images.image import FORMAT, Image, ImageFile, Seed
from polyvisor.spec.parse import structure
from polyvisor.spec.vm import MAX_DISK_GIB, MAX_MEMORY_MIB, MIN_MEMORY_MIB

MANIFEST = "image.json"
MAX_MANIFEST = 64 << 10

_ARCHITECTURE = "x86_64"
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,63}\Z")
_MAX_TEXT = 4096
_MAX_CMDLINE = 2047  # Linux, arch/x86/include/asm/setup.h: COMMAND_LINE_SIZE, with its NUL
_GIB = 1024


def parse_manifest(data: bytes) -> Image:
    """The image that a stranger's manifest describes, its name not yet checked; raises InvalidInput."""
    raw = strict_json(data)
    version = raw.pop("format", None)
    if type(version) is not int or version != FORMAT:
        raise InvalidInput("format", version, f"is not {FORMAT}", hint="this version of Polyvisor does not know it")
    image = structure(raw, Image)
    _check_files(image)
    _check_boot(image)
    _check_texts(image)
    if not MIN_MEMORY_MIB <= image.memory_mib <= MAX_MEMORY_MIB:
        raise InvalidInput("memory_mib", image.memory_mib, "is out of range")
    return image


def strict_json(data: bytes) -> dict[str, Any]:
    """The mapping in a stranger's JSON, in which no key stands twice and no number is none."""

    def no_number(text: str) -> Any:
        raise ValueError(f"{text} is no number")

    try:
        raw = json.loads(data.decode(), object_pairs_hook=_without_doubles, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("manifest", data[:60].decode(errors="replace"), "is not JSON as it should be") from error
    if not isinstance(raw, dict):
        raise InvalidInput("manifest", raw, "is not a mapping of keys to values")
    return raw


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _check_files(image: Image) -> None:
    for key, file in _files(image):
        if not _FILE.match(file.name) or file.name == MANIFEST:
            raise InvalidInput(f"{key}.name", file.name, "is not the name of an image's file")
        if not _SHA256.match(file.sha256):
            raise InvalidInput(f"{key}.sha256", file.sha256, "is not a SHA-256")
        if file.size <= 0:
            raise InvalidInput(f"{key}.size", file.size, "is not the size of a file")
    names = [file.name for file in image.files]
    if len(set(names)) < len(names):
        raise InvalidInput("files", names, "are not of different names")


def _files(image: Image) -> list[tuple[str, ImageFile]]:
    named = (("disk", image.disk), ("kernel", image.kernel), ("initrd", image.initrd))
    return [(key, file) for key, file in named if file is not None]


def _check_boot(image: Image) -> None:
    """What belongs together must be there together, and something must boot."""
    if image.architecture != _ARCHITECTURE:
        raise InvalidInput("architecture", image.architecture, f"is not {_ARCHITECTURE}: it would not run")
    if image.disk is None and image.kernel is None:
        raise InvalidInput("disk", None, "there is neither a disk nor a kernel: nothing would boot")
    if image.kernel is None and (image.initrd is not None or image.cmdline):
        raise InvalidInput("kernel", None, "is missing: there are an initrd or a command line for one")
    if image.seed is Seed.INITRD and image.initrd is None:
        raise InvalidInput("initrd", None, "is missing: the seed would be put into it")
    if (image.disk is None) is not (image.disk_size_mib is None):
        raise InvalidInput(
            "disk_size_mib", image.disk_size_mib, "there is a size without a disk, or a disk without one"
        )
    if image.disk_size_mib is not None and not 1 <= image.disk_size_mib <= MAX_DISK_GIB * _GIB:
        raise InvalidInput("disk_size_mib", image.disk_size_mib, "is out of range")
    if image.firmware not in ((), (BIOS,), (UEFI,), (BIOS, UEFI)) or (image.firmware and image.disk is None):
        raise InvalidInput("firmware", list(image.firmware), "is not what a disk can boot by")


def _check_texts(image: Image) -> None:
    for key, text, longest in (
        ("source", image.source, _MAX_TEXT),
        ("os", image.os or "", _MAX_TEXT),
        ("cmdline", image.cmdline, _MAX_CMDLINE),
        ("recipe", image.recipe or "", _MAX_TEXT),
    ):
        if len(text) > longest or not text.isprintable():
            raise InvalidInput(key, text, f"is not a line of at most {longest} printable characters")
    if image.user is not None and not _USER.match(image.user):
        raise InvalidInput("user", image.user, "is not whom one could log in as")
