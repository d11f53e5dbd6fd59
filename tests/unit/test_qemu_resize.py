"""vCPUs and memory of a guest of QEMU, against a QMP server that stands for QEMU and a guest that listens or does not."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from polyvisor.drivers.qemu import resize
from polyvisor.drivers.qemu.incoming import restoring_argv
from polyvisor.drivers.qemu.qmp import Monitor, connected
from polyvisor.drivers.qemu.resize import free_regions, read_slots, set_memory, set_vcpus, usage
from polyvisor.errors import PolyvisorError, TimedOut, WrongState
from polyvisor.status import Usage
from tests.unit.test_qmp import FakeQemu

MIB = 1 << 20
CODE = 33472512  # what QEMU 7.2 says of tb-size=32


def _name(key: str) -> str:
    """An argument of QMP as the name of one of Python's."""
    return {"id": "id_", "property": "property_"}.get(key, key.replace("-", "_"))


class Machine:
    """A QEMU of four places for vCPUs, listed last first as QEMU does, and its guest."""

    def __init__(self) -> None:
        self.cores = {0: "/machine/unattached/device[0]"}
        self.actual = 256
        self.available = 200
        self.driver = True  # whether the guest has a balloon driver
        self.listens = True  # whether it does as it is asked
        self.least = 0  # no less memory than this
        self.updates = 0
        self.translated = [0.5]  # how full the buffer of translated code is: now, and at each later question
        self.targets: list[int] = []
        self.removed: list[str] = []

    async def __call__(self, command: dict[str, Any]) -> dict[str, Any]:
        arguments = command.get("arguments", {})
        method = getattr(self, command["execute"].replace("-", "_"))
        answer: dict[str, Any] = method(**{_name(key): value for key, value in arguments.items()})
        return answer

    def query_hotpluggable_cpus(self) -> dict[str, Any]:
        cpus = [
            {
                "type": "max-x86_64-cpu",
                "vcpus-count": 1,
                "props": {"core-id": i, "thread-id": 0, "socket-id": 0},
                **({"qom-path": self.cores[i]} if i in self.cores else {}),
            }
            for i in (3, 2, 1, 0)
        ]
        return {"return": cpus}

    def device_add(self, driver: str, id_: str, core_id: int, socket_id: int, thread_id: int) -> dict[str, Any]:
        assert (driver, socket_id, thread_id) == ("max-x86_64-cpu", 0, 0)
        assert core_id not in self.cores
        self.cores[core_id] = f"/machine/peripheral/{id_}"
        return {"return": {}}

    def device_del(self, id_: str) -> dict[str, Any]:
        self.removed.append(id_)
        if self.listens:
            self.cores = {core: path for core, path in self.cores.items() if path != id_}
        return {"return": {}}

    def human_monitor_command(self, command_line: str) -> dict[str, Any]:
        assert command_line == "info jit"
        full = self.translated.pop(0) if len(self.translated) > 1 else self.translated[0]
        return {
            "return": f"Translation buffer state:\r\ngen code size       {int(full * CODE)}/{CODE}\r\nTB count  7\r\n"
        }

    def balloon(self, value: int) -> dict[str, Any]:
        self.targets.append(value // MIB)
        if self.driver and self.listens:
            self.actual = max(value // MIB, self.least)
        return {"return": {}}

    def query_balloon(self) -> dict[str, Any]:
        if self.actual:
            return {"return": {"actual": self.actual * MIB}}
        return {"error": {"class": "DeviceNotActive", "desc": "No balloon device has been activated"}}

    def qom_set(self, path: str, property_: str, value: int) -> dict[str, Any]:
        assert (path, property_) == ("/machine/peripheral/balloon", "guest-stats-polling-interval")
        return {"return": {}}

    def qom_get(self, path: str, property_: str) -> dict[str, Any]:
        assert (path, property_) == ("/machine/peripheral/balloon", "guest-stats")
        self.updates += self.driver
        stats = {"stat-available-memory": self.available * MIB, "stat-free-memory": (1 << 64) - 1}
        return {"return": {"last-update": self.updates, "stats": stats}}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    for name in ("UNPLUG_S", "STATISTICS_S", "BALLOON_S", "TRANSLATOR_S"):
        monkeypatch.setattr(resize, name, 0.3)
    return Machine()


@asynccontextmanager
async def talking(machine: Machine, directory: Path) -> Any:
    fake = FakeQemu(machine)
    server = await asyncio.start_unix_server(fake.serve, directory / "s")
    try:
        async with connected(directory / "s", timeout_s=5) as monitor:
            yield monitor
    finally:
        server.close()


async def test_vcpus_are_plugged_in_and_pulled_out_in_order(machine: Machine, tmp_path: Path) -> None:
    async with talking(machine, tmp_path) as monitor:
        for count in (3, 3, 1, 2, 4):
            await set_vcpus(monitor, count, emulated=True)
            assert sorted(machine.cores) == list(range(count))
            assert await usage(monitor) == Usage(vcpus=count, memory_mib=256)
    assert [path.rpartition("-")[0] for path in machine.removed] == [
        "/machine/peripheral/cpu-2-0",
        "/machine/peripheral/cpu-1-0",
    ]


async def test_a_guest_that_does_not_let_go_of_a_vcpu(machine: Machine, tmp_path: Path) -> None:
    async with talking(machine, tmp_path) as monitor:
        await set_vcpus(monitor, 2, emulated=True)
        machine.listens = False
        with pytest.raises(TimedOut, match="does not let go"):
            await set_vcpus(monitor, 1, emulated=True)
        assert len(machine.cores) == 2
        await set_vcpus(monitor, 2, emulated=True)


async def test_a_translator_that_is_full_gets_no_vcpu(machine: Machine, tmp_path: Path) -> None:
    """QEMU would end itself; a guest that runs on empties the buffer, sooner or later."""
    async with talking(machine, tmp_path) as monitor:
        machine.translated = [0.97]
        with pytest.raises(WrongState, match="no room for the code of another vCPU"):
            await set_vcpus(monitor, 2, emulated=True)
        assert len(machine.cores) == 1
        machine.translated = [0.97, 0.99, 0.01]
        await set_vcpus(monitor, 2, emulated=True)
        assert len(machine.cores) == 2
        machine.translated = [1.0]
        await set_vcpus(monitor, 2, emulated=True)
        await set_vcpus(monitor, 3, emulated=False)
        assert len(machine.cores) == 3


def test_regions_of_the_translator() -> None:
    """Never more than QEMU has: with three vCPUs at most, 32 MiB are 16 regions, and 256 MiB are 24."""

    def free(used: int, size: int, vcpus: int = 1, most: int = 3) -> int:
        return free_regions(f"x\ngen code size {used}/{size}\n", vcpus, most)

    assert free(0, CODE) == 15
    assert [free(29875107, CODE), free(31947011, CODE), free(CODE, CODE)] == [1, 0, 0]
    assert free(0, 256 * MIB) == 23
    assert free(128 * MIB, 256 * MIB, vcpus=2) == 10
    assert free(0, 4 * MIB) == 2
    for told in ("", "gen code size a/b", "gen code size 1/0"):
        with pytest.raises(PolyvisorError, match="can't be understood"):
            free_regions(told, 1, 3)


async def test_memory_grows_and_shrinks(machine: Machine, tmp_path: Path) -> None:
    async with talking(machine, tmp_path) as monitor:
        for memory_mib in (100, 100, 300):
            await set_memory(monitor, memory_mib)
            assert machine.actual == memory_mib


async def refused(monitor: Monitor, memory_mib: int, kind: type[PolyvisorError], problem: str) -> None:
    with pytest.raises(kind, match=problem) as raised:
        await set_memory(monitor, memory_mib)
    assert raised.value.hint


async def test_memory_that_a_guest_can_not_spare(machine: Machine, tmp_path: Path) -> None:
    machine.available = 50
    async with talking(machine, tmp_path) as monitor:
        await refused(monitor, 200, WrongState, "has 34 MiB to spare, not 56")
        assert machine.targets == []
        await set_memory(monitor, 256 - 34)


async def test_a_guest_that_stops_half_way_gets_its_memory_back(machine: Machine, tmp_path: Path) -> None:
    machine.least = 150
    async with talking(machine, tmp_path) as monitor:
        await refused(monitor, 100, TimedOut, "came to 150 MiB and no further")
    assert machine.targets == [100, 256]
    assert machine.actual == 256


async def test_a_guest_without_a_driver_and_a_machine_without_a_balloon(machine: Machine, tmp_path: Path) -> None:
    machine.driver = False
    async with talking(machine, tmp_path) as monitor:
        await refused(monitor, 200, WrongState, "no balloon driver that answers")
        assert machine.targets == []
        machine.actual = 0
        await refused(monitor, 200, WrongState, "without a balloon")
        assert await usage(monitor) == Usage(vcpus=1)


@pytest.mark.parametrize(
    "answer", [None, [{}], [{"type": "x", "props": []}], [{"type": "x", "props": {"a": "b"}}], "x"]
)
def test_an_answer_that_is_none(answer: object) -> None:
    with pytest.raises(PolyvisorError, match="can't be understood"):
        read_slots(answer)


@pytest.mark.parametrize(
    ("was", "vcpus", "now"),
    [
        ("cpus=1,maxcpus=4,sockets=1,cores=4,threads=1", 3, "cpus=3,maxcpus=4,sockets=1,cores=4,threads=1"),
        ("cpus=3,maxcpus=4,sockets=1,cores=4,threads=1", 4, "cpus=4,sockets=1,cores=4,threads=1"),
        ("cpus=2,sockets=1,cores=2,threads=1", 2, "cpus=2,sockets=1,cores=2,threads=1"),
        ("cpus=2,sockets=1,cores=2,threads=1", 1, "cpus=1,maxcpus=2,sockets=1,cores=2,threads=1"),
        ("cpus=2,sockets=1,cores=2,threads=1", None, "cpus=2,sockets=1,cores=2,threads=1"),
    ],
)
def test_a_restored_machine_has_the_vcpus_that_were_saved(was: str, vcpus: int | None, now: str) -> None:
    assert restoring_argv(("q", "-smp", was), "pc-7.2", [], vcpus)[2] == now
