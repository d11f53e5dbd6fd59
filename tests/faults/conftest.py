"""Fixtures of the fault tests: the real command line, in homes of their own."""

from __future__ import annotations

import pytest

from polyvisor.home import Home

pytest.register_assert_rewrite("tests.faults.command")

from tests.faults.command import Polyvisor  # noqa: E402


@pytest.fixture
def polyvisor(home: Home) -> Polyvisor:
    """The command line in a home that has the image `tiny`."""
    return Polyvisor(home.path)


@pytest.fixture
def bare(empty_home: Home) -> Polyvisor:
    """The command line in a home with nothing in it."""
    return Polyvisor(empty_home.path)
