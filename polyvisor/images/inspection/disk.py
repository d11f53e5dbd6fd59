"""The disk that is inspected, as bytes anywhere on it, and parts of it; every read is charged to the budget."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from polyvisor.images.inspection.budget import Budget, Unreadable

MAX_PIECE = 16 << 20  # bytes that are read at once


class Area:
    """`size` bytes at `start` of a disk, which `read` (offset, length → that many bytes, fewer at its end) reads."""

    def __init__(self, read: Callable[[int, int], bytes], start: int, size: int, budget: Budget) -> None:
        self._read = read
        self._start = start
        self.size = size
        self.budget = budget

    def at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; raises Unreadable where they are not within."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise Unreadable("something leads past the end of the disk or the partition")
        if length > MAX_PIECE:
            raise Unreadable("something is of absurd size")
        self.budget.read(length)
        data = self._read(self._start + offset, length)
        if len(data) != length:
            raise Unreadable("the disk is cut off")
        return data

    def unpack(self, layout: str, offset: int) -> tuple[Any, ...]:
        """The numbers of `struct` format `layout` at `offset`."""
        return struct.unpack(layout, self.at(offset, struct.calcsize(layout)))

    def part(self, start: int, size: int) -> Area:
        """The area of a partition, which must lie within; raises Unreadable."""
        if start < 0 or size <= 0 or start + size > self.size:
            raise Unreadable("the partition does not lie on the disk")
        return Area(self._read, self._start + start, size, self.budget)
