"""Reads the pixels of a PNG picture: 8 bits a channel, not interlaced, as browsers write them (RFC 2083)."""

from __future__ import annotations

import struct
import zlib


def pixels(data: bytes) -> list[tuple[int, int, int]]:
    """Red, green and blue of every pixel, row by row."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    packed, at = b"", 8
    width = height = step = 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, interlaced) == (8, 0) and color in (2, 6)
            step = 3 if color == 2 else 4
        if kind == b"IDAT":
            packed += body
        at += 12 + length
    raw, found = zlib.decompress(packed), []
    before = bytearray(width * step)
    for row in range(height):
        start = row * (width * step + 1)
        line = bytearray(raw[start + 1 : start + 1 + width * step])
        _unfilter(raw[start], line, before, step)
        found += [(line[i], line[i + 1], line[i + 2]) for i in range(0, len(line), step)]
        before = line
    return found


def _unfilter(kind: int, line: bytearray, above: bytearray, step: int) -> None:
    """Undo one of PNG's five filters, in place."""
    if kind == 2:
        line[:] = bytes((a + b) & 0xFF for a, b in zip(line, above, strict=True))
        return
    for i in range(len(line) if kind else 0):
        left, up, corner = line[i - step] if i >= step else 0, above[i], above[i - step] if i >= step else 0
        if kind == 1:
            line[i] = (line[i] + left) & 0xFF
        elif kind == 3:
            line[i] = (line[i] + (left + up) // 2) & 0xFF
        elif kind == 4:
            guess = left + up - corner
            line[i] = (line[i] + min((left, up, corner), key=lambda v: abs(guess - v))) & 0xFF
