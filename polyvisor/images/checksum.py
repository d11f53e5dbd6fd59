"""Checksums of files: how users write them, how vendors publish them, and whether a file has one.

Vendors publish three kinds: the output of sha256sum and its like (`<hex>  <name>`, `<hex> *<name>`), the BSD kind
(`SHA256 (<name>) = <hex>`), and a file with nothing but the sum. MD5 and SHA-1 are not accepted: files can be
made to have a given one, so they would promise what they can't keep.
"""

from __future__ import annotations

import hashlib
import re
from typing import BinaryIO

from polyvisor.errors import InvalidInput
from polyvisor.operation import Progress, Step, silent
from polyvisor.values import dataclass

_LENGTHS = {64: "sha256", 96: "sha384", 128: "sha512"}
_WEAK = {32: "md5", 40: "sha1"}
_HEX = re.compile(r"[0-9a-fA-F]+\Z")
_GNU = re.compile(r"\\?([0-9a-fA-F]{64,128})[ \t]+\*?(\S.*)\Z")
_BSD = re.compile(r"(SHA(?:256|384|512)) ?\((.+)\) ?= ?([0-9a-fA-F]{64,128})\Z", re.IGNORECASE)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Checksum:
    """A sum that a file must have; `hex` in lower case."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


def parse_checksum(text: str) -> Checksum:
    """The checksum that a user wrote as `sha256:<hex>` or as the bare hex; raises InvalidInput."""
    named, _, rest = text.strip().rpartition(":")
    digits = rest.strip().lower()
    algorithm = _LENGTHS.get(len(digits)) if _HEX.match(digits) else None
    name = named.lower().replace("-", "")
    if (name or _WEAK.get(len(digits))) in _WEAK.values():
        raise InvalidInput(
            "checksum", text, "MD5 and SHA-1 can be forged", hint="give the file's SHA-256: sha256sum FILE"
        )
    if algorithm is None or name not in ("", algorithm):
        raise InvalidInput(
            "checksum", text, "is not a checksum", hint="write sha256:<64 digits> or sha512:<128 digits>"
        )
    return Checksum(algorithm, digits)


def parse_checksums(text: str, filename: str) -> Checksum | None:
    """The strongest checksum that a vendor's checksum file `text` has for `filename`, or None.

    A file with nothing but one sum is taken to be about `filename`.
    """
    found: list[Checksum] = []
    bare: list[Checksum] = []
    for line in (line.strip() for line in text.splitlines()):
        if bsd := _BSD.match(line):
            algorithm, name, digits = bsd[1].lower(), bsd[2], bsd[3].lower()
        elif gnu := _GNU.match(line):
            algorithm, name, digits = _LENGTHS.get(len(gnu[1]), ""), gnu[2], gnu[1].lower()
        else:
            if _HEX.match(line) and len(line) in _LENGTHS:
                bare.append(Checksum(_LENGTHS[len(line)], line.lower()))
            continue
        if _LENGTHS.get(len(digits)) == algorithm and name.removeprefix("./") == filename:
            found.append(Checksum(algorithm, digits))
    if not found and len(bare) == 1 and len(text.split()) == 1:
        found = bare
    if len({(sum_.algorithm, sum_.hex) for sum_ in found}) != len({sum_.algorithm for sum_ in found}):
        return None  # the file contradicts itself
    return max(found, key=lambda checksum: len(checksum.hex), default=None)


def checksum_of(file: BinaryIO, algorithm: str, size: int, progress: Progress = silent) -> Checksum:
    """The checksum of an open file of `size` bytes, from its start."""
    digest = hashlib.new(algorithm)
    file.seek(0)
    done = 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        done += len(chunk)
        progress(Step("checksum", done, size, "B"))
    return Checksum(algorithm, digest.hexdigest())
