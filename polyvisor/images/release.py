"""Debian's signed index of indexes, `InRelease`: checking the signature, and what it vouches for.

Format: https://wiki.debian.org/DebianRepository/Format. It is a clear-signed OpenPGP message. Only what gpgv itself hands
back as signed is read, never the file as it came: text around the signed part is nobody's word.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from importlib import resources
from pathlib import Path

from polyvisor.errors import DownloadFailed
from polyvisor.images.sources import parse_fields
from polyvisor.process import find_program, run
from polyvisor.values import dataclass

HOST_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_BEGIN = b"-----BEGIN PGP SIGNED MESSAGE-----"


@dataclass(frozen=True, kw_only=True)
class Release:
    """A verified InRelease. `files` gives the SHA-256 and size in bytes of each index by its path in the suite."""

    suite: str
    codename: str
    date: str
    valid_until: float | None
    by_hash: bool
    files: dict[str, tuple[str, int]]


async def verified_release(signed: bytes, suite: str, *, keyring: Path | None = None) -> Release:
    """The Release that `signed`, an InRelease of `suite`, vouches for.

    `keyring` is a file of OpenPGP keys; by default the host's keyring of Debian's archive, else the one that Polyvisor
    ships. Raises DownloadFailed where it is unsigned, not signed by one of these keys, tampered with, expired or of
    another suite; Unavailable where gpgv is not installed.
    """
    what = f"the index InRelease of '{suite}'"
    with _keyring(keyring) as keys:
        text = await _signed_text(signed, keys, what)
    release = parse_release(text, what)
    if suite not in (release.suite, release.codename):
        raise DownloadFailed(f"{what} is of '{release.codename}' ({release.suite})", hint="use another mirror")
    if release.valid_until is not None and release.valid_until < time.time():
        raise DownloadFailed(f"{what} has expired", hint="check this machine's clock, or use another mirror")
    return release


@contextmanager
def _keyring(given: Path | None) -> Iterator[Path]:
    """The file of keys to check with."""
    shipped = resources.files("polyvisor.images") / "keys" / "debian-archive-keyring.gpg"
    if given or HOST_KEYRING.is_file():
        yield given or HOST_KEYRING
    else:
        with resources.as_file(shipped) as path:
            yield path


async def _signed_text(signed: bytes, keyring: Path, what: str) -> str:
    """The part of `signed` that a good signature covers.

    One good signature is enough: Debian signs with the keys of several releases, and an older keyring lacks the newer.
    A bad one (not merely by an unknown key) is never accepted.
    """
    gpgv = find_program("gpgv", package="gpgv")
    if not signed.startswith(_BEGIN) or signed.count(_BEGIN) != 1:
        raise DownloadFailed(f"{what} is not a signed message", hint="use another mirror, or mind a proxy in between")
    with tempfile.TemporaryDirectory(prefix="polyvisor-") as directory:
        message, plain = Path(directory, "InRelease"), Path(directory, "Release")
        message.write_bytes(signed)
        argv = [gpgv, "--keyring", str(keyring), "--status-fd", "1", "--output", str(plain), str(message)]
        completed = await run(argv, timeout_s=60, check=False)
        states = set(re.findall(r"^\[GNUPG:\] (\w+)", completed.stdout, re.MULTILINE))
        if "BADSIG" in states or not {"GOODSIG", "VALIDSIG"} <= states:
            raise DownloadFailed(f"{what} is refused: {_reason(states)}", hint=_hint(states))
        return plain.read_text(errors="replace")


def _reason(states: set[str]) -> str:
    if "BADSIG" in states:
        return "its signature is bad"
    if "NO_PUBKEY" in states:
        return "it is signed by an unknown key"
    if {"EXPKEYSIG", "REVKEYSIG"} & states:
        return "it is signed by an expired or revoked key"
    return "it has no valid signature"


def _hint(states: set[str]) -> str:
    if "BADSIG" not in states and {"NO_PUBKEY", "EXPKEYSIG"} & states:
        return f"update the package debian-archive-keyring ({HOST_KEYRING}), or use another mirror"
    return "use another mirror, or mind a proxy in between"


def parse_release(text: str, what: str) -> Release:
    """A Release from its text, which must be verified already; raises DownloadFailed."""
    fields = parse_fields(text)
    try:
        until = fields.get("Valid-Until")
        return Release(
            suite=fields.get("Suite", ""),
            codename=fields.get("Codename", ""),
            date=fields["Date"],
            valid_until=parsedate_to_datetime(until).timestamp() if until else None,
            by_hash=fields.get("Acquire-By-Hash") == "yes",
            files=dict(_checksum(line) for line in fields["SHA256"].splitlines() if line),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise DownloadFailed(f"{what} can't be understood: {error}", hint="use another mirror") from error


def _checksum(line: str) -> tuple[str, tuple[str, int]]:
    digest, size, path = line.split()
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"not a SHA-256: {digest[:70]}")
    return path, (digest, int(size))
