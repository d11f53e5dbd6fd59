"""OVA, an appliance: a tar archive of a description (.ovf), disks, and perhaps a manifest (.mf).

Source: DMTF DSP0243, "Open Virtualization Format Specification" 2.1. The description's References list the files,
its DiskSection the disks. An image here has one disk, so an appliance must have one too. The disk is not unpacked:
it is inspected, and later converted, where it lies in the archive.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

from polyvisor.images.formats.reader import Disk, Reader
from polyvisor.images.formats.tar import Member, members

_MAX_DESCRIPTION = 4 << 20


def inspect(reader: Reader, inspect_disk: Callable[[Reader], Disk]) -> Disk:
    """The one disk of the appliance, found sound by `inspect_disk`; raises ImageRefused."""
    files = {member.name: member for member in members(reader)}
    descriptions = [member for name, member in files.items() if name.lower().endswith(".ovf")]
    if len(descriptions) != 1:
        reader.refuse(
            f"a tar archive with {len(descriptions)} .ovf files is not an appliance",
            hint="if it holds a disk image, unpack it (tar -xf) and import that",
        )
    name = _disk_name(reader, descriptions[0])
    if name not in files:
        reader.refuse(f"its description names a disk that is not in it, {ascii(name)[:80]}")
    member = files[name]
    disk = inspect_disk(reader.window(member.offset, member.size, f"{reader.name}: {name}"))
    return Disk(
        format=disk.format, virtual_size=disk.virtual_size, offset=disk.offset, size=disk.size, member=member.name
    )


def _disk_name(reader: Reader, description: Member) -> str:
    """The file name of the one disk that the description lists."""
    root = _parsed(reader, description)
    disks = [_attribute(element, "fileRef") for element in root.iter() if _local(element) == "Disk"]
    used = [disk for disk in disks if disk]
    if len(used) != 1:
        reader.refuse(
            f"it has {len(used)} disks; an image has one",
            hint="unpack it (tar -xf) and import each disk by itself",
        )
    for element in root.iter():
        if _local(element) == "File" and _attribute(element, "id") == used[0]:
            if _attribute(element, "compression") not in ("", "identity") or _attribute(element, "chunkSize"):
                reader.refuse(
                    "its disk is compressed or split", hint="unpack it (tar -xf) and import the disk by itself"
                )
            return _attribute(element, "href")
    return reader.corrupt("its description lists a disk without a file")


def _parsed(reader: Reader, description: Member) -> ElementTree.Element:
    """The description as XML; one that declares entities is refused before it is parsed (they can grow without end)."""
    if description.size > _MAX_DESCRIPTION:
        reader.corrupt("a description of absurd size")
    data = reader.at(description.offset, description.size, "description")
    try:
        text = data.decode("utf-8-sig")
        if re.search(r"<!\s*(DOCTYPE|ENTITY)", text, re.IGNORECASE):
            reader.corrupt("a description that declares a document type")
        return ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", text))  # noqa: S314
    except (UnicodeDecodeError, ElementTree.ParseError, ValueError, RecursionError):
        reader.corrupt("its description can't be read")


def _local(element: ElementTree.Element) -> str:
    """The element's name without its namespace."""
    return element.tag.rsplit("}", 1)[-1]


def _attribute(element: ElementTree.Element, name: str) -> str:
    """The attribute's value whatever its namespace; empty where there is none."""
    return next((value for key, value in element.attrib.items() if key.rsplit("}", 1)[-1] == name), "")
