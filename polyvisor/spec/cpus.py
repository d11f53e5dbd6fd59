"""CPUs of a host by their numbers, as ``0-3,6``: the form of taskset(1), of xl.cfg(5) and of Linux' own lists."""

from __future__ import annotations

import re

from polyvisor.errors import InvalidInput

ALL_CPUS = "all"
MAX_CPU = 4095
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?\Z")


def parse_cpus(text: str, field: str = "cpu_affinity") -> frozenset[int]:
    """The numbers in `text`; raises InvalidInput."""
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.match(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_CPU:
            raise InvalidInput(field, text, "is not a list of CPUs", hint=f"write 0-3,6, or {ALL_CPUS}")
        found |= set(range(first, last + 1))
    return frozenset(found)


def show_cpus(cpus: frozenset[int]) -> str:
    """``{0, 1, 2, 6}`` → ``0-2,6``."""
    parts: list[str] = []
    ordered = sorted(cpus)
    while ordered:
        first = last = ordered.pop(0)
        while ordered and ordered[0] == last + 1:
            last = ordered.pop(0)
        parts.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(parts)
