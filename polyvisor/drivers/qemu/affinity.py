"""On which CPUs of the host QEMU's threads run (sched_setaffinity(2)), which needs no rights but those over the process.

A process inherits the affinity of the thread that starts it, and a thread that of the thread that makes it: so a VM is where it
belongs from its first moment, and threads that QEMU makes later are too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from polyvisor.errors import InvalidInput
from polyvisor.spec.cpus import ALL_CPUS, MAX_CPU, parse_cpus


def chosen(affinity: str) -> frozenset[int]:
    """The CPUs that `affinity` stands for; the kernel leaves out those that are not there."""
    return frozenset(range(MAX_CPU + 1)) if affinity == ALL_CPUS else parse_cpus(affinity)


@contextlib.contextmanager
def on_cpus(affinity: str) -> Iterator[None]:
    """Let what this thread starts meanwhile run on those CPUs; raises InvalidInput where there are none of them."""
    before = os.sched_getaffinity(0)
    _set(0, affinity)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin(pid: int, affinity: str) -> None:
    """Let every thread of a process run on those CPUs; raises InvalidInput."""
    done: set[str] = set()
    # A thread that is made meanwhile is pinned where its maker is by now; one made just before is found by the next look.
    while new := _threads(pid) - done:
        for thread in new:
            with contextlib.suppress(ProcessLookupError):
                _set(int(thread), affinity)
        done |= new


def _threads(pid: int) -> set[str]:
    try:
        return set(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208 - names alone
    except FileNotFoundError:
        return set()


def _set(thread: int, affinity: str) -> None:
    try:
        os.sched_setaffinity(thread, chosen(affinity))
    except ProcessLookupError:
        raise
    except OSError as error:
        hint = f"name others, or {ALL_CPUS}"
        raise InvalidInput("cpu_affinity", affinity, f"can't be had: {error.strerror}", hint=hint) from error
