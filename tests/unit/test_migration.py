"""What QEMU is told so that it writes its memory, or reads it; and the arguments of one that is to read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyvisor.drivers.base import BootNic
from polyvisor.drivers.qemu.incoming import restoring_argv
from polyvisor.drivers.qemu.migration import in_long_mode, read_memory, runs_guest, write_memory
from polyvisor.drivers.qemu.programs import Qemu
from polyvisor.drivers.qemu.qmp import QMPRefused, connected
from polyvisor.errors import PolyvisorError, StorageFull, Unsupported, WrongState
from polyvisor.operation import Step
from polyvisor.spec.forward import Forward
from tests.unit.test_qmp import FakeQemu, listening

DONE = {"status": "completed"}


def qemu(*migration: dict[str, Any], state: str = "running") -> Callable[[dict[str, Any]], Any]:
    """A QEMU that answers `query-migrate` with these one after the other, the last one for ever."""
    left = list(migration)

    async def answer(command: dict[str, Any]) -> dict[str, Any]:
        if command["execute"] == "query-migrate":
            return {"return": left.pop(0) if len(left) > 1 else left[0]}
        answers: dict[str, Any] = {
            "query-status": {"status": state},
            "qom-get": "pc-i440fx-7.2-machine",
        }
        return {"return": answers.get(command["execute"], {})}

    return answer


async def written(tmp_path: Path, fake: FakeQemu) -> tuple[str, list[Step]]:
    steps: list[Step] = []
    with (tmp_path / "memory").open("wb") as file:
        async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
            return await write_memory(monitor, file.fileno(), steps.append), steps


def said(fake: FakeQemu) -> list[str]:
    looks = ("qmp_capabilities", "query-migrate", "query-status", "qom-get")
    return [command["execute"] for command in fake.seen if command["execute"] not in looks]


async def test_writing(tmp_path: Path) -> None:
    active = {"status": "active", "ram": {"total": 100, "remaining": 40}}
    fake = FakeQemu(qemu({}, {}, active, DONE))
    assert await written(tmp_path, fake) == ("pc-i440fx-7.2", [Step("saving", 60, 100, "B")])
    assert said(fake) == ["stop", "migrate-set-capabilities", "migrate-set-parameters", "getfd", "migrate"]
    arguments = {command["execute"]: command.get("arguments") for command in fake.seen}
    assert (arguments["getfd"], arguments["migrate"]) == ({"fdname": "memory"}, {"uri": "fd:memory"})


async def test_writing_with_a_qemu_that_takes_files_in_sets_alone(tmp_path: Path) -> None:
    fake = FakeQemu(qemu({}, {}, DONE), version=(11, 0))
    await written(tmp_path, fake)
    assert said(fake) == [
        "stop",
        "migrate-set-capabilities",
        "migrate-set-parameters",
        "add-fd",
        "migrate",
        "remove-fd",
    ]
    [uri] = [command["arguments"]["uri"] for command in fake.seen if command["execute"] == "migrate"]
    assert uri == "file:/dev/fdset/5"


async def test_a_migration_that_is_still_under_way_is_ended_before(tmp_path: Path) -> None:
    fake = FakeQemu(qemu({"status": "active"}, {"status": "cancelling"}, {"status": "cancelled"}, {}, DONE))
    await written(tmp_path, fake)
    assert said(fake)[:3] == ["migrate_cancel", "migrate_cancel", "stop"]


async def test_a_guest_that_was_written_once_runs_for_a_moment(tmp_path: Path) -> None:
    fake = FakeQemu(qemu(DONE, state="postmigrate"))
    await written(tmp_path, fake)
    assert said(fake)[:2] == ["cont", "stop"]


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([{}, {}, {"status": "failed", "error-desc": "Unable to write to file: No space left on device"}], StorageFull),
        ([{}, {}, {"status": "failed", "error-desc": "Unable to write: Disk quota exceeded"}], StorageFull),
        ([{}, {}, {"status": "failed"}], PolyvisorError),
        ([{}, {}, {"status": "cancelled"}], PolyvisorError),
        ([{}, {"blocked-reasons": ["nested guests can't be migrated"]}], Unsupported),
    ],
)
async def test_writing_that_fails(tmp_path: Path, answers: list[dict[str, Any]], error: type[PolyvisorError]) -> None:
    with pytest.raises(error) as raised:
        await written(tmp_path, fake := FakeQemu(qemu(*answers)))
    assert error is not Unsupported or said(fake) == []
    assert type(raised.value) is error


@pytest.mark.parametrize("state", ["suspended", "shutdown", "inmigrate", "guest-panicked"])
async def test_states_that_are_not_saved(tmp_path: Path, state: str) -> None:
    fake = FakeQemu(qemu({}, state=state))
    with pytest.raises(WrongState, match=state):
        await written(tmp_path, fake)
    assert said(fake) == []


@pytest.mark.parametrize(("status", "good"), [("completed", True), ("failed", False)])
async def test_reading(tmp_path: Path, status: str, good: bool) -> None:
    (tmp_path / "memory").write_bytes(b"x" * 100)
    fake = FakeQemu(qemu({}, {"status": "active"}, {"status": status}))
    fd = os.open(tmp_path / "memory", os.O_RDONLY)
    try:
        async with listening(fake, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
            if good:
                await read_memory(monitor, fd, 100, lambda step: None)
            else:
                with pytest.raises(QMPRefused, match="failed"):
                    await read_memory(monitor, fd, 100, lambda step: None)
    finally:
        os.close(fd)
    assert said(fake) == ["getfd", "migrate-incoming"]


ARGV = (
    *("/old/qemu", "-machine", "q35,usb=off", "-m", "size=1M", "-machine", "pflash0=uefi-code,pflash1=uefi-vars"),
    *("-netdev", "user,id=nic0,hostfwd=tcp:127.0.0.1:5-:22", "-device", "virtio-net-pci,netdev=nic0"),
    *("-netdev", "user,id=nic1,net=10.0.3.0/24", "-device", "virtio-net-pci,netdev=nic1"),
)


def test_arguments_of_one_that_is_to_read() -> None:
    nics = [BootNic(mac="m", network="user", forwards=(Forward(host_port=9, guest_port=22),))]
    words = restoring_argv(ARGV, "pc-q35-7.2", nics)
    assert words[2] == "pc-q35-7.2,usb=off"
    assert words[6] == ARGV[6]
    assert words[8] == "user,id=nic0,hostfwd=tcp:127.0.0.1:9-:22"
    assert words[12] == ARGV[12]
    assert words[-3:] == ["-S", "-incoming", "defer"]
    assert restoring_argv(words, "pc-q35-7.2", nics) == words


def test_another_qemu_takes_the_arguments_over(tmp_path: Path) -> None:
    wheel = tmp_path / "bin" / "qemu"
    (tmp_path / "bin/lib/qemu").mkdir(parents=True)
    packed = Qemu(str(wheel), "9.0").complete(("x", "-m", "1"))
    assert Qemu("/usr/bin/qemu", "9.1").renewed(packed) == ("/usr/bin/qemu", "-m", "1")
    assert Qemu(str(wheel), "9.0").renewed(("/usr/bin/qemu", "-m", "1"))[2:3] == (str(wheel),)


def section(name: bytes, hflags: int) -> bytes:
    """A device as it stands in a migration stream, as a CPU's begins."""
    registers = bytes(range(18 * 8))
    header = b"\x04" + (7).to_bytes(4, "big") + bytes([len(name)]) + name + bytes(4) + (12).to_bytes(4, "big")
    return header + registers + hflags.to_bytes(4, "big") + bytes(500)


@pytest.mark.parametrize(
    ("sections", "runs", "long"),
    [
        ([section(b"cpu", 0x1050C2B3)], False, True),
        ([section(b"cpu", 0x0070C2B0)], True, True),
        ([section(b"cpu", 0x1050C2B3), section(b"cpu", 0x0070C2B0)], True, True),
        ([section(b"cpu", 0), section(b"cpu", 0x1050C2B3)], False, True),
        ([section(b"apic", 0x0070C2B0), section(b"cpu", 0)], False, False),
        ([], False, False),
    ],
)
def test_what_a_vcpu_was_executing_is_seen(tmp_path: Path, sections: list[bytes], runs: bool, long: bool) -> None:
    """The flags are those of real streams of an emulated KVM host."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(9 << 20) + b"".join(sections) + b"{vmdesc}")
    with path.open("ab") as file:
        assert runs_guest(file.fileno()) is runs
        assert in_long_mode(file.fileno()) is long
