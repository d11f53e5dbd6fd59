"""Disks and network cards that come, grow and go: records, files and arguments, and that nothing is lost where one refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyvisor.drivers.base import Boot, BootDisk, BootNic, Observed
from polyvisor.drivers.qemu import hotplug
from polyvisor.drivers.qemu.argv import build_argv
from polyvisor.drivers.qemu.driver import MISSING
from polyvisor.drivers.qemu.hotplug import (
    attach,
    attached,
    detach,
    device_options,
    grow,
    netdev_options,
    with_device,
    without_device,
)
from polyvisor.drivers.qemu.qmp import QMPRefused, connected
from polyvisor.drivers.xen.probe import MISSING as XEN_MISSING
from polyvisor.errors import (
    AlreadyExists,
    InvalidInput,
    NotFound,
    PolyvisorError,
    TimedOut,
    Unsupported,
    WrongState,
)
from polyvisor.host.observed import devices_waiting
from polyvisor.host.plan import derived_mac, first_slots, mac_of, numbered
from polyvisor.host.record import Launch, Record, boot_id, devices_of, launch_from_json, launch_to_json, resources_of
from polyvisor.host.store import VMDirectory
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import MAX_DISKS, DeviceModel, Disk, Firmware, Nic
from polyvisor.status import Usage, VMState
from polyvisor.storage.layers import virtual_size
from tests.golden.boots import BOOTS, IMAGE, SSH
from tests.unit.moved import SPEC, TCG, Machine, made, move
from tests.unit.test_qmp import FakeQemu, listening

GIB = 1 << 30
FULL = replace(
    BOOTS["debian-bios-tcg"],
    disks=(
        BootDisk(path=Path("disks/disk0.qcow2"), backing=IMAGE / "disk.qcow2"),
        BootDisk(path=Path("disks/disk3.qcow2")),
    ),
    nics=(
        BootNic(mac="52:54:00:aa:bb:01", network="user", forwards=(SSH,)),
        BootNic(mac="52:54:00:aa:bb:03", network="private:x", group="239.192.1.2:20345", number=2),
    ),
    slots={"disk0": 2, "seed": 3, "nic0": 4, "rng": 5, "balloon": 6, "disk3": 7, "nic2": 8},
)


# Arguments


def words(boot: Boot) -> tuple[str, ...]:
    return tuple(build_argv("qemu", boot))


@pytest.mark.parametrize("device", [*FULL.disks[1:], *FULL.nics], ids=lambda device: device.name)
def test_a_device_more_or_less_is_as_a_start_would_have_it(device: BootDisk | BootNic) -> None:
    fewer = replace(
        FULL,
        disks=tuple(disk for disk in FULL.disks if disk != device),
        nics=tuple(nic for nic in FULL.nics if nic != device),
    )
    assert without_device(words(FULL), device.name, FULL.slots) == words(fewer)
    assert without_device(words(fewer), device.name, FULL.slots) == words(fewer)
    if device != FULL.nics[0]:  # a new one is behind those that there are
        assert with_device(words(fewer), device, FULL.slots) == words(FULL)
    assert sorted(with_device(words(FULL), device, FULL.slots)) == sorted(words(FULL))


@pytest.mark.parametrize("name", ["tiny-pvh-tcg", "no-card", "several-disks", "several-cards", "pvh-with-disk"])
def test_the_first_disk_of_any_vm_has_its_place(name: str) -> None:
    """Before the seed and the cards; all others stay where they were, which is written at each now."""
    boot = replace(BOOTS[name], slots={"rng": 20, "disk9": 9})
    disk = BootDisk(path=Path("disks/disk9.qcow2"))
    assert with_device(words(replace(boot, slots={})), disk, boot.slots) == words(
        replace(boot, disks=(*boot.disks, disk))
    )


def test_what_waited_for_memory_keeps_its_words() -> None:
    waiting = (*words(FULL), "-S", "-incoming", "defer")
    assert with_device(without_device(waiting, "disk3", FULL.slots), FULL.disks[1], FULL.slots) == waiting


def test_options_as_qmp_takes_them() -> None:
    assert device_options("virtio-blk-pci,drive=disk0,id=disk0-dev,bootindex=1,addr=0x1e") == {
        "driver": "virtio-blk-pci",
        "drive": "disk0",
        "id": "disk0-dev",
        "bootindex": 1,
        "addr": "0x1e",
    }
    assert netdev_options("user,id=nic0,hostfwd=tcp:127.0.0.1:1-:22,hostfwd=udp::2-:53") == {
        "type": "user",
        "id": "nic0",
        "hostfwd": [{"str": "tcp:127.0.0.1:1-:22"}, {"str": "udp::2-:53"}],
    }


# QEMU


class Plugged:
    """A QEMU with a disk, a card and what is behind them; its guest lets go of devices where it `listens`."""

    def __init__(self, *, listens: bool = True, refuses: str | None = None) -> None:
        self.devices = ["disk0-dev", "nic0-dev", "balloon"]
        self.nodes = ["disk0", "disk0-1", "seed"]
        self.busy = 0  # how often a node is said to be in use still
        self.netdevs = ["nic0"]
        self.listens, self.refuses = listens, refuses

    async def __call__(self, command: dict[str, Any]) -> dict[str, Any]:
        name, arguments = command["execute"], command.get("arguments", {})
        if name == self.refuses:
            return _no()
        result: object = getattr(self, name.replace("-", "_"))(arguments)
        return _no() if result is False else {"return": {} if result is None else result}

    def qom_list(self, arguments: dict[str, Any]) -> object:
        assert arguments == {"path": "/machine/peripheral"}
        return [{"name": name, "type": "child<…>"} for name in ("type", *self.devices)]

    def device_add(self, arguments: dict[str, Any]) -> None:
        assert arguments["id"] not in self.devices
        self.devices.append(arguments["id"])

    def device_del(self, arguments: dict[str, Any]) -> None:
        if self.listens:
            self.devices.remove(arguments["id"])

    def query_named_block_nodes(self, arguments: dict[str, Any]) -> object:
        return [{"node-name": node} for node in self.nodes]

    def blockdev_add(self, arguments: dict[str, Any]) -> None:
        assert arguments["node-name"] not in self.nodes
        self.nodes.append(arguments["node-name"])

    def blockdev_del(self, arguments: dict[str, Any]) -> object:
        node = arguments["node-name"]
        if self.busy or (node == "disk0" and "disk0-1" in self.nodes):
            self.busy = max(0, self.busy - 1)
            return False
        self.nodes.remove(node)
        return None

    def netdev_add(self, arguments: dict[str, Any]) -> None:
        assert arguments["id"] not in self.netdevs
        self.netdevs.append(arguments["id"])

    def netdev_del(self, arguments: dict[str, Any]) -> object:
        if arguments["id"] not in self.netdevs:
            return False
        self.netdevs.remove(arguments["id"])
        return None

    def block_resize(self, arguments: dict[str, Any]) -> None:
        assert arguments == {"node-name": "disk3", "size": GIB}


def _no() -> dict[str, Any]:
    return {"error": {"class": "GenericError", "desc": "no"}}


async def told(tmp_path: Path, qemu: Plugged, verb: Any, *arguments: Any) -> Any:
    fake = FakeQemu(qemu)
    async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
        return await verb(monitor, *arguments)


async def test_disks_are_plugged_in_and_pulled_out(tmp_path: Path) -> None:
    qemu = Plugged()
    for _ in range(2):
        await told(tmp_path, qemu, attach, FULL.disks[1], FULL.slots)
    assert await told(tmp_path, qemu, attached) == {"disk0", "nic0", "disk3"}
    await told(tmp_path, qemu, grow, FULL.disks[1], GIB)
    qemu.busy = 2
    for _ in range(2):
        await told(tmp_path, qemu, detach, "disk0")
    assert (qemu.devices, qemu.nodes) == (["nic0-dev", "balloon", "disk3-dev"], ["seed", "disk3"])


async def test_cards_are_plugged_in_and_pulled_out(tmp_path: Path) -> None:
    qemu = Plugged()
    await told(tmp_path, qemu, attach, FULL.nics[1], FULL.slots)
    assert qemu.netdevs == ["nic0", "nic2"]
    await told(tmp_path, qemu, attach, BootNic(mac="m", network="none", number=3), FULL.slots)
    for _ in range(2):
        await told(tmp_path, qemu, detach, "nic0")
        await told(tmp_path, qemu, detach, "nic3")
    assert (qemu.netdevs, qemu.devices) == (["nic2"], ["disk0-dev", "balloon", "nic2-dev"])


async def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    qemu = Plugged(refuses="device_add")
    qemu.nodes.append("disk3")  # a killed command's
    for device in (FULL.disks[1], FULL.nics[1]):
        with pytest.raises(QMPRefused):
            await told(tmp_path, qemu, attach, device, FULL.slots)
    assert (qemu.nodes, qemu.netdevs) == (["disk0", "disk0-1", "seed"], ["nic0"])


async def test_a_guest_that_keeps_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "UNPLUG_S", 0.1)
    qemu = Plugged(listens=False)
    with pytest.raises(TimedOut, match="does not let go of disk0"):
        await told(tmp_path, qemu, detach, "disk0")
    assert "disk0" in qemu.nodes


# Records


def record(**values: Any) -> Record:
    return Record(**{"id": "i", "created_at": 0.0, "spec": SPEC, "image_id": "x", "memory_mib": 128, **values})


async def test_numbers_and_places_before_the_first_change(tmp_path: Path) -> None:
    host = Machine(tmp_path / "a")
    image = await made(host, tmp_path / "scratch")
    bare = record(spec=replace(SPEC, disks=()))
    whole = numbered(bare, image)
    assert (whole.spec.disks, whole.disk_numbers, whole.nic_numbers) == ((Disk(),), (0,), (0, 1))
    assert numbered(whole, image) is whole
    seed = ["seed"] if "seed" in first_slots(bare, image) else []
    order = ["disk0", *seed, "nic0", "nic1", "rng", "balloon"]
    assert whole.slots == {name: i for i, name in enumerate(order, 2)}
    emulated = numbered(record(spec=replace(SPEC, devices=DeviceModel.EMULATED)), image)
    assert emulated.slots == {"vga": 2, "nic0": 3, "nic1": 4}
    uefi = numbered(record(spec=replace(SPEC, firmware=Firmware.UEFI)), image)
    assert uefi.slots is not None and min(uefi.slots.values()) == 1


def test_a_card_keeps_its_address_when_others_go() -> None:
    left = record(spec=replace(SPEC, nics=(Nic(),)), nic_numbers=(3,), slots={})
    assert mac_of(left, 0) == derived_mac("i", 3)


def test_records_of_devices_are_read_as_they_are_written() -> None:
    launch = replace(LAUNCH, devices=devices_of(record(disk_numbers=(0, 4))))
    assert launch.devices is not None and launch.devices.disks == {"disk0": 1, "disk4": 2}
    assert launch_from_json(launch_to_json(launch)) == launch


def test_what_waits() -> None:
    has = devices_of(record())
    changed = record(
        spec=replace(SPEC, disks=(Disk(size_gib=3), Disk(size_gib=2)), nics=(Nic(network="none"),)),
        disk_numbers=(0, 2),
        nic_numbers=(1,),
        slots={"rng": 2},
    )
    found = [(each.setting, each.now, each.then) for each in devices_waiting(changed, replace(LAUNCH, devices=has))]
    assert found == [
        ("disk0", "1 GiB", "3 GiB"),
        ("disk1", "2 GiB", "none"),
        ("disk2", "none", "2 GiB"),
        ("nic0", "on user", "none"),
    ]
    assert devices_waiting(replace(changed, slots=None), replace(LAUNCH, devices=has)) == ()
    assert devices_waiting(changed, LAUNCH) == (), "an older version has started it"


# The verbs, with a driver that refuses where it is told to

LAUNCH = Launch(
    started_at=1.0, boot_id=boot_id(), hypervisor="tcg", reason="", version="8", mode="hvm", argv=("qemu", "-S")
)


FORWARDS = (Forward(host_port=40001, guest_port=80), Forward(host_port=40002, guest_port=22))


class Refusing:
    """A driver of a VM that is alive: what it was told, what it refuses, and which devices the VM has."""

    name = "qemu"

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuses: set[str] = set()
        self.dies = False
        self.state = VMState.RUNNING
        self.has = {"disk0", "disk1", "nic0", "nic1"}

    async def inspect(self, vm: VMDirectory) -> Observed:
        return Observed(state=self.state)

    def ended(self, vm: VMDirectory) -> Observed:
        return Observed(state=VMState.STOPPED)

    async def usage(self, vm: VMDirectory) -> Usage:
        return Usage()

    async def attached(self, vm: VMDirectory) -> frozenset[str]:
        return frozenset(self.has)

    async def attach(self, vm: VMDirectory, device: BootDisk | BootNic, slots: Mapping[str, int]) -> None:
        self._tell(f"attach {device.name} {slots[device.name]}")
        assert not isinstance(device, BootDisk) or (vm.path / device.path).exists()
        self.has.add(device.name)

    async def detach(self, vm: VMDirectory, name: str) -> None:
        self._tell(f"detach {name}")
        self.has.discard(name)

    async def grow_disk(self, vm: VMDirectory, disk: BootDisk, size: int) -> None:
        self._tell(f"grow {disk.name} {size // GIB}")

    async def switch_disks(self, vm: VMDirectory, disks: Sequence[BootDisk]) -> None:
        self._tell("switch")

    async def add_forward(self, vm: VMDirectory, nic: int, forward: Forward) -> None:
        self._tell(f"forward {forward.guest_port} by nic{nic}")

    def with_device(self, launch: Launch, device: BootDisk | BootNic, slots: Mapping[str, int]) -> Launch:
        return replace(launch, argv=(*launch.argv, device.name))

    def without_device(self, launch: Launch, name: str, slots: Mapping[str, int]) -> Launch:
        return replace(launch, argv=tuple(word for word in launch.argv if word != name))

    def _tell(self, what: str) -> None:
        if what.split(maxsplit=1)[0] in self.refuses:
            if self.dies:
                raise KeyboardInterrupt
            raise TimedOut(f"{what}: refused")
        self.told.append(what)


@pytest.fixture
def driver() -> Refusing:
    return Refusing()


@pytest.fixture
async def rest(tmp_path: Path) -> Machine:
    """A host with VM `web`, at rest: it has two disks, and two cards, one of them on no network."""
    host = Machine(tmp_path / "a")
    await made(host, tmp_path / "scratch")
    return host


@pytest.fixture
def host(rest: Machine, driver: Refusing, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The same host, whose VM is alive as long as its state says so."""
    rest.drivers.qemu = driver  # type: ignore[assignment]
    vm = rest.store.directory("web")
    has = devices_of(vm.record)
    vm.write_launch(replace(LAUNCH, devices=has, resources=resources_of(SPEC, vm.record.memory_mib), forwards=FORWARDS))
    monkeypatch.setattr(VMDirectory, "alive", lambda _: driver.state.alive)
    yield rest
    assert {path.name for path in vm.disks.glob("disk*")} >= {f"{name}.qcow2" for name in driver.has if name[0] == "d"}


