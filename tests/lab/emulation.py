"""What emulation does to guests of Xen, and real hosts don't: a guest in mode pvh that dies of a triple fault while it boots.

Seen once in about a hundred boots, on a busy machine, never on an idle one (docs/design/lab.md). A test that fails while Xen
notes such a fault is run again, at most RERUNS times, and pytest says so. Whatever else fails has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import pytest

RERUNS = 2
# How many triple faults Xen has noted by now, and how many of those are known.
COUNT = pytest.StashKey[Callable[[], int]]()
KNOWN = pytest.StashKey[int]()


class EmulationFault(Exception):
    """The emulated processor has ended a guest."""


def watch(config: pytest.Config, count: Callable[[], int]) -> None:
    """Blame a fault that `count` counts from now on for what fails meanwhile."""
    config.stash[COUNT], config.stash[KNOWN] = count, count()


def unwatch(config: pytest.Config) -> None:
    if COUNT in config.stash:
        del config.stash[COUNT]


def allow_reruns(items: Sequence[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.flaky(reruns=RERUNS, only_rerun=[EmulationFault.__name__]))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        _blame(pyfuncitem.config, error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, object, object]:
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        _blame(request.config, error)
        raise


def _blame(config: pytest.Config, error: BaseException) -> None:
    """Raise EmulationFault in place of `error` where there is a new fault."""
    if (count := config.stash.get(COUNT, None)) is None:
        return
    if (faults := count()) > config.stash[KNOWN]:
        config.stash[KNOWN] = faults
        raise EmulationFault("Xen has noted a triple fault of a guest") from error
