"""What goes on inside a VM, and what survives it: shutdown, reboot, consoles, ports, disks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path

import pytest

from polyvisor.errors import Busy, InvalidInput, NotFound
from polyvisor.host.api import HostApi
from polyvisor.operation import Step
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import Disk, OnReboot, VMSpec
from polyvisor.ssh import copy, execute
from polyvisor.status import VMState
from tests.contract.guest import BOOT_S, DISK, dialled, guest

pytestmark = [pytest.mark.qemu, pytest.mark.inside]


async def test_stop_shuts_the_guest_down_and_disks_are_kept(api: HostApi, spec: VMSpec) -> None:
    await api.run(dataclasses.replace(spec, disks=(Disk(size_gib=1),)))
    await guest(api, spec.name, f"echo kept | dd of={DISK} bs=512 conv=sync && sync")
    stopped = await api.stop(spec.name, timeout_s=60)
    assert stopped.state is VMState.STOPPED
    console = await _log(api, spec.name)
    last_words = ("reboot: Power down", "reboot: System halted", "The system is going down")
    assert any(words in console for words in last_words), "it was killed, not shut down"
    await api.start(spec.name)
    assert await guest(api, spec.name, f"head -c 4 {DISK}") == "kept"


async def test_stop_of_a_guest_that_does_not_listen_kills_it(api: HostApi, running: str) -> None:
    stopped = await api.stop(running, timeout_s=0.2)
    assert stopped.state is VMState.STOPPED


async def test_a_paused_vm_can_be_stopped(api: HostApi, booted: str) -> None:
    await api.pause(booted)
    assert (await api.stop(booted, timeout_s=60)).state is VMState.STOPPED


async def test_a_guest_that_listens_late_is_shut_down(api: HostApi, booted: str) -> None:
    """It may answer by SSH before there is a program that its power button wakes. Guests of Xen PV and PVH need none."""
    await guest(api, booted, "killall acpid && (sleep 2; acpid -l /dev/null) >/dev/null 2>&1 &")
    steps: list[Step] = []
    assert (await api.stop(booted, timeout_s=60, progress=steps.append)).state is VMState.STOPPED
    assert steps[-1].done is not None and steps[-1].done < 55, "it ended by itself"


async def test_poweroff_inside_the_guest_stops_the_vm(api: HostApi, booted: str) -> None:
    await guest(api, booted, "poweroff")
    await _until_state(api, booted, VMState.STOPPED)


async def test_reboot_inside_the_guest_keeps_console_ports_and_ssh(api: HostApi, booted: str) -> None:
    before = (await api.show(booted)).status
    first = await guest(api, booted, "cat /proc/sys/kernel/random/boot_id")
    reader, writer = await api.console(booted)
    await guest(api, booted, "reboot")
    heard = await _hear(reader, b"ready")
    writer.close()
    assert b"ready" in heard, "the console went on through the reboot"
    after = (await api.show(booted)).status
    assert (after.pid, after.forwards, after.state) == (before.pid, before.forwards, VMState.RUNNING)
    assert await guest(api, booted, "cat /proc/sys/kernel/random/boot_id") != first


async def test_the_verb_reboot_keeps_them_too(api: HostApi, booted: str) -> None:
    before = (await api.show(booted)).status
    boots = {await guest(api, booted, "cat /proc/sys/kernel/random/boot_id")}
    for force in (False, True):
        await api.reboot(booted, force=force, timeout_s=60)
        await asyncio.sleep(1)
        boots.add(await guest(api, booted, "cat /proc/sys/kernel/random/boot_id"))
    assert len(boots) == 3
    after = (await api.show(booted)).status
    assert (after.pid, after.forwards) == (before.pid, before.forwards)


async def test_on_reboot_stop(api: HostApi, spec: VMSpec) -> None:
    """A reboot inside the guest stops the VM; the verb starts it again all the same."""
    await api.run(dataclasses.replace(spec, on_reboot=OnReboot.STOP))
    first = await guest(api, spec.name, "cat /proc/sys/kernel/random/boot_id")
    assert (await api.reboot(spec.name, timeout_s=120)).state is VMState.RUNNING
    await asyncio.sleep(1)
    assert await guest(api, spec.name, "cat /proc/sys/kernel/random/boot_id") != first
    await guest(api, spec.name, "reboot")
    await _until_state(api, spec.name, VMState.STOPPED)


async def test_the_console_is_a_login(api: HostApi, booted: str) -> None:
    reader, writer = await api.console(booted)
    writer.write(b"\n")
    await _hear(reader, b"login:")
    writer.write(b"root\n")
    await _hear(reader, b"#")
    writer.write(b"echo $((6 * 7))\n")
    assert b"42" in await _hear(reader, b"42")
    writer.close()


async def test_the_console_has_one_user_at_a_time(api: HostApi, running: str) -> None:
    reader, writer = await api.console(running)
    with pytest.raises(Busy, match=running):
        await api.console(running)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    await asyncio.sleep(0.1)
    _, again = await api.console(running)
    again.close()
    del reader


async def test_logs_hold_what_the_console_said(api: HostApi, running: str) -> None:
    async with asyncio.timeout(BOOT_S):
        while "ready" not in await _log(api, running):
            await asyncio.sleep(0.5)


async def test_logs_can_be_followed_until_the_vm_ends(api: HostApi, booted: str) -> None:
    async def follow() -> bytes:
        return b"".join([chunk async for chunk in api.log(booted, follow=True)])

    following = asyncio.create_task(follow())
    await api.stop(booted, timeout_s=60)
    async with asyncio.timeout(60):
        assert len(await following) >= len((await _log(api, booted)).encode())


async def test_forwards_of_the_spec_and_of_a_running_vm(api: HostApi, booted: str) -> None:
    await guest(api, booted, "(while true; do echo hello | nc -l -p 7000; done) >/dev/null 2>&1 &")
    status = await api.add_forward(booted, Forward(host_port=0, guest_port=7000))
    assert await api.add_forward(booted, Forward(host_port=0, guest_port=7000)) == status
    port = next(f.host_port for f in status.forwards if f.guest_port == 7000)
    assert await _greeting(api, port) == b"hello\n"
    status = await api.remove_forward(booted, Forward(host_port=port, guest_port=7000))
    assert all(f.guest_port != 7000 for f in status.forwards)
    async with dialled(api, port) as nobody, asyncio.timeout(30):
        assert await nobody.read() == b""
    with pytest.raises(NotFound):
        await api.remove_forward(booted, Forward(host_port=port, guest_port=7000))


async def test_a_forward_of_any_port_is_removed_by_the_port_it_has(api: HostApi, running: str) -> None:
    """It does not come back, neither now nor at the next start; and it can be added again."""
    forward = Forward(host_port=0, guest_port=8000)
    port = next(f for f in (await api.add_forward(running, forward)).forwards if f.guest_port == 8000)
    await api.remove_forward(running, port)
    await api.kill(running)
    assert 8000 not in [f.guest_port for f in (await api.start(running)).forwards]
    assert 8000 in [f.guest_port for f in (await api.add_forward(running, forward)).forwards]


async def test_a_forward_lasts_beyond_a_stop(api: HostApi, running: str) -> None:
    await api.add_forward(running, Forward(host_port=0, guest_port=8000))
    await api.kill(running)
    assert 8000 in [f.guest_port for f in (await api.start(running)).forwards]


async def test_a_taken_port_is_refused(api: HostApi, running: str) -> None:
    taken = (await api.show(running)).status.forwards[0].host_port
    with pytest.raises(InvalidInput, match=str(taken)):
        await api.add_forward(running, Forward(host_port=taken, guest_port=9000))


async def test_ssh_uses_a_key_and_remembers_the_host(api: HostApi, booted: str) -> None:
    target = await api.ssh_target(booted)
    assert await guest(api, booted, "whoami") == target.user
    assert target.known_hosts.read_text().startswith(target.alias)


async def test_execute_passes_words_status_and_input(api: HostApi, booted: str) -> None:
    completed = await execute(
        api, booted, ["sh", "-c", 'cat; echo "$1|$2" >&2; exit 7', "sh", "a  b", "'"], stdin=b"in"
    )
    assert (completed.stdout, completed.stderr, completed.status) == ("in", "a  b|'\n", 7)


async def test_copy_both_ways(api: HostApi, booted: str, tmp_path: Path) -> None:
    source = tmp_path / "a file"
    source.write_bytes(bytes(range(256)) * 1000)
    await copy(api, [str(source)], f"{booted}:/tmp/there")
    await copy(api, [f"{booted}:/tmp/there"], str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


async def test_events_are_seen(api: HostApi, spec: VMSpec) -> None:
    seen: list[tuple[str, str]] = []

    async def watch() -> None:
        async for event in api.events():
            seen.append((event.vm, event.event))  # noqa: PERF401 - the events have no end

    async def until(name: str, event: str) -> None:
        while (name, event) not in seen:
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    first = dataclasses.replace(spec, name=f"{spec.name}-first")
    async with asyncio.timeout(BOOT_S):
        while not seen:  # what happens before the host is watched is not seen
            await api.create(first)
            await asyncio.sleep(1.2)
            await api.remove(first.name)
            await asyncio.sleep(1.2)
        await api.run(spec)
        await until(spec.name, "running")
        await api.pause(spec.name)
        await until(spec.name, "paused")
        await api.remove(spec.name, force=True)
        await until(spec.name, "removed")
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    # Between its making and its start, or its end and its removal, it may be seen as stopped.
    mine = [event for name, event in seen if name == spec.name and event != "stopped"]
    assert mine == ["created", "running", "paused", "removed"]


async def _log(api: HostApi, name: str) -> str:
    return b"".join([chunk async for chunk in api.log(name)]).decode(errors="replace")


async def _hear(reader: asyncio.StreamReader, word: bytes) -> bytes:
    """What the console says up to `word`."""
    heard = b""
    async with asyncio.timeout(BOOT_S):
        while word not in heard and (data := await reader.read(4096)):
            heard += data
    return heard


async def _greeting(api: HostApi, port: int) -> bytes:
    """The first line that the guest's server says; it may be a moment before that listens."""
    async with asyncio.timeout(60):
        while True:
            async with dialled(api, port) as reader:
                if line := await reader.readline():
                    return line
            await asyncio.sleep(0.2)


async def _until_state(api: HostApi, name: str, state: VMState) -> None:
    async with asyncio.timeout(BOOT_S):
        while (await api.show(name)).status.state is not state:
            await asyncio.sleep(0.2)
