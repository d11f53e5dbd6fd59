"""QEMU is killed, hangs, or dies at its start: what is shown tells why, and every verb comes to an end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from polyvisor.status import VMState
from tests.faults.command import Polyvisor, assert_nothing_left, listing, qemus

pytestmark = pytest.mark.qemu

# inspect waits 3 s for an answer; the rest is for a machine that is busy.
LOOK_S = 10.0
# A kill waits for QMP (1 s), for SIGTERM (2 s), and then it is SIGKILL's turn.
KILL_S = 10.0


@pytest.fixture
def vm(polyvisor: Polyvisor) -> str:
    """The name of a VM that runs."""
    polyvisor.good("run", "still", "--name", "vm", "--disk", "1G")
    return "vm"


def qemu_io(polyvisor: Polyvisor, command: str) -> str:
    disk = polyvisor.home / "vms/vm/disks/disk0.qcow2"
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", command, str(disk)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    return done.stdout


def wait_until_gone(pid: int) -> None:
    """Wait until a process has no files any more; who started it may never ask how it ended."""
    deadline = time.monotonic() + 10
    with contextlib.suppress(OSError):
        while any(Path(f"/proc/{pid}/fd").iterdir()):
            assert time.monotonic() < deadline, f"process {pid} does not end"
            time.sleep(0.01)


def test_killed(polyvisor: Polyvisor, vm: str) -> None:
    """It shows as crashed, with the reason, and starts again with its disk, port and address as they were."""
    polyvisor.good("kill", vm)
    qemu_io(polyvisor, "write -q -P 0x77 0 64k")
    polyvisor.good("start", vm)
    before = polyvisor.good("show", vm, "--json").json()
    os.kill(before["status"]["pid"], signal.SIGKILL)
    wait_until_gone(before["status"]["pid"])
    [status] = polyvisor.good("ls", "--json").json()
    assert status["state"] == "crashed"
    assert "killed" in status["reason"]
    assert "killed" in polyvisor.good("ls").out
    for words in (("pause", vm), ("resume", vm), ("save", vm), ("reboot", vm), ("console", vm), ("ssh", vm, "true")):
        assert "crashed" in polyvisor(*words).error_line()
    after = polyvisor.good("start", vm, "--json").json()[0]
    assert after["state"] == "running"
    assert after["forwards"] == before["status"]["forwards"]
    polyvisor.good("kill", vm)
    assert "Pattern verification failed" not in qemu_io(polyvisor, "read -P 0x77 0 64k")
    polyvisor.good("rm", vm)
    assert_nothing_left(polyvisor.home)


def test_crashed_is_removed_and_run_again(polyvisor: Polyvisor, vm: str) -> None:
    pid = polyvisor.pid(vm)
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)
    assert polyvisor.good("run", "still", "--name", vm, "--disk", "1G", "--json").json()["state"] == "running"
    pid = polyvisor.pid(vm)
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)
    polyvisor.good("rm", vm)
    assert_nothing_left(polyvisor.home)


def test_killed_while_a_command_waits(polyvisor: Polyvisor, vm: str) -> None:
    """A `stop` that waits for the guest sees that there is none any more."""
    process = polyvisor.start("stop", vm)
    time.sleep(0.5)
    [pid] = qemus(polyvisor.home)
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=LOOK_S)
    assert process.returncode == 0, err
    assert polyvisor.states()[vm] in ("crashed", "stopped")


@pytest.mark.parametrize("verb", [("stop",), ("rm", "--force")])
def test_stopped_process(polyvisor: Polyvisor, vm: str, verb: tuple[str, ...]) -> None:
    """A QEMU that hangs shows as unresponsive within seconds, holds up nobody else, and can be ended."""
    polyvisor.good("create", "tiny", "--name", "other")
    os.kill(polyvisor.pid(vm), signal.SIGSTOP)
    began = time.monotonic()
    statuses = {status["name"]: status for status in polyvisor.good("ls", "--json").json()}
    assert time.monotonic() - began < LOOK_S
    assert statuses[vm]["state"] == "unresponsive" and statuses[vm]["reason"]
    assert statuses["other"]["state"] == "stopped"
    if verb == ("stop",):
        assert polyvisor.good("start", vm, "--json").json()[0]["state"] == "unresponsive"
    began = time.monotonic()
    polyvisor.good(verb[0], vm, *verb[1:])
    assert time.monotonic() - began < KILL_S
    assert qemus(polyvisor.home) == []
    polyvisor.good("rm", "--force", vm, "other")
    assert_nothing_left(polyvisor.home)


def runs_qemu(pid: int) -> bool:
    """Whether the process is QEMU by now, rather than the fork that is about to become it."""
    try:
        return "qemu" in Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return False


def test_stopped_before_its_pid_file(polyvisor: Polyvisor) -> None:
    """Cut off so early that neither pid file nor socket was made, QEMU is found by the lock that it holds."""
    polyvisor.good("create", "tiny", "--name", "vm")
    process = polyvisor.start("start", "vm")
    while not (found := [pid for pid in qemus(polyvisor.home) if runs_qemu(pid)]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    os.kill(found[0], signal.SIGSTOP)
    process.kill()
    process.communicate()
    pid_file = polyvisor.home / "vms/vm/run/qemu.pid"
    pid_file.unlink(missing_ok=True)
    for socket in (polyvisor.home / "vms/vm/run").glob("*.sock"):
        socket.unlink()
    assert polyvisor.states() == {"vm": "unresponsive"}
    began = time.monotonic()
    polyvisor.good("rm", "--force", "vm")
    assert time.monotonic() - began < KILL_S
    assert_nothing_left(polyvisor.home)


def test_dies_at_its_start(polyvisor: Polyvisor) -> None:
    """QEMU's own words, in one line, and nothing left; a VM that was there before stays."""
    before = listing(polyvisor.home)
    line = polyvisor("run", "tiny", "--name", "vm", "--cpu", "no-such-cpu").error_line()
    assert "unable to find CPU model 'no-such-cpu'" in line
    assert all(name.startswith("keys/") for name in listing(polyvisor.home).keys() - before.keys())
    assert_nothing_left(polyvisor.home)
    polyvisor.good("create", "tiny", "--name", "vm", "--cpu", "no-such-cpu")
    assert "unable to find CPU model" in polyvisor("start", "vm").error_line()
    [status] = polyvisor.good("ls", "--json").json()
    assert status["state"] in ("stopped", "crashed")
    polyvisor.good("rm", "vm")
    assert_nothing_left(polyvisor.home)


