"""The contract of HostApi, checked against real hosts.

Every test here takes `api`, and knows nothing of what is behind it. A new driver, or a new way to reach a host, is a new
parameter of `api`, and has to pass all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from polyvisor.errors import NotFound
from polyvisor.home import Home
from polyvisor.host.api import HostApi
from polyvisor.host.host import Host
from polyvisor.images.image import Image
from polyvisor.images.store import ImageStore
from polyvisor.remote.host import RemoteHost
from polyvisor.spec.vm import VMSpec
from tests.conftest import temporary_home, with_images
from tests.contract.guest import BOOT_S
from tests.sshd import Server
from tests.thorough import THOROUGH

TEMPLATE = "booted"
_numbers = itertools.count(1)


@pytest.fixture(params=["here", "by-ssh"])
async def api(request: pytest.FixtureRequest, host: Host, sshd: Server, tmp_path: Path) -> AsyncIterator[HostApi]:
    """The host under test: this machine, with QEMU; the same as a remote host, by SSH over loopback."""
    if request.param == "here":
        yield host
        return
    if request.node.get_closest_marker("inside") and not THOROUGH:
        pytest.skip(
            "what goes on inside guests is tested by SSH on the lab's hosts: make test-lab, or POLYVISOR_TEST_ALL=1"
        )
    remote = RemoteHost(sshd.entry(host.home.path), Home(tmp_path / "client"))
    yield remote
    await remote.close()


@pytest.fixture
def spec() -> VMSpec:
    return named()


def named() -> VMSpec:
    """A VM that boots in seconds, under a name that no other test uses."""
    return VMSpec(name=f"vm-{next(_numbers)}", image="tiny")


@pytest.fixture
async def running(api: HostApi, spec: VMSpec) -> AsyncIterator[str]:
    """The name of a VM that has just been started; its guest is still booting."""
    await api.run(spec)
    yield spec.name
    with contextlib.suppress(NotFound):  # a test may have removed it
        await api.remove(spec.name, force=True)


@pytest.fixture
async def booted(api: HostApi, spec: VMSpec, home: Home, nursery: Home) -> AsyncIterator[str]:
    """The name of a VM whose guest answers over SSH. It begins from a template, which takes a second instead of ten."""
    shutil.copytree(nursery.templates, home.templates, copy_function=os.link)
    shutil.copytree(nursery.keys, home.keys, dirs_exist_ok=True)  # the guest lets nobody else in
    await api.run_from(TEMPLATE, [spec.name])
    await api.template_remove(TEMPLATE)
    await api.wait_for_ssh(spec.name, timeout_s=BOOT_S)
    yield spec.name
    with contextlib.suppress(NotFound):  # a test may have removed it
        await api.remove(spec.name, force=True)


@pytest.fixture(scope="session")
def nursery(tiny: Image, image_store: ImageStore) -> Iterator[Home]:
    """A home with a template of a VM like `named` whose guest has booted."""

    async def make(host: Host) -> None:
        await host.run(made := named())
        await host.wait_for_ssh(made.name, timeout_s=BOOT_S)
        await host.template_create(TEMPLATE, made.name)
        await host.remove(made.name, force=True)

    with temporary_home() as home:
        with_images(home.path, image_store.path)
        asyncio.run(make(Host(home)))
        yield home