def files(host: Machine) -> set[str]:
    return {path.name for path in host.store.directory("web").disks.glob("disk*")}


def disk(host: Machine, name: str) -> int:
    """The size of a disk, in GiB."""
    return virtual_size(host.store.directory("web").disks / f"{name}.qcow2") // GIB


def given(host: Machine) -> tuple[set[str], tuple[str, ...]]:
    """What the launch record says of the VM: its devices and, in its arguments, those that were added."""
    launch = host.store.directory("web").launch()
    assert launch is not None and launch.devices is not None
    return {*launch.devices.disks, *launch.devices.nics}, launch.argv[2:]


async def test_changes_of_a_running_vm_and_that_repeating_is_no_harm(host: Machine, driver: Refusing) -> None:
    for _ in range(2):
        disks = await host.disk_add("web", 3, disk="disk2")
        assert [(each.name, each.size_mib, each.pending) for each in disks] == [
            ("disk0", 1024, None),
            ("disk1", 2048, None),
            ("disk2", 3072, None),
        ]
    assert [told.split()[:2] for told in driver.told] == [["attach", "disk2"]]
    assert given(host) == ({"disk0", "disk1", "disk2", "nic0", "nic1"}, ("disk2",))
    await host.disk_grow("web", "disk2", 4)
    await host.disk_remove("web", "disk1", force=True)
    await host.nic_add("web", "private:x")
    await host.nic_remove("web", "nic1")
    assert given(host) == ({"disk0", "disk2", "nic0", "nic2"}, ("disk2", "nic2"))
    assert files(host) == {"disk0.qcow2", "disk2.qcow2"}
    details = await host.show("web")
    assert (details.disk_names, details.nic_names, details.pending) == (("disk0", "disk2"), ("nic0", "nic2"), ())
    assert details.spec.disks == (Disk(size_gib=1), Disk(size_gib=4))
    slots = host.store.directory("web").record.slots
    assert slots is not None and len(set(slots.values())) == len(slots)


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("verb", ["attach", "detach", "grow", "forward"])
async def test_what_is_refused_changes_nothing(host: Machine, driver: Refusing, verb: str, dies: bool) -> None:
    vm = host.store.directory("web")
    before, launch = vm.record, given(host)
    driver.refuses, driver.dies = {verb}, dies
    with pytest.raises(
        KeyboardInterrupt if dies else TimedOut, match=None if dies else "'web' was not changed.*refused"
    ):
        match verb:
            case "attach":
                await host.disk_add("web", 3)
            case "detach":
                await host.disk_remove("web", "disk1", force=True)
            case "grow":
                await host.disk_grow("web", "disk1", 3)
            case _:
                vm.write_launch(replace(LAUNCH, devices=devices_of(before), forwards=()))
                await host.nic_add("web")
    assert VMDirectory(vm.path).record == before
    assert files(host) == {"disk0.qcow2", "disk1.qcow2"}
    if verb != "forward":
        assert given(host) == launch
    assert driver.has == {"disk0", "disk1", "nic0", "nic1"}


