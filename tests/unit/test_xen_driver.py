"""The Xen driver with a program in place of `xl` that fails where it is told to; the real one is tests/lab/test_xen.py's."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.drivers import registry
from polyvisor.drivers.base import BootNic, Observed
from polyvisor.drivers.xen import dom0
from polyvisor.errors import CannotStart, InvalidInput, ProcessFailed, TimedOut, Unavailable, WrongState
from polyvisor.files import is_flocked
from polyvisor.host.record import Launch, boot_id
from polyvisor.host.store import VMDirectory
from polyvisor.network.nat import BRIDGE, Card, private_bridge
from polyvisor.network.ports import hold_port
from polyvisor.spec.forward import Forward
from polyvisor.spec.resources import Resources
from polyvisor.status import Usage, VMState
from polyvisor.waiting import pause
from tests.unit.xen_host import DRIVER, domains, made, start, until_ended


async def xl(vm: VMDirectory, verb: str) -> None:
    from polyvisor.drivers.xen import xl as program

    found = await DRIVER._domain(vm)
    await program.xl(verb, str(found.id))


async def until_said(vm: VMDirectory, text: str) -> None:
    """Wait until the console log is `text`: each boot says hello once."""
    while vm.console_log.read_text() != text:
        await pause(0.01)


async def test_life(xen: Path, vm: VMDirectory) -> None:
    assert await DRIVER.inspect(vm) == Observed(state=VMState.STOPPED)
    started = await start(vm)
    assert vm.alive()
    assert await DRIVER.inspect(vm) == started
    for _ in range(2):
        await DRIVER.pause(vm)
        assert (await DRIVER.inspect(vm)).state is VMState.PAUSED
    for _ in range(2):
        await DRIVER.resume(vm)
        assert (await DRIVER.inspect(vm)).state is VMState.RUNNING
    await until_said(vm, "hello\n")
    await DRIVER.reboot(vm, 10)
    assert await DRIVER.inspect(vm) == started, "the same process"
    await until_said(vm, "hello\nhello\n")
    await DRIVER.shutdown(vm)
    assert await until_ended(vm) == Observed(state=VMState.STOPPED)
    await start(vm)
    for _ in range(2):
        await DRIVER.kill(vm)
        assert await DRIVER.inspect(vm) == Observed(state=VMState.STOPPED)
    assert not vm.alive() and domains(xen) == []


@pytest.mark.parametrize(("verb", "reason"), [("crash", "kernel has crashed"), ("destroy", "somebody else")])
async def test_an_end_that_nobody_asked_for_has_a_reason(vm: VMDirectory, verb: str, reason: str) -> None:
    await start(vm)
    await xl(vm, verb)
    ended = await until_ended(vm)
    assert ended.state is VMState.CRASHED and reason in (ended.reason or "")
    await start(vm)
    await DRIVER.kill(vm)
    assert (await DRIVER.inspect(vm)).state is VMState.STOPPED


async def test_a_domain_whose_process_was_killed(xen: Path, vm: VMDirectory) -> None:
    """It is seen, is not started twice, can be paused, and is ended by kill."""
    started = await start(vm)
    assert started.pid is not None
    os.kill(started.pid, signal.SIGKILL)
    while vm.alive():
        await pause(0.01)
    assert await DRIVER.lives(vm)
    seen = await DRIVER.inspect(vm)
    assert seen.state is VMState.RUNNING and "xl was killed" in (seen.reason or "")
    with pytest.raises(WrongState, match="a domain already"):
        await start(vm)
    await DRIVER.pause(vm)
    assert (await DRIVER.inspect(vm)).state is VMState.PAUSED
    await DRIVER.kill(vm)
    assert domains(xen) == [] and not await DRIVER.lives(vm)


async def test_a_start_that_xl_refuses(xen: Path, vm: VMDirectory) -> None:
    (xen / "broken").write_text("create")
    with pytest.raises(CannotStart, match="create is broken"):
        await start(vm)
    assert not vm.alive() and not await DRIVER.lives(vm)
    assert (await DRIVER.inspect(vm)).state is VMState.STOPPED
    (xen / "broken").unlink()
    assert (await start(vm)).state is VMState.RUNNING
    await DRIVER.kill(vm)


async def test_a_start_that_hangs_half_way_is_undone(
    xen: Path, vm: VMDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyvisor.drivers.xen import driver
    from polyvisor.errors import TimedOut

    monkeypatch.setattr(driver, "START_S", 2.0)
    (xen / "broken").write_text("half")
    with pytest.raises(TimedOut):
        await start(vm)
    assert domains(xen) == [] and not vm.alive()


@pytest.mark.parametrize("call", ["list", "pause", "shutdown"])
async def test_a_call_that_fails_changes_nothing(xen: Path, vm: VMDirectory, call: str) -> None:
    await start(vm)
    (xen / "broken").write_text(call)
    with pytest.raises(ProcessFailed, match="is broken"):
        await (DRIVER.shutdown(vm) if call == "shutdown" else DRIVER.pause(vm))
    state = (await DRIVER.inspect(vm)).state
    assert state is (VMState.UNRESPONSIVE if call == "list" else VMState.RUNNING)
    (xen / "broken").unlink()
    assert (await DRIVER.inspect(vm)).state is VMState.RUNNING
    await DRIVER.kill(vm)


async def test_after_another_boot_of_the_host_it_has_crashed(vm: VMDirectory) -> None:
    started = await start(vm)
    launch = vm.launch()
    assert launch is not None and started.pid is not None
    vm.write_launch(replace(launch, boot_id="another"))
    assert DRIVER.settled(vm)
    assert DRIVER.ended(vm).reason == "the host went down while it ran"
    vm.write_launch(launch)
    await DRIVER.kill(vm)


async def test_many_are_looked_at_by_one_call(xen: Path, tmp_path: Path) -> None:
    import asyncio

    vms = [made(tmp_path / "vms" / f"vm-{i}") for i in range(3)]
    for each in vms:
        await start(each)
    (xen / "calls").unlink()
    seen = await asyncio.gather(*(DRIVER.inspect(each) for each in vms))
    assert [each.state for each in seen] == [VMState.RUNNING] * 3
    assert (xen / "calls").read_text() == "list -v\n"
    for each in vms:
        await DRIVER.kill(each)


class Joined:
    """In place of the bridge, which tests/real/test_bridge.py makes: who has which cards, and whether they may."""

    def __init__(self) -> None:
        self.cards: dict[Path, list[Card]] = {}
        self.refuses = False

    async def join(self, owner: Path, cards: Sequence[Card]) -> None:
        assert is_flocked(owner), "a card without an owner who is alive can be taken away at any time"
        self.cards[owner] = list(cards)
        if self.refuses:
            raise Unavailable("there is no nft")

    async def leave(self, owner: Path) -> None:
        self.cards.pop(owner, None)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Joined:
    joined = Joined()
    monkeypatch.setattr(DRIVER, "_bridge", joined)
    return joined


def nic(network: str, last: int, *forwards: Forward) -> BootNic:
    group = "239.192.0.1:20000" if network.startswith("private:") else None
    return BootNic(mac=f"52:54:00:00:00:{last:02x}", network=network, group=group, forwards=forwards)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_cards_are_on_their_bridges_and_ports_are_held_while_the_vm_lives(
    vm: VMDirectory, network: Joined
) -> None:
    forward = Forward(host_port=free_port(), guest_port=22)
    await start(vm, nics=(nic("none", 1), nic("private:lan", 2), nic("user", 3, forward)))
    private, user = network.cards[vm.alive_file]
    assert (private.mac, private.bridge, private.forwards) == (
        "52:54:00:00:00:02",
        private_bridge("239.192.0.1:20000"),
        (),
    )
    assert (user.mac, user.bridge, user.forwards) == ("52:54:00:00:00:03", BRIDGE, (forward,))
    with pytest.raises(InvalidInput, match="host forwarding"):
        hold_port(forward)
    await DRIVER.kill(vm)
    assert network.cards == {}
    hold_port(forward).close()


async def test_a_start_whose_network_fails_leaves_nothing(xen: Path, vm: VMDirectory, network: Joined) -> None:
    network.refuses = True
    with pytest.raises(Unavailable, match="no nft"):
        await start(vm, nics=(nic("user", 3),))
    assert not vm.alive()
    assert domains(xen) == []
    network.refuses = False
    assert (await start(vm, nics=(nic("user", 3),))).state is VMState.RUNNING
    await DRIVER.kill(vm)


async def test_a_port_that_another_program_has_is_named(vm: VMDirectory, network: Joined) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        forward = Forward(host_port=other.getsockname()[1], guest_port=22)
        with pytest.raises(InvalidInput, match=rf"127.0.0.1:{forward.host_port}:22.*host forwarding"):
            await start(vm, nics=(nic("user", 3, forward),))
    assert not vm.alive()
    assert network.cards == {}


async def test_console_writes_what_is_typed_and_reads_what_is_said(vm: VMDirectory) -> None:
    await start(vm)
    pipe = os.open(vm.path / "run/console.in", os.O_RDONLY | os.O_NONBLOCK)
    reader, writer = await DRIVER.console(vm)
    writer.write(b"ls\x1d\n")
    await writer.drain()
    typed = b""
    while b"\n" not in typed:
        await pause(0.01)
        try:
            typed += os.read(pipe, 100)
        except BlockingIOError:
            continue
    os.close(pipe)
    assert typed == b"ls\n", "without what would end Xen's console client"
    with vm.console_log.open("ab") as log:
        log.write(b"answer")
    assert await reader.readexactly(6) == b"answer"
    await DRIVER.kill(vm)
    assert await reader.read() == b""
    writer.close()


def test_whose_a_vm_is(vm: VMDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launch = Launch(
        started_at=0.0,
        boot_id=boot_id(),
        hypervisor="xen",
        reason="",
        version="4.17",
        mode="pv",
        argv=("xl",),
    )
    assert registry.Drivers(tmp_path).of(vm).name == "qemu", "no Xen host"
    monkeypatch.setattr(dom0, "is_dom0", lambda: True)
    drivers = registry.Drivers(tmp_path)
    assert drivers.of(vm).name == "qemu", "never started"
    vm.write_launch(launch)
    assert drivers.of(vm).name == "xen"
    vm.write_launch(replace(launch, hypervisor="tcg"))
    assert drivers.of(vm).name == "qemu"
    assert (drivers.running("xen").name, drivers.running("tcg").name) == ("xen", "qemu")


GROWN = Resources(vcpus=1, vcpus_max=4, memory_mib=128, memory_max_mib=512)


async def resizable(vm: VMDirectory) -> None:
    await start(vm, vcpus_max=4, memory_max_mib=512)
    launch = vm.launch()
    assert launch is not None
    vm.write_launch(replace(launch, resources=GROWN))


async def test_resources_of_a_running_domain(xen: Path, vm: VMDirectory) -> None:
    """Each is set by its own command, and kept for the domain that comes after a reboot."""
    await resizable(vm)
    assert await DRIVER.usage(vm) == Usage(vcpus=1, memory_mib=128)
    (xen / "calls").unlink()
    await DRIVER.set_vcpus(vm, 3)
    await DRIVER.set_memory(vm, 300)
    assert await DRIVER.usage(vm) == Usage(vcpus=3, memory_mib=300)
    await DRIVER.set_scheduling(vm, replace(GROWN, cpu_weight=200, cpu_limit=50, cpu_affinity="0-1"))
    await DRIVER.set_scheduling(vm, GROWN)
    calls = [line for line in (xen / "calls").read_text().splitlines() if line.split()[0] not in ("list", "console")]
    keep = f"config-update 1 {vm.path}/xl.cfg"
    assert calls == [
        *("vcpu-set --ignore-host 1 3", keep, "mem-set 1 300m", keep),
        *("sched-credit2 -d 1 -w 512 -c 50", "vcpu-pin 1 all 0-1", keep),
        *("sched-credit2 -d 1 -w 256 -c 0", "vcpu-pin 1 all all", keep),
    ]
    await DRIVER.kill(vm)


async def test_a_guest_of_xen_that_does_not_listen(xen: Path, vm: VMDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked of it is taken back, and what its next boot has is as before."""
    from polyvisor.drivers.xen import resize

    monkeypatch.setattr(resize, "PATIENCE_S", 0.3)
    await resizable(vm)
    config = (vm.path / "xl.cfg").read_text()
    (xen / "deaf").touch()
    with pytest.raises(TimedOut, match="came to 1 vCPUs instead of 2"):
        await DRIVER.set_vcpus(vm, 2)
    with pytest.raises(TimedOut, match="came to 128 MiB instead of 300"):
        await DRIVER.set_memory(vm, 300)
    calls = [line for line in (xen / "calls").read_text().splitlines() if "-set" in line]
    assert calls == ["vcpu-set --ignore-host 1 2", "vcpu-set --ignore-host 1 1", "mem-set 1 300m", "mem-set 1 128m"]
    assert (vm.path / "xl.cfg").read_text() == config
    await DRIVER.kill(vm)


@pytest.mark.parametrize("call", ["vcpu-set", "mem-set", "sched-credit2", "vcpu-pin"])
async def test_a_resize_that_xl_refuses(xen: Path, vm: VMDirectory, call: str) -> None:
    await resizable(vm)
    (xen / "broken").write_text(call)
    with pytest.raises(ProcessFailed, match=f"{call} is broken"):
        await (
            DRIVER.set_vcpus(vm, 2)
            if call == "vcpu-set"
            else DRIVER.set_memory(vm, 300)
            if call == "mem-set"
            else DRIVER.set_scheduling(vm, GROWN)
        )
    assert await DRIVER.usage(vm) == Usage(vcpus=1, memory_mib=128)
    (xen / "broken").unlink()
    await DRIVER.kill(vm)
