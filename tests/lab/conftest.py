"""The lab that most tests here share: brought up once, kept saved between runs of the tests, left out where it can't be.

`make test-lab` runs them by themselves: emulated hosts are slow enough without neighbours. Where this machine
can't have a lab, or not within LIMIT_S, the tests are skipped with the reason, which pytest lists at its end.
$POLYVISOR_TEST_LAB=off leaves them out, =required makes a lab that can't be had a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import re
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.errors import PolyvisorError, TimedOut, Unavailable, WrongState
from polyvisor.home import Home
from polyvisor.host.api import HostApi
from polyvisor.host.host import Host
from polyvisor.images.debian import check_programs
from polyvisor.images.image import Image
from polyvisor.lab.lab import Lab
from polyvisor.lab.plan import LabHost, parse_host
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.transfer import copy_image
from polyvisor.spec.vm import Mode
from polyvisor.ssh import execute
from tests.contract.conftest import running, spec
from tests.contract.guest import BOOT_S
from tests.lab.emulation import allow_reruns, pytest_fixture_setup, pytest_pyfunc_call, unwatch, watch
from tests.thorough import exhaustive

__all__ = ["pytest_fixture_setup", "pytest_pyfunc_call", "running", "spec"]

LIMIT_S = 20 * 60
NEEDED_MEMORY_MIB = 9 * 1024
NEEDED_STORAGE_MIB = 8 * 1024
MODES = (Mode.PV, Mode.PVH, Mode.HVM)
# What `make test-lab` runs of the tests that Xen has in several modes, and in which: a test takes a minute and more on an
# emulated host. A guest in mode hvm takes minutes to boot: QEMU hands it its kernel byte by byte, through an emulated port.
ON_XEN = {
    "test_start_and_kill_are_idempotent": (Mode.HVM,),
    "test_poweroff_inside_the_guest_stops_the_vm": (Mode.PVH,),
    "test_the_console_is_a_login": (Mode.PV,),
    "test_a_failed_run_leaves_nothing": (Mode.PV,),
    "test_vcpus_are_added_and_removed_while_the_guest_runs": (Mode.PVH,),
    "test_a_saved_vm_goes_on_where_it_was": (Mode.PVH,),
    "test_what_was_set_is_what_xen_says_and_outlives_a_reboot": (Mode.PV,),
    "test_a_domain_that_somebody_destroys_has_crashed": (Mode.PV, Mode.PVH),
    "test_a_kernel_that_panics_has_crashed": (Mode.PV,),
    "test_a_domain_is_found_without_its_processes": (Mode.PV,),
    "test_guests_of_one_private_network_reach_each_other": (Mode.PV,),
}
# And what it runs on KVM, where the whole contract takes half an hour.
ON_KVM = {
    "test_a_guest_on_the_kvm_host_runs_under_kvm",
    "test_the_host_says_what_it_runs_on_and_why",
    "test_start_and_kill_are_idempotent",
    "test_verbs_on_a_vm_that_is_not_there",
    "test_what_the_guest_gets_is_what_was_asked_for",
    "test_a_failed_run_leaves_nothing",
    "test_stop_shuts_the_guest_down_and_disks_are_kept",
    "test_the_console_is_a_login",
    "test_vcpus_are_added_and_removed_while_the_guest_runs",
    "test_a_saved_vm_goes_on_where_it_was",
    "test_what_can_not_be_forked",
    "test_a_paused_vm_and_its_forks_are_paused",
    "test_disks_of_a_running_vm",
}
# Whole modules that are run when all is asked for.
LONG = ("test_xen_save", "test_xen_faults")
HOMES = 100
# What is slow to make, or to find out, is the host's own.
MAKE_HOMES = b"""
import os, sys
os.umask(0)
os.mkdir(sys.argv[1], 0o711)
for number in range(int(sys.argv[2])):
    home = f"{sys.argv[1]}/{number}"
    os.mkdir(home, 0o711)
    for shared in ("images", "cache"):
        os.symlink(f"/var/lib/polyvisor/{shared}", f"{home}/{shared}")
"""
HOSTS = 2
_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run ON_KVM and ON_XEN unless all is asked for."""
    allow_reruns([item for item in items if "lab/test_xen" in item.nodeid or "lab/test_resize" in item.nodeid])
    for item in items:
        if isinstance(item, pytest.Function) and _is_long(item):
            item.add_marker(exhaustive)


def _is_long(test: pytest.Function) -> bool:
    if any(module in test.nodeid for module in LONG):
        return True
    if "lab/test_kvm" in test.nodeid:
        return test.originalname not in ON_KVM
    given = test.callspec.params.values() if hasattr(test, "callspec") else ()
    modes = [value for value in given if isinstance(value, Mode)]
    return bool(modes) and modes[0] not in ON_XEN.get(test.originalname, ())


@pytest.fixture(scope="module")
def host_name() -> str:
    """The lab's host whose `api` a module tests, and the only one that it uses unless it says otherwise (`hosts`)."""
    return "lab-kvm1"


@pytest.fixture(scope="module")
def hosts(host_name: str) -> list[LabHost]:
    """The lab's hosts that a module needs."""
    return [parse_host(host_name)]