async def test_a_device_that_can_not_be_taken_back_is_wanted_still(host: Machine, driver: Refusing) -> None:
    vm = host.store.directory("web")
    vm.write_launch(replace(LAUNCH, devices=devices_of(vm.record)))
    driver.refuses = {"forward", "detach"}
    with pytest.raises(TimedOut, match="forward 80 by nic0: refused"):
        await host.nic_add("web", "none", nic="nic2")
    driver.refuses.clear()
    assert [each.pending for each in await host.nic_add("web", "none", nic="nic2")] == [None] * 3
    assert given(host)[0] == {"disk0", "disk1", "nic0", "nic1", "nic2"}


async def test_what_was_cut_off_is_completed_by_the_same_command(host: Machine, driver: Refusing) -> None:
    vm = host.store.directory("web")
    await host.disk_add("web", 3, disk="disk2")
    wanted, launch = VMDirectory(vm.path).record, vm.launch()
    assert launch is not None
    # Killed before QEMU was told, and before the launch record said so.
    for has in ({"disk0", "disk1", "nic0", "nic1"}, {"disk0", "disk1", "disk2", "nic0", "nic1"}):
        vm.write_launch(replace(launch, devices=devices_of(record()), argv=LAUNCH.argv))
        driver.has = set(has)
        assert [each.setting for each in (await host.show("web")).pending] == ["disk2"]
        await host.disk_add("web", 3, disk="disk2")
        assert (await host.show("web")).pending == ()
        assert VMDirectory(vm.path).record == wanted
        assert given(host)[1] == ("disk2",)
    # A removal: the record was written, and no more; then QEMU had done it already.
    for has in ({"disk0", "disk1", "disk2", "nic0", "nic1"}, {"disk0", "disk1", "nic0", "nic1"}):
        (vm.disks / "disk2.qcow2").touch()
        vm.write_record(replace(wanted, spec=replace(wanted.spec, disks=SPEC.disks), disk_numbers=(0, 1)))
        vm.write_launch(launch)
        driver.has = set(has)
        try:
            await host.disk_remove("web", "disk2", force=True)
        except NotFound:
            await host.disk_add("web", 1, disk="disk3")
            await host.disk_remove("web", "disk3", force=True)
        assert files(host) == {"disk0.qcow2", "disk1.qcow2"}
        assert given(host)[0] == {"disk0", "disk1", "nic0", "nic1"}


