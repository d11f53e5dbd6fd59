"""`set`: what can be done at once and what waits, and that nothing is half done where a guest or a hypervisor refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.cli.main import parse
from polyvisor.cli.set import _changes
from polyvisor.drivers.base import Observed
from polyvisor.drivers.qemu.affinity import on_cpus, pin
from polyvisor.drivers.qemu.driver import MISSING
from polyvisor.drivers.xen.config import build_config, with_resources, xen_cap, xen_weight
from polyvisor.drivers.xen.probe import MISSING as XEN_MISSING
from polyvisor.errors import InvalidInput, PolyvisorError, TimedOut, Unsupported, WrongState
from polyvisor.files import is_flocked
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.host.observed import shown, waiting
from polyvisor.host.plan import check_resources
from polyvisor.host.record import Launch, Record, boot_id, resources_of
from polyvisor.host.resize import at_once, changed
from polyvisor.host.store import VMDirectory
from polyvisor.spec.cpus import parse_cpus, show_cpus
from polyvisor.spec.resources import Changes, Resources
from polyvisor.spec.vm import DeviceModel, VMSpec
from polyvisor.status import Accelerator, Capabilities, Usage, VMState
from tests.golden.xl_boots import VM_DIRECTORY, XL_BOOTS
from tests.unit.specs import QUICK

GIVEN = Resources(vcpus=2, vcpus_max=4, memory_mib=256, memory_max_mib=512)
QEMU = Capabilities(
    driver="qemu",
    version="7.2",
    accelerators=tuple(Accelerator(name=name, available=True, reason="") for name in ("kvm", "tcg")),
    modes=("pvh", "hvm"),
    missing=MISSING,
    cpus="0-3",
)
XEN = replace(
    QEMU,
    driver="xen",
    accelerators=(Accelerator(name="xen", available=True, reason=""),),
    missing=XEN_MISSING,
)
LAUNCH = Launch(
    started_at=1.0, boot_id=boot_id(), hypervisor="kvm", reason="", version="7.2", mode="pvh", argv=(), resources=GIVEN
)


def spec(**values: Any) -> VMSpec:
    return VMSpec(**{"name": "a", "image": "tiny", "vcpus": 2, "vcpus_max": 4, "memory_mib": 256, **values})


def record(**values: Any) -> Record:
    made = spec(**{"memory_max_mib": 512, **values})
    return Record(id="i", created_at=0.0, spec=made, image_id="x", memory_mib=made.memory_mib or 128)


# Lists of CPUs


@QUICK
@given(st.frozensets(st.integers(0, 4095), min_size=1, max_size=40))
def test_cpus_are_read_as_they_are_written(cpus: frozenset[int]) -> None:
    assert parse_cpus(show_cpus(cpus)) == cpus


@pytest.mark.parametrize("text", ["", ",", "3-1", "a", "0-", "-1", "0 1", "0,,1", "4096", "99999", "0-3;rm", "all,1"])
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"cpu_affinity.*list of CPUs"):
        spec(cpu_affinity=text)


# What can be meant


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"vcpus_max": 1}, r"vcpus_max: 1: is less than vcpus \(2\)"),
        ({"vcpus_max": 0}, "vcpus_max: 0: is out of range"),
        ({"memory_max_mib": 255}, r"memory_max_mib: 255: is less than memory_mib \(256\)"),
        ({"memory_max_mib": 1}, "out of range"),
        ({"cpu_weight": 0}, "cpu_weight: 0: is out of range"),
        ({"cpu_weight": 10_001}, "out of range"),
        ({"cpu_limit": 0}, "cpu_limit: 0: is out of range"),
        ({"cpu_limit": 25_501}, "out of range"),
        ({"disk_iops_limit": 0}, "disk_iops_limit: 0: is out of range"),
        ({"disk_rate_limit_mib": 1 << 21}, "disk_rate_limit_mib: 2097152: is out of range"),
    ],
)
def test_what_can_not_be_meant(values: dict[str, int], problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem) as raised:
        spec(**values)
    assert raised.value.hint


def test_room_follows_what_there_is() -> None:
    assert resources_of(VMSpec(name="a", image="x", vcpus=3), 128) == Resources(
        vcpus=3, vcpus_max=3, memory_mib=128, memory_max_mib=128
    )


@pytest.mark.parametrize(
    ("values", "error", "problem"),
    [
        ({"cpu_affinity": "2-9"}, InvalidInput, "this host has no CPU 4-9"),
        ({"memory_mib": 2000}, InvalidInput, "this host has 1024 MiB"),
        ({"memory_max_mib": 2000}, InvalidInput, "memory_max_mib: 2000: this host has 1024 MiB"),
        ({"cpu_limit": 50}, Unsupported, "cpu_limit: 50: .*control groups"),
        ({"cpu_weight": 50}, Unsupported, "cpu_weight: 50: .*control groups"),
        ({"memory_max_mib": 512, "devices": DeviceModel.EMULATED}, InvalidInput, "no balloon"),
        ({"memory_mib": None, "memory_max_mib": 64}, InvalidInput, r"less than memory_mib \(128\)"),
    ],
)
def test_what_a_host_can_not_give(values: dict[str, Any], error: type[PolyvisorError], problem: str) -> None:
    made = spec(**values)
    with pytest.raises(error, match=problem) as raised:
        check_resources(made, made.memory_mib or 128, QEMU, 1024)
    assert raised.value.hint


def test_what_a_host_can_give() -> None:
    check_resources(spec(cpu_affinity="0,3", memory_max_mib=1024), 256, QEMU, 1024)
    check_resources(spec(disk_iops_limit=50, disk_rate_limit_mib=5), 256, QEMU, 1024)
    check_resources(spec(cpu_limit=50, cpu_weight=50), 256, XEN, 1024)
    check_resources(spec(devices=DeviceModel.EMULATED, memory_max_mib=256), 256, QEMU, 1024)


# What is done at once


@pytest.mark.parametrize(
    ("capabilities", "hypervisor", "mode", "changes", "waits"),
    [
        (QEMU, "kvm", "pvh", {"vcpus": 4, "memory_mib": 512}, {}),
        (QEMU, "kvm", "hvm", {"vcpus": 1, "memory_mib": 128}, {}),
        (QEMU, "tcg", "pvh", {"vcpus": 3}, {}),
        (QEMU, "tcg", "pvh", {"vcpus": 1}, {"vcpus": "crashes"}),
        (QEMU, "tcg", "pvh", {"vcpus": 2, "cpu_limit": 0}, {}),
        (QEMU, "kvm", "pvh", {"vcpus": 5, "vcpus_max": 5}, {"vcpus": "room for 4", "vcpus_max": "at a start"}),
        (QEMU, "kvm", "pvh", {"memory_mib": 513, "memory_max_mib": 600}, {"memory_mib": "room for 512 MiB"}),
        (XEN, "xen", "pvh", {"vcpus": 1, "cpu_weight": 5, "cpu_limit": 20, "cpu_affinity": "1"}, {}),
        (XEN, "xen", "hvm", {"vcpus": 1}, {"vcpus": "HVM"}),
        (XEN, "xen", "hvm", {"vcpus": 4}, {}),
        (QEMU, "tcg", "hvm", {"disk_iops_limit": 5, "disk_rate_limit_mib": 5}, {}),
        (XEN, "xen", "pv", {"disk_iops_limit": 5}, {"disk_iops_limit": "xl can't limit"}),
    ],
)
def test_what_waits_and_why(
    capabilities: Capabilities, hypervisor: str, mode: str, changes: dict[str, Any], waits: dict[str, str]
) -> None:
    wanted = changed(record(), Changes(**changes))
    launch = replace(LAUNCH, hypervisor=hypervisor, mode=mode)
    target, reasons = at_once(GIVEN, resources_of(wanted.spec, wanted.memory_mib), tuple(changes), capabilities, launch)
    for name, reason in waits.items():
        assert reason in reasons[name]
        assert getattr(target, name) == getattr(GIVEN, name)
    for name in changes.keys() - reasons.keys():
        assert getattr(target, name) == getattr(wanted.spec, name)
    after = replace(LAUNCH, resources=target)
    assert {each.setting for each in waiting(wanted, after, VMState.RUNNING)} == reasons.keys()


def test_what_is_pending() -> None:
    grown = record(vcpus=3, cpu_limit=50)
    [vcpus, limit] = waiting(grown, LAUNCH, VMState.RUNNING)
    assert (vcpus.setting, vcpus.now, vcpus.then) == ("vcpus", "2", "3")
    assert (limit.setting, limit.now, limit.then) == ("cpu_limit", "none", "50%")
    assert len(waiting(grown, LAUNCH, VMState.SAVED)) == 2, "it goes on with what it had"
    assert waiting(grown, LAUNCH, VMState.STOPPED) == (), "its next boot has all"
    assert waiting(record(vcpus_max=None, memory_max_mib=None), LAUNCH, VMState.RUNNING) == ()
    assert waiting(grown, replace(LAUNCH, resources=None), VMState.RUNNING) == (), "started by an older version"
    assert shown("memory_mib", 5) == "5 MiB"


def test_no_change_is_a_mistake() -> None:
    with pytest.raises(InvalidInput, match="nothing is to change"):
        changed(record(), Changes())


# Flags


def flags(*words: str) -> Changes:
    return _changes(parse(["set", "a", *words]))


def test_flags() -> None:
    assert flags("--vcpus", "2", "-m", "1G", "--vcpus-max", "4", "--memory-max", "2G") == Changes(
        vcpus=2, memory_mib=1024, vcpus_max=4, memory_max_mib=2048
    )
    assert flags("--cpu-weight", "5", "--cpu-limit", "50", "--cpu-affinity", "0-1") == Changes(
        cpu_weight=5, cpu_limit=50, cpu_affinity="0-1"
    )
    assert changed(record(cpu_limit=5), flags("--cpu-limit", "none")).spec.cpu_limit is None
    given = flags("--disk-iops-limit", "none", "--disk-rate-limit", "7")
    slow = changed(record(disk_iops_limit=5), given).spec
    assert (slow.disk_iops_limit, slow.disk_rate_limit_mib) == (None, 7)


@pytest.mark.parametrize(
    "words",
    [
        ("--cpu-limit", "0"),
        ("--cpu-limit", "x"),
        ("--disk-rate-limit", "0"),
        ("--disk-iops-limit", "x"),
        ("--vcpus", "many"),
        ("-m", "1K"),
    ],
)
def test_flags_that_can_not_be_meant(words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput):
        changed(record(), flags(*words))


# The verb, with a driver that refuses where it is told to


class Refusing:
    """A driver of a VM that is alive: what it was told, and what it refuses."""

    name = "qemu"

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuses: set[str] = set()
        self.dies = False
        self.state = VMState.RUNNING
        self.has = Usage(vcpus=2, memory_mib=256)

    async def probe(self) -> Capabilities:
        return QEMU

    async def inspect(self, vm: VMDirectory) -> Observed:
        return Observed(state=self.state)

    def ended(self, vm: VMDirectory) -> Observed:
        return Observed(state=VMState.STOPPED)

    async def usage(self, vm: VMDirectory) -> Usage:
        return self.has

    async def set_vcpus(self, vm: VMDirectory, count: int) -> None:
        self._tell("vcpus", count)
        self.has = replace(self.has, vcpus=count)

    async def set_memory(self, vm: VMDirectory, memory_mib: int, *, wait: bool = True) -> None:
        self._tell("memory" if wait else "target", memory_mib)  # without waiting it is told alone
        self.has = replace(self.has, memory_mib=memory_mib)

    async def set_scheduling(self, vm: VMDirectory, resources: Resources) -> None:
        self._tell("affinity", resources.cpu_affinity)

    def _tell(self, what: str, value: object) -> None:
        if f"{what} {value}" in self.refuses:
            if self.dies:
                raise KeyboardInterrupt
            raise TimedOut(f"{what} {value}: refused")
        self.told.append(f"{what} {value}")


@pytest.fixture
def driver() -> Refusing:
    return Refusing()


@pytest.fixture
def host(tmp_path: Path, driver: Refusing, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host with VM `a`, which is alive as long as its state says so."""
    made = Host(Home(tmp_path / "home"))
    made.home.prepare()
    made.drivers.qemu = driver  # type: ignore[assignment]
    vm = made.store.directory("a")
    vm.run.mkdir(parents=True)
    vm.write_record(record())
    vm.write_launch(replace(LAUNCH, hypervisor="tcg"))
    monkeypatch.setattr(VMDirectory, "alive", lambda _: driver.state.alive)
    yield made
    assert not is_flocked(str(made.home.locks / "a.lock"))


