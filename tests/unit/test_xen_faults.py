"""Each verb of a VM of Xen where a call of `xl` fails, or hangs: a clear error, nothing changed; afterwards it works."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.drivers.base import Observed
from polyvisor.drivers.xen import disks, dom0, driver, resize, xenctrl, xl
from polyvisor.errors import CannotStart, ProcessFailed, TimedOut
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.host.store import VMDirectory
from polyvisor.operation import Progress
from polyvisor.spec.resources import Resources
from polyvisor.spec.vm import OnReboot
from polyvisor.status import VMState, VMStatus
from tests.golden.xl_boots import XL_BOOTS
from tests.thorough import usually
from tests.unit.xen_host import DRIVER, domains, made, start, until_ended

GROWN = Resources(vcpus=1, vcpus_max=4, memory_mib=128, memory_max_mib=512)
PATIENCE_S = 1.5
Verb = Callable[[VMDirectory], Awaitable[object]]
VERBS: dict[str, tuple[Verb, VMState]] = {
    "shutdown": (DRIVER.shutdown, VMState.RUNNING),
    "reboot": (lambda vm: DRIVER.reboot(vm, 10), VMState.RUNNING),
    "reset": (DRIVER.reset, VMState.RUNNING),
    "pause": (DRIVER.pause, VMState.RUNNING),
    "resume": (DRIVER.resume, VMState.PAUSED),
    "kill": (DRIVER.kill, VMState.RUNNING),
    "usage": (DRIVER.usage, VMState.RUNNING),
    "vcpus": (lambda vm: DRIVER.set_vcpus(vm, 2), VMState.RUNNING),
    "memory": (lambda vm: DRIVER.set_memory(vm, 300), VMState.RUNNING),
    "shares": (lambda vm: DRIVER.set_scheduling(vm, replace(GROWN, cpu_weight=200)), VMState.RUNNING),
}
CALLS = {
    "shutdown": ("list", "shutdown"),
    "reboot": ("list", "reboot"),
    "reset": ("list",),
    "pause": ("list", "pause"),
    "resume": ("list", "unpause"),
    "kill": ("list", "destroy"),
    "usage": ("list",),
    "vcpus": ("list", "vcpu-set", "config-update"),
    "memory": ("list", "mem-set", "config-update"),
    "shares": ("list", "sched-credit2", "vcpu-pin", "config-update"),
}
# Each call fails; those that hang take seconds, so that of each kind of call one does by default.
USUAL = {(verb, call, "") for verb, calls in CALLS.items() for call in calls} | {
    (verb, call, "hangs ")
    for verb, call in (("shutdown", "shutdown"), ("reboot", "list"), ("kill", "destroy"), ("vcpus", "config-update"))
}


@pytest.fixture
async def web(vm: VMDirectory, xen: Path, monkeypatch: pytest.MonkeyPatch) -> VMDirectory:
    """A VM that runs, with room to grow, and whose waits are short."""

    def press(domain: int) -> None:
        uuid, _, name = (xen / str(domain)).read_text().split()
        (xen / str(domain)).write_text(f"{uuid} 1 {name}")

    monkeypatch.setattr(xenctrl, "shut_down", press)
    monkeypatch.setattr(xl, "ANSWER_S", PATIENCE_S)
    monkeypatch.setattr(driver, "KILL_S", 3 * PATIENCE_S)
    monkeypatch.setattr(resize, "PATIENCE_S", PATIENCE_S)
    await start(vm, vcpus_max=4, memory_max_mib=512)
    launch = vm.launch()
    assert launch is not None
    vm.write_launch(replace(launch, resources=GROWN))
    return vm


@pytest.mark.parametrize(
    ("verb", "call", "how"),
    usually([(verb, call, how) for verb, calls in CALLS.items() for call in calls for how in ("", "hangs ")], USUAL),
)
async def test_a_call_that_fails_or_hangs(web: VMDirectory, xen: Path, verb: str, call: str, how: str) -> None:
    act, before = VERBS[verb]
    if before is VMState.PAUSED:
        await DRIVER.pause(web)
    began = time.monotonic()
    (xen / "broken").write_text(how + call)
    with pytest.raises((ProcessFailed, TimedOut)) as raised:
        await act(web)
    assert time.monotonic() - began < 20 * PATIENCE_S
    assert not how or isinstance(raised.value, TimedOut)
    assert raised.value.message.isprintable()
    seen = await DRIVER.inspect(web)
    assert seen.state is (VMState.UNRESPONSIVE if call == "list" else before), seen
    (xen / "broken").unlink()
    assert (await DRIVER.inspect(web)).state is before
    assert len(domains(xen)) == 1 and web.alive()
    await act(web)
    if verb in ("shutdown", "kill"):
        assert (await until_ended(web)).state is VMState.STOPPED
    await DRIVER.kill(web)
    assert domains(xen) == []


@pytest.mark.parametrize("broken", ["info", "list", "create", "half", "hangs info", "hangs list", "hangs create"])
async def test_a_start_that_fails_or_hangs_leaves_nothing(
    vm: VMDirectory, xen: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(xl, "ANSWER_S", PATIENCE_S)
    monkeypatch.setattr(driver, "START_S", PATIENCE_S)
    monkeypatch.setattr(DRIVER, "_version", None)
    (xen / "broken").write_text(broken)
    if broken.endswith("list"):  # a first start has nothing to look for
        assert (await start(vm)).state is VMState.RUNNING
        (xen / "broken").unlink()
        await DRIVER.kill(vm)
    else:
        with pytest.raises((ProcessFailed, TimedOut, CannotStart)):
            await start(vm)
        (xen / "broken").unlink()
    assert domains(xen) == [] and not vm.alive()
    assert (await DRIVER.inspect(vm)).state is VMState.STOPPED
    assert (await start(vm)).state is VMState.RUNNING
    await DRIVER.kill(vm)


BACKENDS = """\
/local/domain/0/backend/qdisk/1/51712/frontend = "/local/domain/1/device/vbd/51712"
/local/domain/0/backend/qdisk/1/51712/state = "{first}"
/local/domain/0/backend/qdisk/1/51712/dev = "xvda"
/local/domain/0/backend/qdisk/1/51728/params = "qcow2:/state = "1""
/local/domain/0/backend/qdisk/1/51728/dev = "xvdb"
/local/domain/0/backend/qdisk/1/51728/state = "{second}"
"""
SAID = "qemu-system-i386: failed to create 'qdisk' device '51728': failed to create drive: unsupported"


@pytest.mark.parametrize(
    ("first", "second", "missing"),
    [("2", "4", []), ("1", "2", ["xvda"]), ("4", "1", ["xvdb"]), ("1", "1", ["xvda", "xvdb"]), ("6", "2", [])],
)
def test_disks_that_nobody_serves(first: str, second: str, missing: list[str]) -> None:
    assert disks.unserved(BACKENDS.format(first=first, second=second)) == missing


async def test_a_guest_without_its_disk_has_not_started(
    vm: VMDirectory, xen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xl is content with it: QEMU's words are in a log of its own."""
    monkeypatch.setattr(disks, "OPENED_S", 0.3)
    monkeypatch.setattr(disks, "_LOGS", tmp_path)
    (tmp_path / "qemu-dm-web.log").write_text(f"char device redirected\n{SAID}\n")
    (xen / "backends").write_text(BACKENDS.format(first="2", second="1"))
    with pytest.raises(CannotStart, match=r"does not serve the disk xvdb: .*failed to create drive"):
        await start(vm, disks=XL_BOOTS["pv-disks"].disks)
    assert domains(xen) == [] and not vm.alive()
    assert await DRIVER.inspect(vm) == Observed(state=VMState.STOPPED)
    (xen / "backends").write_text(BACKENDS.format(first="2", second="2"))
    assert (await start(vm, disks=XL_BOOTS["pv-disks"].disks)).state is VMState.RUNNING
    await DRIVER.kill(vm)


