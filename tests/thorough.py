"""How much of what takes long is tested: by default a part of it, all with POLYVISOR_TEST_ALL=1 in the environment."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest

THOROUGH = bool(os.environ.get("POLYVISOR_TEST_ALL"))
# A walk through a command's steps whose every step takes long takes each one, or each ninth.
EVERY = 1 if THOROUGH else 9

exhaustive = pytest.mark.skipif(not THOROUGH, reason="takes long: tested with POLYVISOR_TEST_ALL=1")


def usually(values: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """Parameters of a test that takes long: those `chosen` are tested in any case, the others when all is asked for."""
    return [
        value if value in chosen else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=exhaustive)
        for value in values
    ]
