"""The lab beside its real hosts (tests/lab has those): names that are taken, and what the command line says."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from polyvisor.cli.main import run
from polyvisor.errors import AlreadyExists, StorageFull, TimedOut
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.images.debian import recipe
from polyvisor.images.flavours import FLAVOURS
from polyvisor.images.image import Image, ImageFile, Seed
from polyvisor.lab.lab import Lab
from polyvisor.lab.plan import LABEL, Kind, lab_hosts, lab_spec
from polyvisor.remote.address import Entry
from polyvisor.spec.vm import VMSpec
from polyvisor.status import VMState, VMStatus
from tests.unit.disks import qemu_img

[KVM1] = lab_hosts(1, 0)
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("module", sorted(path.stem for path in (TESTS / "contract").glob("test_*.py")))
def test_the_whole_contract_is_tested_in_the_lab(module: str) -> None:
    assert f"from tests.contract.{module} import *" in (TESTS / "lab" / "test_kvm.py").read_text()


@pytest.fixture
def lab(host: Host, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("POLYVISOR_HOME", str(host.home.path))
    monkeypatch.delenv("POLYVISOR_HOST", raising=False)
    return Lab(host)


def like_a_host(**changes: object) -> VMSpec:
    """A VM as the lab's first KVM host is, but small."""
    return dataclasses.replace(lab_spec(KVM1, None, 2, None), image="tiny", **changes)  # type: ignore[arg-type]


async def test_a_vm_of_that_name_is_not_taken_for_a_host(lab: Lab) -> None:
    await lab.host.create(VMSpec(name="lab-kvm1", image="tiny"))
    with pytest.raises(AlreadyExists, match="VM 'lab-kvm1' already, with other settings") as caught:
        await lab.up([KVM1])
    assert "polyvisor rm --force lab-kvm1" in str(caught.value.hint)
    assert await lab.members() == []
    assert await lab.remove() == []
    assert await lab.host.names() == ["lab-kvm1"], "it is not the lab's to remove"


async def test_a_host_elsewhere_of_that_name_is_kept(lab: Lab) -> None:
    elsewhere = Entry(name="lab-kvm1", url="ssh://root@192.0.2.1", added_at=time.time())
    lab.hosts.add(elsewhere)
    with pytest.raises(AlreadyExists, match=r"ssh://root@192\.0\.2\.1"):
        await lab.up([KVM1])
    await lab.host.create(like_a_host())
    assert await lab.remove() == ["lab-kvm1"]
    assert lab.hosts.get("lab-kvm1") == elsewhere


@pytest.mark.parametrize("asked", [{"vcpus": 3}, {"memory_mib": 4000}, {"suite": "trixie"}])
async def test_other_settings_for_a_host_that_is_there(lab: Lab, asked: dict[str, int | str]) -> None:
    await lab.host.create(like_a_host())
    with pytest.raises(AlreadyExists, match="with other settings"):
        await lab.up([KVM1], **asked)  # type: ignore[arg-type]


