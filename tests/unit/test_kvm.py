"""Choosing KVM by proof: the real device of this machine, the probe guest under emulation, and made-up machines."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from polyvisor.drivers.qemu import kvm, kvm_probe
from polyvisor.drivers.qemu.kvm import check_kvm, prove_kvm
from polyvisor.status import CheckResult

KVM = Path("/dev/kvm")
CPUINFO = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu vme {}\n\nprocessor\t: 1\nflags\t\t: fpu vme {}\n"
INTEL, AMD, NONE, GUEST = "lm vmx", "svm lm", "lm", "lm hypervisor"


def cpuinfo(path: Path, flags: str) -> Path:
    file = path / "cpuinfo"
    file.write_text(CPUINFO.format(flags, flags))
    return file


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (INTEL, "modprobe kvm_intel"),
        (AMD, "modprobe kvm_amd"),
        (NONE, "no vmx or svm flag); switch virtualization (VT-x, AMD-V, SVM) on"),
        (GUEST, "nested virtualization"),
        ("vmxoff nosvm", "no vmx or svm flag"),
    ],
)
def test_a_missing_device_is_explained_by_the_cpu(tmp_path: Path, flags: str, reason: str) -> None:
    found = prove_kvm(tmp_path / "kvm", cpuinfo(tmp_path, flags))
    assert not found.available
    assert found.name == "kvm"
    assert reason in found.reason
    assert str(tmp_path / "kvm") in found.reason
    assert "\n" not in found.reason


def test_a_file_that_is_no_kvm_is_told_apart(tmp_path: Path) -> None:
    found = prove_kvm(Path("/dev/null"), cpuinfo(tmp_path, INTEL))
    assert not found.available
    assert "/dev/null is not KVM" in found.reason


def test_another_api_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.ioctl", lambda *_: 11)
    assert "version 11" in prove_kvm(Path("/dev/null"), cpuinfo(tmp_path, INTEL)).reason


def test_a_device_that_may_not_be_opened_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refused)
    check = check_kvm(tmp_path / "kvm", cpuinfo(tmp_path, INTEL))
    assert check.result is CheckResult.WARNING
    assert check.remedy is not None
    assert check.remedy.startswith("run: sudo usermod -aG kvm ")
    in_vain = check_kvm(tmp_path / "kvm", cpuinfo(tmp_path, GUEST))
    assert "no vmx or svm flag" in in_vain.detail
    assert "usermod" not in str(in_vain.remedy)


def test_no_cpuinfo_means_no_proof(tmp_path: Path) -> None:
    assert not prove_kvm(tmp_path / "kvm", tmp_path / "absent").available


def test_the_verdict_of_this_machine_is_quick_where_the_cpu_has_no_flag(tmp_path: Path) -> None:
    took = []
    for _ in range(5):
        start = time.perf_counter()
        found = prove_kvm(KVM, cpuinfo(tmp_path, GUEST))
        took.append(time.perf_counter() - start)
    assert not found.available
    assert min(took) < 0.005


def test_this_machine_gets_kvm_exactly_where_the_probe_guest_runs() -> None:
    """Here and anywhere: the verdict must not contradict what a guest experiences."""
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    found = prove_kvm()
    if not os.access(KVM, os.R_OK | os.W_OK):
        assert not found.available
    elif not {"vmx", "svm"} & set(flags):
        assert not found.available
        assert "no vmx or svm flag" in found.reason
        with pytest.raises(kvm_probe.ProbeFailed):  # the proof that does not need the flag agrees
            kvm_probe.run_probe(KVM)
    else:
        assert found.available == ("a probe guest ran" in found.reason)


def test_a_device_that_makes_no_vm_fails_the_probe() -> None:
    with pytest.raises(kvm_probe.ProbeFailed, match="refuses a probe guest"):
        kvm_probe.run_probe(Path("/dev/null"))


def test_a_probe_that_hangs_is_ended_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object) -> str:
        time.sleep(60)
        return "ok"

    monkeypatch.setattr(kvm_probe, "_outcome", hang)
    monkeypatch.setattr(kvm_probe, "TIME_LIMIT_S", 0.1)
    start = time.perf_counter()
    with pytest.raises(kvm_probe.ProbeFailed, match="did not end within"):
        kvm_probe.run_probe(KVM)
    assert time.perf_counter() - start < 5


def test_a_probe_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm_probe, "_outcome", lambda *_: os._exit(1))
    with pytest.raises(kvm_probe.ProbeFailed, match="died"):
        kvm_probe.run_probe(KVM)


def test_a_guest_that_runs_is_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kvm_probe, "_run", lambda *_: iter([b"RL", b"\x02C"]))
    monkeypatch.setattr("fcntl.ioctl", lambda *_: 12)
    found = prove_kvm(Path("/dev/null"), cpuinfo(tmp_path, AMD))
    assert found.available
    assert "a probe guest ran on the CPU's svm" in found.reason


def test_a_guest_that_miscalculates_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kvm_probe, "_run", lambda *_: iter([b"RL", b"\x03C"]))
    monkeypatch.setattr("fcntl.ioctl", lambda *_: 12)
    found = prove_kvm(Path("/dev/null"), cpuinfo(tmp_path, AMD))
    assert not found.available
    assert "calculated wrongly" in found.reason


@pytest.mark.qemu
def test_the_probe_guest_runs_on_an_emulated_pc(tmp_path: Path) -> None:
    """The guest's code is right: an emulator that is complete runs it to its end."""
    bios = tmp_path / "probe.bin"
    bios.write_bytes(kvm_probe.firmware())
    argv = ["qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-nodefaults", "-display", "none", "-bios", str(bios)]
    argv += ["-chardev", "stdio,id=out", "-device", f"isa-debugcon,iobase={kvm_probe.PORT:#x},chardev=out"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as qemu:
        assert qemu.stdout is not None
        try:
            assert qemu.stdout.read(len(kvm_probe.EXPECTED_OUTPUT)) == kvm_probe.EXPECTED_OUTPUT
        finally:
            qemu.kill()


@pytest.mark.parametrize(
    ("value", "refusal"), [("Y", None), ("1", None), ("N", "nested=1"), ("0", "modprobe -r kvm_amd")]
)
def test_whether_kvm_nests_is_what_its_module_says(tmp_path: Path, value: str, refusal: str | None) -> None:
    parameter = tmp_path / "kvm_amd/parameters/nested"
    parameter.parent.mkdir(parents=True)
    parameter.write_text(f"{value}\n")
    said = kvm.nested_refusal(tmp_path)
    assert said is None if refusal is None else refusal in str(said)


def test_a_kvm_that_says_nothing_of_nesting_is_not_trusted_to(tmp_path: Path) -> None:
    assert "does not say" in str(kvm.nested_refusal(tmp_path))