@pytest.fixture(scope="module")  # saved again as soon as may be: emulated hosts are never quite idle
def lab(request: pytest.FixtureRequest, cache: Path, tiny: Image, hosts: list[LabHost]) -> Iterator[Lab]:
    """The lab with the hosts that a module needs, which no other module uses meanwhile; saved again afterwards."""
    demand = os.environ.get("POLYVISOR_TEST_LAB", "")
    if demand == "off":
        pytest.skip("the lab is left out: POLYVISOR_TEST_LAB=off")
    made = Lab(Host(_home(cache)))
    with contextlib.ExitStack() as borrowed:
        for name in sorted(host.name for host in hosts):
            fd = os.open(made.host.home.locks / f"tests-{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            borrowed.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
        if reason := _impossible(made) or asyncio.run(_up(made, hosts, Host(Home(cache / "home")))):
            if demand == "required":
                pytest.fail(f"there is no lab: {reason}")
            pytest.skip(f"there is no lab: {reason}")
        if "lab-xen1" in [host.name for host in hosts]:
            watch(request.config, lambda: asyncio.run(_triple_faults(made)))
        yield made
        unwatch(request.config)
        asyncio.run(made.down(hosts))


async def _triple_faults(lab: Lab) -> int:
    return (await execute(lab.host, "lab-xen1", ["xl", "dmesg"], timeout_s=120)).stdout.count("Triple fault")


def _home(cache: Path) -> Home:
    """A home that stays, whose packages and image `tiny` are those of the other tests."""
    home = Home((cache / "lab").resolve())  # the lab knows its hosts by it
    home.prepare()
    shared = cache / "home" / "cache" / "debian-packages"
    shared.mkdir(parents=True, exist_ok=True)
    if not (home.cache / "debian-packages").exists():
        (home.cache / "debian-packages").symlink_to(shared)
    return home


def _impossible(lab: Lab) -> str | None:
    """Why this machine can't have a lab, or None."""
    if len(lab.hosts.names()) >= HOSTS:
        return None  # they are there already
    try:
        check_programs()
    except Unavailable as error:
        return f"{error.message} ({error.hint})"
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if free and (mib := int(free[1]) // 1024) < NEEDED_MEMORY_MIB:
        return f"it needs {NEEDED_MEMORY_MIB} MiB of memory, and {mib} are available"
    if (mib := shutil.disk_usage(lab.host.home.path).free >> 20) < NEEDED_STORAGE_MIB:
        return f"it needs {NEEDED_STORAGE_MIB} MiB at {lab.host.home.path}, and {mib} are free"
    return None


async def _up(lab: Lab, hosts: list[LabHost], tiny: HostApi) -> str | None:
    """Bring `hosts` up; returns why that failed for want of time or network, raises where the lab itself fails.

    A host that another version of the code has made is made anew: nothing but what tests have left is on it. Guests boot the
    image that `tiny` has, which this version has built.
    """
    try:
        async with asyncio.timeout(LIMIT_S):
            await _remove_outdated(lab, hosts)
            await lab.up(hosts)
            for host in hosts:
                remote = RemoteHost(lab.hosts.get(host.name), lab.host.home)
                try:
                    await copy_image(tiny, "tiny", remote)
                finally:
                    await remote.close()
    except (TimeoutError, TimedOut):
        return f"it was not ready within {LIMIT_S // 60} minutes"
    except PolyvisorError as error:
        if error.code == "download-failed":
            return error.message
        raise
    return None


async def _remove_outdated(lab: Lab, hosts: list[LabHost]) -> None:
    there = [host for host, _ in await lab.members() if host in hosts]
    if outdated := [host for host in there if lab.outdated(host)]:
        images = {lab.host.store.get(host.name).record.image_id for host in outdated}
        await lab.remove(outdated)
        for image in images:
            with contextlib.suppress(WrongState):  # other hosts, which other tests use now, still stand on it
                await lab.host.image_remove(image)


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The home of whoever uses the lab's hosts; shared, so that connections are."""
    return Home(tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def homes(lab: Lab, host_name: str) -> Iterator[str]:
    """A directory on that host with a home for each test, all with the images and the cache of the host's own."""
    directory = f"/var/tmp/homes-{uuid.uuid4().hex[:8]}"
    # One process makes all: each takes a good part of a second on an emulated host that is busy.
    _on(lab, host_name, f"python3 - {directory} {HOMES}", MAKE_HOMES)
    yield directory
    clean = (
        "pkill -f [q]emu-system"
        if host_name == "lab-kvm1"
        else "xl list | awk 'NR > 2 {print $1}' | xargs -rn1 xl destroy"
    )
    _on(lab, host_name, f"{clean}; sleep 1; rm -rf {directory}")


def _on(lab: Lab, name: str, script: str, stdin: bytes | None = None) -> None:
    completed = asyncio.run(execute(lab.host, name, ["sh", "-c", script], stdin=stdin, timeout_s=300))
    assert not completed.stderr, completed.stderr


@pytest.fixture
async def api(lab: Lab, client: Home, homes: str, host_name: str) -> AsyncIterator[HostApi]:
    """That host as a remote host, with a home of its own for each test, whose VMs end with it."""
    entry = replace(lab.hosts.get(host_name), home=f"{homes}/{next(_numbers)}")
    remote = RemoteHost(entry, client)
    yield remote
    for status in await remote.vms():
        await remote.remove(status.name, force=True)
    await remote.close()


@pytest.fixture
async def booted(api: HostApi, running: str) -> str:
    """The name of a VM whose guest answers over SSH."""
    await api.wait_for_ssh(running, timeout_s=BOOT_S)
    return running
