"""Fixtures that every ring of tests shares.

Homes lie in directories that other users can pass, since for root each QEMU runs as a user of its own. What is expensive to
make (packages, the image `tiny`) is made once and kept in $POLYVISOR_TEST_CACHE, by default /var/tmp/polyvisor-tests-UID.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyvisor.errors import PolyvisorError
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.images.image import Image
from polyvisor.images.store import ImageStore
from tests import contract_report
from tests.sshd import Server, serving
from tests.still import add_still


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest goes first: with several workers none is left alone with it at the end."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    for item in items:
        contract_report.mark(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests of the contract which targets have passed."""
    outcomes = ("passed", "failed", "error", "skipped")
    reports = (each for outcome in outcomes for each in terminalreporter.stats.get(outcome, []))
    found = contract_report.results(each for each in reports if isinstance(each, pytest.TestReport))
    if found:
        terminalreporter.section("the contract of HostApi, by target")
        for line in contract_report.summary(found):
            terminalreporter.line(line)
        terminalreporter.line(f"test by test: {contract_report.write(found)}")


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where what is expensive to make is kept between runs of the tests."""
    path = Path(os.environ.get("POLYVISOR_TEST_CACHE") or f"/var/tmp/polyvisor-tests-{os.geteuid()}")
    path.mkdir(mode=0o711, parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def image_store(cache: Path) -> ImageStore:
    """An image store that all tests share; a test that changes images makes a home without it."""
    home = Home(cache / "home")
    home.prepare()
    return ImageStore(home.images)


@pytest.fixture(scope="session")
def tiny(cache: Path, image_store: ImageStore) -> Image:
    """The image `tiny`, built by this version of the code."""
    from polyvisor.images.tiny import build_tiny

    return asyncio.run(build_tiny(image_store, cache / "home" / "cache"))


@pytest.fixture(scope="session")
def still(image_store: ImageStore, tiny: Image) -> Image:
    """The image `still`, whose guest does nothing."""
    return add_still(image_store, tiny)


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An sshd that lets this user in, through loopback."""
    with serving(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@contextlib.contextmanager
def temporary_home() -> Iterator[Home]:
    """A home with nothing in it; VMs that are left there are killed, and it is removed."""
    path = Path(tempfile.mkdtemp(prefix="polyvisor-test-", dir="/tmp"))
    path.chmod(0o711)
    home = Home(path / "home")
    home.prepare()
    try:
        yield home
    finally:
        asyncio.run(kill_all(home))
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def empty_home() -> Iterator[Home]:
    """A home with nothing in it."""
    with temporary_home() as home:
        yield home


@pytest.fixture
def home(empty_home: Home, tiny: Image, still: Image, image_store: ImageStore) -> Home:
    """A home whose image store has `tiny` and `still`."""
    with_images(empty_home.path, image_store.path)
    return empty_home


def with_images(home: Path, images: Path) -> None:
    """Let a home, which has no images of its own, have those at `images`."""
    if not (home / "images").is_symlink():
        (home / "images").rmdir()
        (home / "images").symlink_to(images)


@pytest.fixture
def host(home: Home) -> Host:
    """This machine, with a home of its own."""
    return Host(home)


async def kill_all(home: Home) -> None:
    """End every VM of `home`, whatever state its directory is in."""
    host = Host(home)
    for name in host.store.names():
        with contextlib.suppress(PolyvisorError):
            await host.drivers.of(vm := host.store.directory(name)).kill(vm)
