"""`polyvisor doctor`: what is missing is named, with the command that mends it."""

import json
import os
from pathlib import Path

import pytest

from polyvisor import process
from polyvisor.cli.main import run
from polyvisor.drivers.qemu import programs
from polyvisor.errors import NotPermitted
from polyvisor.home import Home
from polyvisor.host import doctor
from polyvisor.host.doctor import check_host
from polyvisor.status import Check, CheckResult


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.delenv("POLYVISOR_QEMU", raising=False)
    monkeypatch.setattr(programs, "from_wheel", lambda _: None)
    return Home(tmp_path / "home")


async def checks(home: Home) -> dict[str, Check]:
    return {check.name: check for check in await check_host(home)}


async def test_every_check_has_a_verdict_on_one_line_and_a_remedy_where_it_is_not_well(home: Home) -> None:
    found = await check_host(home)
    assert len({check.name for check in found}) == len(found)
    for check in found:
        assert check.detail.isprintable()
        if check.result is not CheckResult.OK and check.name != "kvm":
            assert check.remedy


async def test_a_machine_with_nothing(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(process.find_program, "__kwdefaults__", {"also": ()})
    monkeypatch.setattr(programs, "UEFI_FILES", ())
    found = await checks(home)
    assert found["qemu"].result is CheckResult.MISSING
    assert "apt-get install qemu-system-x86" in (found["qemu"].remedy or "")
    assert "polyvisor host prepare kvm" in (found["qemu"].remedy or "")
    for name, package in (
        ("qemu-img", "qemu-utils"),
        ("ssh", "openssh-client"),
        ("ssh-keygen", "openssh-client"),
        ("gpgv", "gpgv"),
        ("mmdebstrap", "mmdebstrap"),
        ("uefi", "ovmf"),
    ):
        assert found[name].result is CheckResult.WARNING
        assert f"apt-get install {package}" in (found[name].remedy or "")
    assert found["python"].result is CheckResult.OK


async def test_a_xen_host_without_its_tools(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "xen" not in await checks(home) or Path("/proc/xen/capabilities").exists()
    monkeypatch.setattr(doctor, "_is_dom0", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(process.find_program, "__kwdefaults__", {"also": ()})
    found = await checks(home)
    assert (found["xen"].result, found["xen"].remedy) == (CheckResult.WARNING, "polyvisor host prepare xen")
    for name in ("qemu", "kvm"):
        assert found[name].result is CheckResult.WARNING, "its VMs need neither"
        assert "host prepare kvm" not in (found[name].remedy or "")


@pytest.mark.parametrize(
    ("remedy", "points"), [("run: sudo modprobe kvm_amd", True), ("switch it on in the BIOS", False), (None, False)]
)
async def test_kvm_that_could_be_set_up(
    home: Home, monkeypatch: pytest.MonkeyPatch, remedy: str | None, points: bool
) -> None:
    check = Check(name="kvm", result=CheckResult.WARNING, detail="d", remedy=remedy)
    monkeypatch.setattr(doctor, "check_kvm", lambda: check)
    assert ("polyvisor host prepare kvm" in ((await checks(home))["kvm"].remedy or "")) is points


async def test_a_home_that_others_cant_pass(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.prepare()
    home.path.chmod(0o700)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    blocked = next(p for p in (*reversed(home.path.parents), home.path) if not p.stat().st_mode & 0o001)
    found = await checks(home)
    assert found["home"].result is CheckResult.MISSING
    assert found["home"].remedy == f"chmod o+x {blocked}"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert (await checks(home))["home"].result is CheckResult.OK


async def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = (await checks(Home(tmp_path / "file")))["home"]
    assert check.result is CheckResult.MISSING
    assert "preparing" in check.detail


async def test_a_home_without_rights(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Home) -> None:
        raise NotPermitted("preparing /x: Permission denied", hint="check who owns it, or set POLYVISOR_HOME")

    monkeypatch.setattr(Home, "prepare", refused)
    check = (await checks(home))["home"]
    assert check.result is CheckResult.MISSING
    assert check.remedy == "check who owns it, or set POLYVISOR_HOME"
    monkeypatch.undo()
    home.prepare()
    monkeypatch.setattr(os, "access", lambda *_: False)
    check = (await checks(home))["home"]
    assert "is not writable" in check.detail


@pytest.mark.parametrize(("free_mib", "result"), [(2048, CheckResult.OK), (2047, CheckResult.WARNING)])
async def test_little_storage(home: Home, monkeypatch: pytest.MonkeyPatch, free_mib: int, result: CheckResult) -> None:
    class Status:
        f_bavail = free_mib
        f_frsize = 1 << 20

    monkeypatch.setattr(os, "statvfs", lambda _: Status)
    assert doctor._storage(home).result is result


@pytest.mark.parametrize(
    ("results", "status"),
    [(["ok"], 0), (["ok", "warning"], 0), (["ok", "missing", "warning"], 1)],
)
def test_the_exit_status_says_whether_something_is_missing(
    results: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async def made_up(home: Home) -> list[Check]:
        return [
            Check(name=f"c{i}", result=CheckResult(r), detail="d", remedy=f"mend {i}") for i, r in enumerate(results)
        ]

    monkeypatch.setenv("POLYVISOR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(doctor, "check_host", made_up)
    assert run(["doctor"]) == status
    out = capsys.readouterr().out
    assert [f"mend {i}" in out for i in range(len(results))] == [r != "ok" for r in results]
    assert run(["doctor", "--json"]) == status
    assert [check["result"] for check in json.loads(capsys.readouterr().out)] == results