def read(host: Host) -> tuple[VMSpec, Resources]:
    vm = host.store.directory("a")
    launch = vm.launch()
    assert launch is not None and launch.resources is not None
    return vm.record.spec, launch.resources


async def test_a_running_vm_is_changed_at_once_and_repeating_is_no_harm(host: Host, driver: Refusing) -> None:
    changes = Changes(vcpus=3, memory_mib=300, cpu_affinity="0")
    for _ in range(2):
        resized = await host.set("a", changes)
        assert resized.applied == ("vcpus", "memory_mib", "cpu_affinity")
        assert (resized.pending, resized.reasons, resized.status.pending) == ((), {}, ())
        assert (resized.status.vcpus, resized.status.memory_mib) == (3, 300)
    assert driver.told[:3] == ["affinity 0", "memory 300", "vcpus 3"]
    made, given = read(host)
    assert (made.vcpus, made.memory_mib, made.cpu_affinity) == (3, 300, "0")
    assert given == replace(GIVEN, vcpus=3, memory_mib=300, cpu_affinity="0")


async def test_a_start_that_was_cut_off_is_finished(host: Host, driver: Refusing) -> None:
    host.store.directory("a").write_launch(replace(LAUNCH, resources=replace(GIVEN, disk_iops_limit=5)))
    await host.start("a")
    assert driver.told == ["affinity all", "target 256"]