async def test_a_guest_that_lets_go_too_late_is_noticed(host: Machine, driver: Refusing) -> None:
    await host.disk_add("web", 3)
    driver.has.remove("disk2")
    await host.start("web")
    assert [(each.setting, each.now, each.then) for each in (await host.show("web")).pending] == [
        ("disk2", "none", "3 GiB")
    ]


XEN_LIKE = {key: XEN_MISSING[key] for key in ("disk-add", "disk-remove", "disk-grow", "nic-add", "nic-remove")}


async def test_what_a_driver_can_not_do_waits(host: Machine, driver: Refusing) -> None:
    host.offered = (replace(TCG, missing=XEN_LIKE),)
    added = (await host.disk_add("web", 3))[-1]
    assert (added.pending, added.reason) == ("added at the next boot", XEN_LIKE["disk-add"])
    grown = (await host.disk_grow("web", "disk0", 5))[0]
    assert (grown.pending, grown.reason) == ("grown to 5 GiB at the next boot", XEN_LIKE["disk-grow"])
    assert (await host.disk_grow("web", "disk2", 4))[-1].size_mib == 4096, "nobody has it so far"
    removed = (await host.disk_remove("web", "disk1", force=True))[-1]
    assert (removed.name, removed.pending, removed.reason) == (
        "disk1",
        "removed at the next boot",
        XEN_LIKE["disk-remove"],
    )
    with pytest.raises(WrongState, match="has the removed disk1 until its next boot"):
        await host.disk_add("web", 1, disk="disk1")
    assert (await host.disk_add("web", 1))[2].name == "disk3"
    await host.disk_remove("web", "disk3", force=True)
    await host.nic_add("web", "none")
    assert [each.pending for each in await host.nic_remove("web", "nic0")][:1] == [None]
    assert driver.told == []
    assert files(host) == {"disk0.qcow2", "disk1.qcow2", "disk2.qcow2"}
    driver.state = VMState.STOPPED
    await host.disk_grow("web", "disk0", 5)
    assert files(host) == {"disk0.qcow2", "disk2.qcow2"}
    assert (disk(host, "disk0"), disk(host, "disk2")) == (5, 4)
    driver.has = {"disk0", "disk2"}


