"""What emulation does to guests of Xen, and real hosts don't.

A guest in mode pvh dies of a triple fault while it boots: once in about a hundred boots, more often on a busy machine, never
on an idle one (docs/design/lab.md). And xl, which gives a script some seconds to bring a device up, ends it where the emulated
host is too slow. A test that fails with either is run again, at most RERUNS times, and pytest says so; whatever else fails has
failed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import pytest

RERUNS = 2
XL_WAS_IMPATIENT = "because of timeout"
# How many triple faults Xen has noted by now, and how many of those are known.
COUNT = pytest.StashKey[Callable[[], int]]()
KNOWN = pytest.StashKey[int]()


class EmulationFault(Exception):
    """The emulated processor has ended a guest, or was too slow for xl."""


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
    """Raise EmulationFault in place of `error` where there is a new fault, or a script of xl's was not in time."""
    if (count := config.stash.get(COUNT, None)) is None:
        return
    if (faults := count()) > config.stash[KNOWN]:
        config.stash[KNOWN] = faults
        raise EmulationFault("Xen has noted a triple fault of a guest") from error
    if XL_WAS_IMPATIENT in str(error):
        raise EmulationFault("xl has not waited for a script of its own") from error