@pytest.mark.parametrize("dies", [False, True])
async def test_what_is_refused_changes_nothing(host: Host, driver: Refusing, dies: bool) -> None:
    before = read(host)
    driver.refuses, driver.dies = {"vcpus 3"}, dies
    with pytest.raises(KeyboardInterrupt if dies else TimedOut) as raised:
        await host.set("a", Changes(vcpus=3, memory_mib=300, cpu_affinity="0"))
    assert dies or "VM 'a' was not changed: vcpus 3: refused" in str(raised.value)
    assert read(host) == before
    assert driver.told == ["affinity 0", "memory 300", "vcpus 2", "target 256", "affinity all"]


async def test_what_waits_is_shown_until_it_is_in_force(host: Host, driver: Refusing) -> None:
    resized = await host.set("a", Changes(vcpus=1, memory_mib=300))
    assert resized.applied == ("memory_mib",)
    assert [each.setting for each in resized.pending] == ["vcpus"] and "crashes" in resized.reasons["vcpus"]
    assert driver.told == ["memory 300"]
    details = await host.show("a")
    assert (details.usage, details.status.vcpus) == (Usage(vcpus=2, memory_mib=300), 2)
    assert details.pending == resized.pending
    [listed] = await host.vms()
    assert listed.pending == ("vcpus",)
    driver.state = VMState.STOPPED
    details = await host.show("a")
    assert (details.pending, details.status.vcpus, details.usage) == ((), 1, None)