async def test_uefi_and_emulated_devices_wait(host: Machine, driver: Refusing) -> None:
    vm = host.store.directory("web")
    host.offered = (replace(TCG, missing=MISSING),)
    for spec, reason in (
        (replace(SPEC, firmware=Firmware.UEFI), "UEFI"),
        (replace(SPEC, devices=DeviceModel.EMULATED), "emulated"),
    ):
        vm.write_record(replace(vm.record, spec=spec, slots=None, disk_numbers=(), nic_numbers=()))
        assert reason in ((await host.nic_add("web", "none"))[-1].reason or "")
        await host.disk_grow("web", "disk1", 3)
        assert ("grow disk1 3" in driver.told) is (reason == "UEFI")
        driver.told.clear()


async def test_ports_follow_the_cards(host: Machine, driver: Refusing) -> None:
    await host.nic_add("web", "user", nic="nic4")
    assert not [told for told in driver.told if told.startswith("forward")], "the first card has it"
    await host.nic_remove("web", "nic0")
    assert driver.told[-1] == "forward 22 by nic4"
    status = (await host.show("web")).status
    assert [forward.guest_port for forward in status.forwards] == [22]
    await host.nic_remove("web", "nic4")
    assert (await host.show("web")).status.forwards == ()


@pytest.mark.parametrize("state", [VMState.PAUSED, VMState.UNRESPONSIVE])
async def test_a_guest_that_does_not_run(host: Machine, driver: Refusing, state: VMState) -> None:
    driver.state = state
    with pytest.raises(WrongState, match=f"is {state}"):
        await host.disk_remove("web", "disk1", force=True)
    if state is VMState.PAUSED:
        await host.disk_add("web", 1)
        await host.disk_grow("web", "disk1", 3)
    assert len(driver.told) == (2 if state is VMState.PAUSED else 0)


