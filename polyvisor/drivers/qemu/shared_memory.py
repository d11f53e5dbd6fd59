"""A guest's memory that is a file which its QEMU shares (`memory-backend-memfd`), copied from outside of that QEMU.

It is copied twice: once while the guest runs, and then, while it stands still, wherever the copy differs by then. What a
guest writes in between is found by comparing, and not by anybody's notes of it. So the pause is as long as it takes to read
memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from collections.abc import Iterator

_FILE = re.compile(r"/memfd:memory-backend-memfd\b")
_PIECE = 256 << 10
_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def memory_of(pid: int, size: int) -> int | None:
    """The file that is the memory of a QEMU, open for reading; None where it has no such file of so many bytes."""
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            if _FILE.match(os.readlink(entry.path)):  # noqa: PTH115 - of an entry that need not lead to a path
                fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                if os.fstat(fd).st_size == size:
                    return fd
                os.close(fd)
    return None


class Copy:
    """`target`, a file in memory, as a copy of the file `source`, which others write to meanwhile; both of `size` bytes.

    Holes of the source are never touched, since reading them would fill them.
    """

    def __init__(self, source: int, target: int, size: int) -> None:
        self._source, self._target, self._size = source, target, size
        # Private and never written: what ctypes takes an address of must be writable.
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self._maps = [mmap.mmap(fd, size, mmap.MAP_PRIVATE, protection) for fd in (source, target)]

    def copy(self) -> None:
        """Copy all there is."""
        for start, end in _data(self._source, self._size):
            self._write(start, end)

    def follow(self) -> None:
        """Copy what differs by now. What is left differs from nothing where nobody writes."""
        end_before = 0
        with self._addresses() as (source, target):
            for start, end in _data(self._source, self._size):
                self._clear(end_before, start)
                end_before = end
                for at in range(start, end, _PIECE):
                    length = min(_PIECE, end - at)
                    if _libc.memcmp(source + at, target + at, length):
                        self._write(at, at + length)
        self._clear(end_before, self._size)

    def close(self) -> None:
        for each in self._maps:
            each.close()

    def _write(self, start: int, end: int) -> None:
        with memoryview(self._maps[0]) as source:
            while start < end:
                with source[start:end] as piece:
                    start += os.pwrite(self._target, piece, start)

    def _clear(self, start: int, end: int) -> None:
        """Zeroes where the source has become a hole."""
        for at, until in list(_data(self._target, end, start)):
            os.pwrite(self._target, bytes(until - at), at)

    @contextlib.contextmanager
    def _addresses(self) -> Iterator[tuple[int, int]]:
        buffers = [ctypes.c_char.from_buffer(each) for each in self._maps]
        try:
            yield ctypes.addressof(buffers[0]), ctypes.addressof(buffers[1])
        finally:
            del buffers


def _data(file: int, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where a file in memory has data between `start` and `end` (lseek(2), SEEK_DATA)."""
    while start < end:
        try:
            begin = os.lseek(file, start, os.SEEK_DATA)
        except OSError:  # none beyond
            return
        if begin >= end:
            return
        start = min(end, os.lseek(file, begin, os.SEEK_HOLE))
        yield begin, start