async def test_a_host_whose_vm_was_removed_by_other_means_is_made_ready_anew(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as ready while its entry is there, and a new one of that name is not."""
    known_hosts = lab.host.home.path / "lab" / "lab-kvm1.known_hosts"
    lab.hosts.add(Entry(name="lab-kvm1", url="ssh://root@127.0.0.1:1", added_at=0.0, known_hosts=str(known_hosts)))
    asked = []

    async def run(spec: VMSpec, progress: object) -> None:
        asked.append(spec)
        raise StorageFull("no space")

    async def built(*_: object) -> None:
        pass

    monkeypatch.setattr(lab, "_image", built)
    monkeypatch.setattr(lab.host, "run", run)
    with pytest.raises(StorageFull):
        await lab.up([KVM1])
    assert [spec.name for spec in asked] == ["lab-kvm1"]
    assert lab.hosts.find("lab-kvm1") is None


@pytest.fixture
def bare(empty_home: Home, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A lab with an image store of its own."""
    monkeypatch.setenv("POLYVISOR_HOME", str(empty_home.path))
    monkeypatch.delenv("POLYVISOR_HOST", raising=False)
    return Lab(Host(empty_home))


async def test_a_host_made_by_another_recipe_is_shown_as_such(bare: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    today = recipe(FLAVOURS["lab-kvm"], "bookworm")
    for number, (of, outdated) in enumerate([(today, False), ("0123456789ab", True), (None, True)], 1):
        host = dataclasses.replace(KVM1, number=number)
        image = await _image(bare, f"recipe-{number}", of)
        spec = dataclasses.replace(lab_spec(host, None, 2, None), image=image.name)
        await bare.host.create(spec)
        assert bare.outdated(host) is outdated
        [shown] = [each for each in await bare.status() if each.name == host.name]
        assert ("lab rm lab-kvm" in (shown.reason or "")) is outdated
    await bare.remove([KVM1])
    assert [host.number for host, _ in await bare.members()] == [2, 3]
    assert await asyncio.to_thread(run, ["lab", "rm", "kvm3"]) == 0
    assert "lab-kvm3 is removed" in capsys.readouterr().out
    assert [host.number for host, _ in await bare.members()] == [2]


async def test_a_host_with_other_user_data_is_outdated(bare: Lab) -> None:
    image = await _image(bare, "recipe-1", recipe(FLAVOURS["lab-kvm"], "trixie"))
    spec = dataclasses.replace(lab_spec(KVM1, None, 2, None), image=image.name, user_data="#cloud-config\n{}\n")
    await bare.host.create(spec)
    assert bare.outdated(KVM1)


async def test_new_hosts_are_made_by_todays_recipe(bare: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    async def build(kind: str, progress: object, *, suite: str, name: str) -> None:
        built.append(name)
        await _image(bare, name, recipe(FLAVOURS[kind], suite))

    async def run(spec: VMSpec, progress: object) -> None:
        raise StorageFull("no space")

    monkeypatch.setattr(bare.host, "image_build", build)
    monkeypatch.setattr(bare.host, "run", run)
    await _image(bare, "lab-kvm", "0123456789ab")
    for _ in range(2):
        with pytest.raises(StorageFull):
            await bare.up([KVM1])
    assert built == ["lab-kvm"], "once: the image of today is kept"


async def _image(lab: Lab, name: str, by: str | None) -> Image:
    """An image that a lab host could stand on, made by recipe `by`."""
    store = lab.host.images.store
    with store.staging() as staging:
        qemu_img("create", "-f", "qcow2", staging / "disk.qcow2", "1M")
        disk = ImageFile(name="disk.qcow2", sha256="", size=0)
        described = Image(id="", name=name, created_at=0.0, source="test", disk=disk, disk_size_mib=1)
        boots = dataclasses.replace(described, firmware=("bios",), seed=Seed.NOCLOUD, recipe=by)
        return await asyncio.to_thread(store.add, staging, boots)


async def test_members_are_the_vms_with_the_label(lab: Lab) -> None:
    await lab.host.create(like_a_host())
    await lab.host.create(VMSpec(name="mine", image="tiny", labels={LABEL: "kvm"}))
    await lab.host.create(VMSpec(name="other", image="tiny", labels={LABEL: "vmware"}))
    [(host, status)] = await lab.members()
    assert (host, status.state) == (KVM1, VMState.STOPPED)
    [shown] = await lab.status()
    assert (shown.name, shown.kind, shown.address, shown.url) == ("lab-kvm1", Kind.KVM, "10.77.1.1", None)
    assert await lab.down() == [shown], "what does not run is left as it is"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["lab", "up", "--kvm", "0", "--xen", "0"], 2, "kvm: 0: and xen: 0 leave the lab without a host"),
        (["lab", "up", "--xen", "99"], 2, "xen: 99: is out of range (use 0 to 9)"),
        (["lab", "up", "--suite", "sarge"], 2, "suite: 'sarge': is not known (use bookworm or trixie)"),
        (["lab", "up", "--memory", "much"], 2, "memory: 'much'"),
        (["lab", "ssh", "kvm7"], 3, "the lab has no host 'kvm7' (make one: polyvisor lab up)"),
        (["lab", "status", "--host", "root@192.0.2.1"], 8, "a lab is run by the machine that it is on"),
        (["lab", "status"], 0, "there is no lab yet; make one: polyvisor lab up"),
        (["lab"], 0, "there is no lab yet; make one: polyvisor lab up"),
    ],
)
def test_what_the_command_line_says(
    lab: Lab, capsys: pytest.CaptureFixture[str], words: list[str], status: int, said: str
) -> None:
    assert run(words) == status
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_lab_that_is_not_there_as_json(
    empty_home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYVISOR_HOME", str(empty_home.path))
    for verb in ("status", "down", "rm"):
        assert run(["lab", verb, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == []


async def test_one_command_at_a_time(lab: Lab) -> None:
    """Whoever comes second says so, waits, and sees what the first has done."""
    await lab.host.create(like_a_host())
    (lab.host.home.path / "lab").mkdir(mode=0o700)
    fd = os.open(lab.host.home.path / "lab", os.O_RDONLY)
    said: list[str] = []
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        waiting = asyncio.ensure_future(lab.down(progress=lambda step: said.append(step.phase)))
        while not said:
            await asyncio.sleep(0.01)
        await lab.host.remove("lab-kvm1")
        assert not waiting.done()
    finally:
        os.close(fd)
    assert said == ["waiting for another command on the lab"]
    assert await waiting == []


async def test_a_host_whose_save_was_cut_off_goes_on(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still then, and nobody would come to its SSH server."""
    status = await lab.host.create(like_a_host())
    resumed = []

    async def start(*_: object) -> VMStatus:
        return dataclasses.replace(status, state=VMState.PAUSED)

    async def resume(name: str) -> VMStatus:
        resumed.append(name)
        return status

    async def wait_for_ssh(*_: object, **__: object) -> None:
        raise TimedOut("far enough")

    for verb in (start, resume, wait_for_ssh):
        monkeypatch.setattr(lab.host, verb.__name__, verb)
    with pytest.raises(TimedOut, match="far enough"):
        await lab.up([KVM1])
    assert resumed == ["lab-kvm1"]
