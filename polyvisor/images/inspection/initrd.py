"""An initramfs: the kernel modules in it.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst: cpio archives ("newc") that follow one another,
the first ones (microcode, say) uncompressed, the last one usually compressed; between them may be zeros.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator

from polyvisor.images.inspection.budget import MIB, Budget, Unreadable
from polyvisor.images.inspection.unpacking import packing_of, unpacked
from polyvisor.values import dataclass

MAX_INITRD = 256 * MIB  # of the file
_HEADER = 110
_MAGICS = (b"070701", b"070702")
_MAX_NAME = 4096
_MAX_MEMBERS = 200_000
_MODULE = re.compile(r"\.ko(\.(xz|gz|zst|lz4))?\Z")
_BUILT_IN = re.compile(r"(\A|/)lib/modules/[^/]+/modules\.builtin\Z")
_MAX_LIST = 4 * MIB
_MAX_ARCHIVES = 64
_ZEROS = re.compile(rb"\0*")


@dataclass(frozen=True, kw_only=True)
class Initrd:
    """What an initramfs holds: modules by the kernel's names, and those that it knows to be built into the kernel."""

    packing: str
    modules: frozenset[str]
    built_in: frozenset[str]


def read_initrd(data: bytes, budget: Budget) -> Initrd:
    """The initramfs in the file `data`; raises Unreadable, with the packing, where Python can't unpack it."""
    modules: set[str] = set()
    built_in: set[str] = set()
    at = _after_zeros(data, 0)
    for _ in range(_MAX_ARCHIVES):
        if at == len(data):
            return Initrd(packing="none", modules=frozenset(modules), built_in=frozenset(built_in))
        packing = packing_of(data[at : at + 16])
        pieces = unpacked(data[at:], packing, budget) if packing else iter((data[at:],))
        source = _Source(pieces)
        for name, content in _members(source, budget):
            _note(name, content, modules, built_in)
        if packing:  # what follows (a seed, say) has no modules of the system's
            return Initrd(packing=packing, modules=frozenset(modules), built_in=frozenset(built_in))
        at = _after_zeros(data, at + source.position)
    raise Unreadable(f"it is of more than {_MAX_ARCHIVES} archives")


def module_name(path: str) -> str | None:
    """The name of the module in file `path`, with underscores; None where it is none."""
    base = path.rpartition("/")[2]
    return _MODULE.sub("", base).replace("-", "_") if _MODULE.search(base) else None


def listed(text: str) -> frozenset[str]:
    """The modules that a list of files, as modules.builtin is one, names."""
    return frozenset(name for line in text.split() if (name := module_name(line)))


def _after_zeros(data: bytes, at: int) -> int:
    """Where the zeros that begin at `at` end."""
    match = _ZEROS.match(data, at)
    return match.end() if match else at


def _note(name: str, content: bytes, modules: set[str], built_in: set[str]) -> None:
    if module := module_name(name):
        modules.add(module)
    elif content:
        built_in |= listed(content.decode(errors="replace"))


class _Source:
    """Bytes that come in pieces, read one after the other."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._have = b""
        self._at = 0
        self.position = 0

    def take(self, length: int, *, keep: bool = True) -> bytes:
        """The next `length` bytes, or nothing of them where they need not be kept; raises Unreadable at the end."""
        kept = []
        while length > 0:
            if self._at == len(self._have):
                piece = next(self._pieces, None)
                if piece is None:
                    raise Unreadable("its archive is cut off")
                self._have, self._at = piece, 0
            part = min(length, len(self._have) - self._at)
            if keep:
                kept.append(self._have[self._at : self._at + part])
            self._at += part
            self.position += part
            length -= part
        return b"".join(kept)


def _members(source: _Source, budget: Budget) -> Iterator[tuple[str, bytes]]:
    """Name and, of lists of modules alone, content of the members of one archive."""
    for _ in range(_MAX_MEMBERS):
        header = source.take(_HEADER)
        if header[:6] not in _MAGICS:
            raise Unreadable("what it is packed with is not known, or its archive is damaged")
        try:
            mode, size, name_size = (int(header[i : i + 8], 16) for i in (14, 54, 94))
        except ValueError as error:
            raise Unreadable("its archive is damaged") from error
        if not 0 < name_size <= _MAX_NAME:
            raise Unreadable("its archive has a name of absurd length")
        name = source.take(name_size).rstrip(b"\0").decode(errors="replace")
        source.take(-(_HEADER + name_size) % 4)
        if name == "TRAILER!!!":
            return
        budget.check_time()
        wanted = stat.S_ISREG(mode) and size <= _MAX_LIST and bool(_BUILT_IN.search(name))
        content = source.take(size, keep=wanted)
        source.take(-size % 4)
        yield name, content
    raise Unreadable(f"its archive has more than {_MAX_MEMBERS} members")