async def test_memory_is_not_kept_of_another_machine(host: Machine, driver: Refusing) -> None:
    host.offered = (replace(TCG, missing=XEN_LIKE),)
    await host.nic_add("web", "none")
    for verb in (host.save, host.snapshot_create):
        with pytest.raises(WrongState, match="while nic2 wait for its next boot"):
            await verb("web")


# At rest


async def test_wrong_words(rest: Machine) -> None:
    before = rest.files("web")
    for work, error, problem in (
        (rest.disk_remove("web", "disk0", force=True), InvalidInput, "disk: 'disk0': has the VM's image on it"),
        (rest.disk_remove("web", "disk1"), WrongState, "what is on disk1 would be lost"),
        (rest.disk_remove("web", "disk7", force=True), NotFound, "has no disk 'disk7'"),
        (rest.disk_grow("web", "disk1", 1), InvalidInput, "size_gib: 1: is less than disk1 has"),
        (rest.disk_grow("web", "disk1", 1 << 30), InvalidInput, "size_gib: .*: is out of range"),
        (rest.disk_add("web", 0), InvalidInput, "size_gib: 0: is out of range"),
        (rest.disk_add("web", 1, disk="disk16"), InvalidInput, "disk: 'disk16': is no name for a disk"),
        (rest.disk_add("web", 1, disk="../x"), InvalidInput, "is no name for a disk"),
        (rest.disk_add("web", 1, disk="disk1"), AlreadyExists, "has a disk1 already: 2 GiB"),
        (rest.nic_add("web", "lan"), InvalidInput, "network: 'lan'"),
        (rest.nic_add("web", mac="x"), InvalidInput, "mac: 'x'"),
        (rest.nic_add("web", mac="52:54:00:00:00:01"), InvalidInput, "is that of another card"),
        (rest.nic_add("web", nic="eth0"), InvalidInput, "nic: 'eth0': is no name for a nic"),
        (rest.nic_add("web", nic="nic0", network="none"), AlreadyExists, "has a nic0 already: user"),
        (rest.nic_remove("web", "nic9"), NotFound, "has no nic 'nic9'"),
        (rest.disk_list("db"), NotFound, "no VM 'db'"),
    ):
        with pytest.raises(error, match=problem) as raised:
            await work
        assert isinstance(raised.value, PolyvisorError) and raised.value.hint
    assert rest.files("web") == before


