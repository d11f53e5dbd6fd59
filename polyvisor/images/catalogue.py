"""The catalogue: names of well-known cloud images, and where to fetch them.

What a user lists in `<home>/catalogue.yaml` comes first, and may stand for a built-in name. An image is fetched
together with its vendor's checksums over https: that proves that it arrived as the vendor's server has it, not that
the server is honest. See `catalogue_entries` for what was and was not tried.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from polyvisor.errors import DownloadFailed
from polyvisor.images.catalogue_entries import ENTRIES
from polyvisor.images.catalogue_entry import Entry, load_entries
from polyvisor.images.checksum import Checksum, parse_checksum, parse_checksums
from polyvisor.images.image import Image
from polyvisor.images.store import ImageStore
from polyvisor.operation import Progress, Step, silent

__all__ = ["FILE", "Entry", "entries", "fetch", "find", "suggestions"]

FILE = "catalogue.yaml"
_PREFERRED = {"ubuntu": "ubuntu-24.04", "alma": "almalinux-9", "archlinux": "arch"}


def entries(home: Path | None = None) -> list[Entry]:
    """All entries, by name; with `home` also the user's own. Raises InvalidInput where the user's file is wrong."""
    own = load_entries(home / FILE) if home is not None else []
    return sorted({entry.name: entry for entry in (*ENTRIES, *own)}.values(), key=lambda entry: _order(entry.name))


def find(name: str, home: Path | None = None) -> Entry | None:
    """The entry called `name`. Raises InvalidInput where the user's file is wrong."""
    return next((entry for entry in entries(home) if entry.name == name), None)


def suggestions(name: str, home: Path | None = None) -> list[str]:
    """Up to three names that whoever wrote `name` may have meant, the likeliest first."""
    names = [entry.name for entry in entries(home)]
    wanted = name.lower()
    preferred = [_PREFERRED[wanted]] if wanted in _PREFERRED else []
    starting = [known for known in reversed(names) if known.startswith(wanted)] if wanted else []
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    return list(dict.fromkeys([*preferred, *starting, *near]))[:3]


async def fetch(entry: Entry, store: ImageStore, cache: Path, progress: Progress = silent) -> Image:
    """Download the image of `entry`, verify it, and import it under the entry's name.

    Raises DownloadFailed (also where the vendor lists no checksum for it, or another one), and as `import_image`.
    """
    checksum = await _checksum(entry, progress)
    try:
        return await _import(entry, store, cache, checksum, progress)
    except DownloadFailed:
        # "latest" may have been replaced between fetching the list and the image.
        if (newer := await _checksum(entry, progress)) == checksum:
            raise
    return await _import(entry, store, cache, newer, progress)


async def _import(entry: Entry, store: ImageStore, cache: Path, checksum: Checksum, progress: Progress) -> Image:
    from polyvisor.images.importer import import_image

    return await import_image(
        store,
        cache,
        entry.url,
        name=entry.name,
        checksum=str(checksum),
        format=entry.format,
        user=entry.user,
        seed=entry.seed,
        os=entry.os,
        memory_mib=entry.memory_mib,
        progress=progress,
    )


async def _checksum(entry: Entry, progress: Progress) -> Checksum:
    """What the image's checksum must be."""
    if entry.checksum is not None:
        return parse_checksum(entry.checksum)
    from polyvisor.images.download import fetch_text
    from polyvisor.images.http import shown_url

    if entry.checksums is None:
        raise DownloadFailed(f"the catalogue has no checksum for '{entry.name}'", hint="add one to the entry")
    progress(Step("fetch checksums"))
    file = unquote(urlsplit(entry.url).path).rpartition("/")[2]
    if found := parse_checksums(await fetch_text(entry.checksums, progress=progress), file):
        return found
    raise DownloadFailed(
        f"{shown_url(entry.checksums)}: it has no checksum for {file}",
        hint=f"the vendor may have moved the image: put its new address into {FILE}, or use polyvisor image import",
    )


def _order(name: str) -> tuple[str, ...]:
    """Sorts versions as numbers: fedora-9 before fedora-43."""
    return tuple(f"{int(part):09}" if part.isdigit() else part for part in re.split(r"(\d+)", name))