SILENT = r"""#!/usr/bin/env python3
import json, os, signal, socket, sys, time
if "--version" in sys.argv:
    print("QEMU emulator version 9.9.9")
    sys.exit()
mode = os.path.basename(sys.argv[0])
if mode == "dies":
    sys.exit("qemu: \x1b[31mkaboom\x1b[0m: disk on fire")
if mode == "dies-silently":
    sys.exit(1)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("run/qemu.pid", "w").write(str(os.getpid()))
servers = []
for name in ("qmp", "observe"):
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"run/{name}.sock")
    server.listen(8)
    servers.append(server)
for server in servers:
    if os.fork() == 0:
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                break
        version = {"qemu": {"major": 9, "minor": 9, "micro": 9}, "package": ""}
        client.sendall(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\r\n")
        client.recv(4096)
        client.sendall(b'{"return": {}, "id": "__qmp#00000"}\r\n')
        if mode == "talks-nonsense":
            client.recv(4096)
            client.sendall(b'{"return": ["nonsense"], "id": "__qmp#00001"}\r\n')
        time.sleep(1000)
time.sleep(1000)
"""


def fake_qemu(home: Path, mode: str) -> dict[str, str]:
    """The environment in which QEMU is a program that behaves as `mode` says."""
    path = home.parent / mode
    path.write_text(SILENT)
    path.chmod(0o755)
    return {"POLYVISOR_QEMU": str(path)}


@pytest.mark.parametrize("mode", ["falls-silent", "talks-nonsense", "stubborn"])
def test_hangs_after_its_greeting(polyvisor: Polyvisor, mode: str) -> None:
    """A process that greets on QMP and then answers no more, or nonsense: no verb waits for ever."""
    env = fake_qemu(polyvisor.home, mode)
    began = time.monotonic()
    done = polyvisor("run", "tiny", "--name", "vm", env=env)
    assert done.ok, done
    assert polyvisor.states() == {"vm": VMState.UNRESPONSIVE.value}
    assert time.monotonic() - began < 2 * LOOK_S
    began = time.monotonic()
    polyvisor.good("rm", "--force", "vm")
    assert time.monotonic() - began < KILL_S
    assert_nothing_left(polyvisor.home)


@pytest.mark.parametrize("mode", ["dies", "dies-silently"])
def test_fake_dies_at_its_start(polyvisor: Polyvisor, mode: str) -> None:
    line = polyvisor("run", "tiny", "--name", "vm", env=fake_qemu(polyvisor.home, mode)).error_line()
    assert mode != "dies" or "disk on fire" in line
    assert_nothing_left(polyvisor.home)
