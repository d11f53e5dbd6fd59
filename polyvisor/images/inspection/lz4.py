"""Unpacking LZ4's legacy frames, in which Linux kernels and initramfs archives are packed.

Formats: lz4, doc/lz4_Frame_format.md ("Legacy frame") and doc/lz4_Block_format.md. A frame is a magic number and blocks,
each with its packed size before it, that unpack to 8 MiB (the last one to less) and don't refer to each other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MAGIC = b"\x02\x21\x4c\x18"
BLOCK = 8 << 20
_LONG = 15


def blocks(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the blocks of the frame `data` are: offset and packed size; ends where what follows can be none."""
    at = len(MAGIC)
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        if data[at : at + 4] == MAGIC:  # frames may follow each other
            at += 4
            continue
        at += 4
        if not 0 < size <= len(data) - at or size > BLOCK + BLOCK // 255 + 16:
            return
        yield at, size
        at += size


def unpack_block(data: bytes, at: int, size: int, limit: int = BLOCK) -> bytes:
    """The first `limit` bytes, or all, of what a block holds; raises ValueError where it is damaged."""
    out = bytearray()
    end = at + size
    try:
        while at < end and len(out) < limit:
            token = data[at]
            at += 1
            literals, at = _length(data, token >> 4, at)
            if at + literals > end or len(out) + literals > BLOCK:
                raise ValueError("literals past the end of the block")
            out += data[at : at + literals]
            at += literals
            if at >= end:
                break
            distance = data[at] | data[at + 1] << 8
            at += 2
            match, at = _length(data, token & _LONG, at)
            match += 4
            start = len(out) - distance
            if start < 0 or not distance or len(out) + match > BLOCK:
                raise ValueError("a match outside of the block")
            if distance >= match:
                out += out[start : start + match]
            else:  # it repeats what it writes itself
                piece = bytes(out[start:])
                out += (piece * (match // distance + 1))[:match]
    except IndexError as error:
        raise ValueError("the block is cut off") from error
    return bytes(out[:limit])


def _length(data: bytes, length: int, at: int) -> tuple[int, int]:
    """A length that may go on in further bytes, and where they end."""
    if length == _LONG:
        while True:
            more = data[at]
            at += 1
            length += more
            if more != 255 or length > BLOCK:
                return length, at
    return length, at