async def test_as_many_as_there_may_be(rest: Machine) -> None:
    for _ in range(MAX_DISKS - 2):
        await rest.disk_add("web", 1)
    with pytest.raises(InvalidInput):
        await rest.disk_add("web", 1)
    for _ in range(6):
        await rest.nic_add("web", "none")
    with pytest.raises(InvalidInput):
        await rest.nic_add("web", "none")
    slots = rest.store.directory("web").record.slots
    assert slots is not None and len(set(slots.values())) == len(slots) and max(slots.values()) < 31


async def test_networks_that_a_hypervisor_lacks(rest: Machine) -> None:
    tcg = replace(TCG.accelerators[1], name="xen")
    rest.offered = (replace(TCG, driver="xen", accelerators=(tcg,), missing={"private": "it has none"}),)
    with pytest.raises(Unsupported, match="network: private:x: it has none"):
        await rest.nic_add("web", "private:x")


async def test_files_are_as_the_record_says_after_a_start_or_a_change(rest: Machine) -> None:
    """What a killed command has left: a file too many, a disk that was to grow."""
    await rest.disk_add("web", 1)
    vm = rest.store.directory("web")
    left = VMDirectory(vm.path).record
    sizes = (Disk(size_gib=1), Disk(size_gib=6), Disk(size_gib=1))
    vm.write_record(replace(left, spec=replace(left.spec, disks=sizes)))
    (vm.disks / "disk9.qcow2").touch()
    await rest._tidy_devices(VMDirectory(vm.path))
    assert files(rest) == {"disk0.qcow2", "disk1.qcow2", "disk2.qcow2"}
    assert disk(rest, "disk1") == 6


