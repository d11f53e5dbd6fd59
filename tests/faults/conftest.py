"""Fixtures of the fault tests: the real command line, in homes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from polyvisor.home import Home

pytest.register_assert_rewrite("tests.faults.command")

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
