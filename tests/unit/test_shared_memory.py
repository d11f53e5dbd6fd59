"""Memory that a process shares is copied while it changes, and then it is the same."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from fcntl import F_ADD_SEALS, fcntl
from pathlib import Path

import pytest

from polyvisor.drivers.qemu.fork import SEALS
from polyvisor.drivers.qemu.shared_memory import Copy, memory_of

SIZE = 8 << 20


@pytest.fixture
def files() -> Iterator[tuple[int, int]]:
    made = [os.memfd_create("memory-backend-memfd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for _ in range(2)]
    for fd in made:
        os.ftruncate(fd, SIZE)
    yield made[0], made[1]
    for fd in made:
        os.close(fd)


def blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks


def test_what_was_written_in_between_is_found(files: tuple[int, int]) -> None:
    source, target = files
    draw = random.Random(1)
    for _ in range(200):
        os.pwrite(source, draw.randbytes(4096), draw.randrange(SIZE // 4096) * 4096)
    copy = Copy(source, target, SIZE)
    copy.copy()
    assert os.pread(target, SIZE, 0) == os.pread(source, SIZE, 0)
    for _ in range(50):
        os.pwrite(source, draw.randbytes(draw.randrange(1, 9)), draw.randrange(SIZE - 9))
    assert os.pread(target, SIZE, 0) != os.pread(source, SIZE, 0)
    copy.follow()
    assert os.pread(target, SIZE, 0) == os.pread(source, SIZE, 0)
    copy.close()
    fcntl(target, F_ADD_SEALS, SEALS)  # nobody has it mapped for writing


def test_holes_stay_holes(files: tuple[int, int]) -> None:
    source, target = files
    os.pwrite(source, b"x" * 4096, 1 << 20)
    before = blocks(source)
    copy = Copy(source, target, SIZE)
    copy.copy()
    copy.follow()
    copy.close()
    assert blocks(source) == before
    assert blocks(target) == before


def test_what_has_become_a_hole_is_zero(files: tuple[int, int]) -> None:
    source, target = files
    for place in (0, 1 << 20, SIZE - 4096):
        os.pwrite(source, b"x" * 4096, place)
    copy = Copy(source, target, SIZE)
    copy.copy()
    os.ftruncate(source, 4096)
    os.ftruncate(source, SIZE)
    copy.follow()
    copy.close()
    assert os.pread(target, SIZE, 0) == b"x" * 4096 + bytes(SIZE - 4096)


def test_the_memory_of_a_process(files: tuple[int, int], tmp_path: Path) -> None:
    source, _ = files
    os.pwrite(source, b"mine", 0)
    found = memory_of(os.getpid(), SIZE)
    assert found is not None
    os.close(found)
    assert memory_of(os.getpid(), SIZE + 1) is None
    assert memory_of(0, SIZE) is None