async def test_snapshots_keep_what_they_have(rest: Machine) -> None:
    await rest.snapshot_create("web", snapshot="a")
    await rest.disk_remove("web", "disk1", force=True)
    assert len(rest.layers.ids()) == 2
    await rest.disk_add("web", 5, disk="disk4")
    await rest.snapshot_create("web", snapshot="b")
    for back in (rest.snapshot_revert("web", "a"), rest.clone("web", "db", snapshot="a")):
        with pytest.raises(WrongState, match="had disk0, disk1 at snapshot 'a', and has disk0, disk4 now") as raised:
            await back
        assert raised.value.hint is not None
        assert "disk add web --name disk1; polyvisor disk rm --force web disk4" in raised.value.hint
    await rest.disk_remove("web", "disk4", force=True)
    await rest.disk_add("web", 4, disk="disk1")
    await rest.snapshot_revert("web", "a")
    assert [each.size_mib for each in await rest.disk_list("web")] == [1024, 2048], "as it was, until the next boot"
    await rest.clone("web", "db", full=True)
    assert [each.size_mib for each in await rest.disk_list("db")] == [1024, 4096]
    await rest.snapshot_remove("web", "a")
    await rest.snapshot_remove("web", "b")
    await rest.disk_remove("web", "disk1", force=True)
    assert len(rest.layers.ids()) == 1


async def test_a_vm_that_is_moved_keeps_its_addresses_and_disks(rest: Machine, tmp_path: Path) -> None:
    target = Machine(tmp_path / "b")
    await rest.disk_remove("web", "disk1", force=True)
    await rest.disk_add("web", 3, disk="disk5")
    await rest.nic_remove("web", "nic0")
    await rest.nic_add("web", "private:x")
    before = (await rest.show("web")).mac_addresses
    await move(rest, target)
    details = await target.show("web")
    assert (details.mac_addresses, details.disk_names) == (before, ("disk0", "disk1"))
    assert [each.size_mib for each in await target.disk_list("web")] == [1024, 3072]


async def test_a_saved_vm_keeps_its_devices(rest: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VMDirectory, "is_saved", lambda _: True)
    with pytest.raises(WrongState, match="is saved with the disks and cards that it has"):
        await rest.disk_add("web", 1)
