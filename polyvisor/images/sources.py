"""Which Debian mirror this host uses, read from its apt sources (sources.list(5), both formats)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from polyvisor.values import dataclass

DEFAULT_MIRROR = "http://ftp.debian.org/debian"
_SUITES = {"stable", "oldstable", "testing", "unstable", "sid", "bullseye", "bookworm", "trixie", "forky"}


@dataclass(frozen=True)
class Source:
    """One `deb` source: a base URI with the suites and components taken from it."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]


def default_mirror(etc: Path = Path("/etc")) -> str:
    """The first Debian mirror among the apt sources of a Debian host; DEFAULT_MIRROR elsewhere."""
    try:
        for path in _source_files(etc / "apt"):
            for source in parse_sources(path.read_text(errors="replace"), deb822=path.suffix == ".sources"):
                if is_debian(source):
                    return source.uri.rstrip("/")
    except OSError:
        pass  # no apt here, or none for us to read
    return DEFAULT_MIRROR


def is_debian(source: Source) -> bool:
    """Whether `source` is Debian's main archive: other vendors' and the security archive are not."""
    url = urlsplit(source.uri)
    named = url.path.rstrip("/").rpartition("/")[2] == "debian"
    return (
        url.scheme in ("http", "https") and named and "main" in source.components and bool(_SUITES & {*source.suites})
    )


def _source_files(apt: Path) -> Iterator[Path]:
    if (apt / "sources.list").is_file():
        yield apt / "sources.list"
    yield from sorted(path for path in apt.glob("sources.list.d/*") if path.suffix in (".list", ".sources"))


def parse_sources(text: str, *, deb822: bool) -> list[Source]:
    """The enabled binary sources of one file; what is malformed is left out, as it is none of ours to mend."""
    if deb822:
        return [source for stanza in _stanzas(text) for source in _from_stanza(stanza)]
    return [source for line in text.splitlines() if (source := _from_line(line))]


def _from_line(line: str) -> Source | None:
    """A source from `deb [option=value …] URI suite [component …]`."""
    words = line.partition("#")[0].split()
    if not words or words[0] != "deb":
        return None
    if len(words) > 1 and words[1].startswith("["):
        closing = next((i for i, word in enumerate(words) if word.endswith("]")), len(words))
        words = ["deb", *words[closing + 1 :]]
    return Source(words[1], (words[2],), tuple(words[3:])) if len(words) >= 3 else None


def _from_stanza(fields: dict[str, str]) -> Iterator[Source]:
    if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
        return
    for uri in fields.get("uris", "").split():
        yield Source(uri, tuple(fields.get("suites", "").split()), tuple(fields.get("components", "").split()))


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for block in kept.split("\n\n"):
        if fields := parse_fields(block):
            yield {key.lower(): value for key, value in fields.items()}


def parse_fields(stanza: str) -> dict[str, str]:
    """The fields of one deb822(5) stanza; continuation lines keep their line breaks, without the leading space."""
    fields: dict[str, str] = {}
    key = ""
    for line in stanza.splitlines():
        if line[:1] in (" ", "\t"):
            if key:
                fields[key] += "\n" + line.strip()
        elif ":" in line:
            key, _, value = line.partition(":")
            fields[key] = value.strip()
    return fields