async def test_killed_after_the_record_was_written(host: Host, driver: Refusing) -> None:
    """What such a command leaves is pending; the same command completes it."""
    vm = host.store.directory("a")
    vm.write_record(record(vcpus=3))
    assert (await host.vms())[0].pending == ("vcpus",)
    assert (await host.set("a", Changes(vcpus=3))).applied == ("vcpus",)
    assert driver.told == ["vcpus 3"]
    assert (await host.vms())[0].pending == ()


async def test_start_finishes_one_that_was_cut_off(host: Host, driver: Refusing) -> None:
    """QEMU was there, and its balloon had not been told yet."""
    await host.start("a")
    assert driver.told == ["target 256"]


async def test_a_vm_that_an_older_version_started(host: Host, driver: Refusing) -> None:
    vm = host.store.directory("a")
    vm.write_launch(replace(LAUNCH, resources=None))
    assert (await host.set("a", Changes(vcpus=4))).applied == ("vcpus",)
    assert read(host)[1] == replace(GIVEN, vcpus=4)


async def test_memory_of_emulated_devices_waits(host: Host, driver: Refusing) -> None:
    host.store.directory("a").write_record(record(devices=DeviceModel.EMULATED, memory_max_mib=None))
    resized = await host.set("a", Changes(memory_mib=300))
    assert [each.setting for each in resized.pending] == ["memory_mib"]
    assert (driver.told, resized.reasons) == ([], {"memory_mib": "emulated devices have no balloon"})


