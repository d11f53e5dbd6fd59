"""Fixtures of the fault tests: the real command line, in homes of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyvisor.home import Home
from polyvisor.images.image import Image

pytest.register_assert_rewrite("tests.faults.command")

from tests.conftest import with_images  # noqa: E402
from tests.faults.command import Polyvisor, end_all  # noqa: E402


@pytest.fixture
def polyvisor(home: Home) -> Iterator[Polyvisor]:
    """The command line in a home that has the image `tiny`."""
    yield Polyvisor(home.path)
    end_all(home.path)


@pytest.fixture
def bare(empty_home: Home) -> Iterator[Polyvisor]:
    """The command line in a home with nothing in it."""
    yield Polyvisor(empty_home.path)
    end_all(empty_home.path)


@pytest.fixture
def small(empty_home: Home, tiny: Image, cache: Path) -> Iterator[Polyvisor]:
    """A home on a file system of its own with 24 MiB, where the kernel lets us have one."""
    where = empty_home.path / "small"
    where.mkdir(mode=0o711)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m,mode=711", "tmpfs", str(where)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"NOT TESTED: a really full disk, since mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        home = Home(where / "home")
        home.prepare()
        with_images(home.path, cache / "home" / "images")
        yield Polyvisor(home.path)
        end_all(home.path)
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)