async def test_a_guest_that_stops_where_it_reboots(xen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb stops it and starts it; one that does not listen runs on, and with force is not asked."""
    monkeypatch.setattr(dom0, "is_dom0", lambda: True)
    home = Home(tmp_path / "home")
    home.prepare()
    host = Host(home)
    vm = made(home.vms / "web")
    vm.write_record(replace(vm.record, spec=replace(vm.record.spec, on_reboot=OnReboot.STOP)))
    vm = VMDirectory(vm.path)
    await start(vm, on_reboot=OnReboot.STOP)
    starts = []

    async def again(self: Host, vm: VMDirectory, progress: Progress, *, fresh: bool = False) -> VMStatus:
        assert domains(xen) == [] and not vm.alive()
        starts.append(await start(vm, on_reboot=OnReboot.STOP))
        return await self._status(vm)

    monkeypatch.setattr(Host, "_start", again)
    assert (await host.reboot("web", timeout_s=10)).state is VMState.RUNNING
    assert (len(starts), domains(xen)) == (1, ["2"])
    (xen / "deaf").touch()
    with pytest.raises(TimedOut, match="did not shut down"):
        await host.reboot("web", timeout_s=0.5)
    assert (len(starts), domains(xen)) == (1, ["2"])
    assert (await host.reboot("web", force=True)).state is VMState.RUNNING
    assert (len(starts), domains(xen)) == (2, ["3"])
    await host.kill("web")