async def test_a_vm_at_rest_is_changed_for_its_next_start(host: Host, driver: Refusing) -> None:
    driver.state = VMState.STOPPED
    resized = await host.set("a", Changes(vcpus=8, vcpus_max=8, memory_mib=64))
    assert (resized.applied, resized.pending, driver.told) == ((), (), [])
    assert host.store.directory("a").record.memory_mib == 64
    assert read(host)[0].vcpus_max == 8


@pytest.mark.parametrize("state", [VMState.PAUSED, VMState.UNRESPONSIVE])
async def test_a_guest_that_does_not_run_takes_no_part(host: Host, driver: Refusing, state: VMState) -> None:
    before = read(host)
    driver.state = state
    with pytest.raises(WrongState, match=f"is {state}: its guest can't take part in changing memory and vCPUs"):
        await host.set("a", Changes(vcpus=3, memory_mib=300))
    assert (read(host), driver.told) == (before, [])
    await host.set("a", Changes(cpu_affinity="1"))
    assert driver.told == ["affinity 1"]


async def test_what_is_wrong_is_found_before_anything_changes(host: Host, driver: Refusing) -> None:
    before = read(host)
    for changes, error in (
        (Changes(vcpus=5), InvalidInput),
        (Changes(vcpus=3, cpu_affinity="9"), InvalidInput),
        (Changes(vcpus=3, cpu_limit=50), Unsupported),
        (Changes(memory_mib=1 << 23, memory_max_mib=1 << 23), InvalidInput),
    ):
        with pytest.raises(error):
            await host.set("a", changes)
    assert (read(host), driver.told) == (before, [])


# Affinity


def test_threads_are_where_they_are_pinned() -> None:
    mine = sorted(os.sched_getaffinity(0))
    with on_cpus(str(mine[-1])):
        child = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    try:
        assert os.sched_getaffinity(0) == set(mine), "put back"
        assert os.sched_getaffinity(child) == {mine[-1]}
        pin(child, str(mine[0]))
        assert os.sched_getaffinity(child) == {mine[0]}
        pin(child, "all")
        assert os.sched_getaffinity(child) >= set(mine)
        with pytest.raises(InvalidInput, match="cpu_affinity: '4000'"):
            pin(child, "4000")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    pin(child, "0")


# Xen's configuration


@pytest.mark.parametrize(("weight", "xens"), [(1, 3), (100, 256), (200, 512), (50, 128), (10_000, 25_600)])
def test_weights_of_xen(weight: int, xens: int) -> None:
    assert xen_weight(weight) == xens


@pytest.mark.parametrize(
    ("limit", "vcpus", "cap"), [(None, 1, 0), (50, 1, 50), (100, 1, 0), (150, 2, 150), (250, 2, 0)]
)
def test_caps_of_xen(limit: int | None, vcpus: int, cap: int) -> None:
    """Xen refuses one that is larger than what all vCPUs can use."""
    assert xen_cap(replace(GIVEN, vcpus_max=vcpus, cpu_limit=limit)) == cap


@pytest.mark.parametrize("name", XL_BOOTS)
def test_a_configuration_with_other_resources(name: str) -> None:
    """It says the same as one that is made with them."""
    boot = XL_BOOTS[name]
    for other in (GIVEN, replace(GIVEN, vcpus=4, cpu_limit=10, cpu_weight=7, cpu_affinity="0,2")):
        asked = replace(
            boot,
            vcpus=other.vcpus,
            vcpus_max=other.vcpus_max,
            memory_mib=other.memory_mib,
            memory_max_mib=other.memory_max_mib,
            cpu_weight=other.cpu_weight,
            cpu_limit=other.cpu_limit,
            cpu_affinity=other.cpu_affinity,
        )
        text = with_resources(build_config(boot, VM_DIRECTORY), other)
        assert sorted(text.splitlines()) == sorted(build_config(asked, VM_DIRECTORY).splitlines())
