"""What an image is: files that never change, and a manifest that says how a VM boots from them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Any

from polyvisor.values import dataclass

FORMAT = 1


class Seed(StrEnum):
    """How a VM's host name, SSH keys and user data reach the guest.

    `INITRD`: a small cpio archive appended to the image's initrd (see `seed.initrd`). `NOCLOUD`: a disk labelled CIDATA
    that cloud-init reads. `NONE`: the image takes none.
    """

    INITRD = "initrd"
    NOCLOUD = "nocloud"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A file of an image, by its name in the image's directory; `size` in bytes."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image in the store.

    `id` is derived from the content of the files. `disk` (always qcow2, `disk_size_mib` as the guest sees it)
    boots by the listed `firmware`; `kernel` and `initrd` with `cmdline` boot directly. `user` is whom to log in as over SSH.
    `memory_mib` is what a VM gets that does not ask for an amount. `recipe` tells an image that Polyvisor built from what the
    present version would build instead (`debian.recipe`). `agent`: its guests listen to what `host/identity.py` tells forks.
    """

    id: str
    name: str
    created_at: float
    source: str
    os: str | None = None
    architecture: str = "x86_64"
    disk: ImageFile | None = None
    disk_size_mib: int | None = None
    kernel: ImageFile | None = None
    initrd: ImageFile | None = None
    cmdline: str = ""
    firmware: tuple[str, ...] = ()
    seed: Seed = Seed.NONE
    user: str | None = None
    memory_mib: int = 512
    recipe: str | None = None
    agent: bool = False

    @property
    def files(self) -> tuple[ImageFile, ...]:
        return tuple(file for file in (self.disk, self.kernel, self.initrd) if file is not None)

    @property
    def size(self) -> int:
        """Bytes that the image occupies."""
        return sum(file.size for file in self.files)

    def same_as(self, other: Image) -> bool:
        """Whether they are one image, wherever and whenever each came into a store: `id` is derived from all the rest."""
        return replace(self, id="", created_at=0.0) == replace(other, id="", created_at=0.0)


def image_to_json(image: Image) -> str:
    return json.dumps({"format": FORMAT, **asdict(image)}, indent=2) + "\n"


def image_from_json(text: str | bytes) -> Image:
    """The image of a manifest that `image_to_json` wrote; raises ValueError, TypeError or KeyError for others."""
    try:
        raw: dict[str, Any] = json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    if not isinstance(raw, dict):
        raise ValueError("it is not an object")
    if (version := raw.pop("format")) != FORMAT:
        raise ValueError(f"manifest format {version} is not {FORMAT}")
    for key in ("disk", "kernel", "initrd"):
        if raw[key] is not None:
            raw[key] = ImageFile(**raw[key])
    return Image(**{**raw, "seed": Seed(raw["seed"]), "firmware": tuple(raw["firmware"])})
