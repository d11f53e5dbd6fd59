"""Whether KVM works on this machine: decided by proof, not by the existence of /dev/kvm.

The device can be there, answer, and still run no Linux guest: in sandboxes and on hosts whose own hypervisor offers
no nested virtualization. So the checks go from cheap to certain: the device, the right to open it, its version, the
CPU's flag, and last a probe guest (`kvm_probe`) that has to come to its end. docs/design/choosing-kvm.md has the
measurements behind this.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from polyvisor.status import Accelerator, Check, CheckResult
from polyvisor.values import dataclass

DEVICE = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")
MODULES = Path("/sys/module")

# Documentation/virt/kvm/api.rst, 4.1: applications should refuse to run on any other version.
_KVM_GET_API_VERSION = 0xAE00
_API_VERSION = 12
_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}


@dataclass(frozen=True)
class _Verdict:
    """`reason` says why KVM works or not; `remedy` is what the person at this machine can do about it."""

    works: bool
    reason: str
    remedy: str | None = None


def prove_kvm(device: Path = DEVICE, cpuinfo: Path = CPUINFO) -> Accelerator:
    """Whether KVM runs guests here, and why or why not. Never raises.

    Without the CPU's flag this takes well under a millisecond; with it, a few milliseconds for the probe guest, and at
    most `kvm_probe.TIME_LIMIT_S` where that hangs.
    """
    verdict = _examine(device, cpuinfo)
    reason = f"{verdict.reason}; {verdict.remedy}" if verdict.remedy else verdict.reason
    return Accelerator(name="kvm", available=verdict.works, reason=reason)


def nested_refusal(modules: Path = MODULES) -> str | None:
    """Why guests under this host's KVM can't run guests of their own; None where they can.

    The parameter `nested` of KVM's modules: Documentation/virt/kvm/x86/running-nested-guests.rst.
    """
    for module in _MODULES.values():
        try:
            value = (modules / module / "parameters" / "nested").read_text().strip()
        except OSError:
            continue
        if value not in ("Y", "1"):
            return f"nested virtualization is off here; run: {_sudo()}modprobe -r {module}; {_sudo()}modprobe {module} nested=1"
        return None
    return "KVM's module does not say whether it can nest"


def check_kvm(device: Path = DEVICE, cpuinfo: Path = CPUINFO) -> Check:
    """The same as a line of `polyvisor doctor`; a missing KVM is a warning, because emulation works everywhere."""
    verdict = _examine(device, cpuinfo)
    result = CheckResult.OK if verdict.works else CheckResult.WARNING
    return Check(name="kvm", result=result, detail=verdict.reason, remedy=verdict.remedy)


def _examine(device: Path, cpuinfo: Path) -> _Verdict:
    flags = _cpu_flags(cpuinfo)
    flag = next((name for name in _MODULES if name in flags), None)
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _missing(device, flag, flags)
    except OSError as error:
        # Rights to the device would not help a CPU that lacks the flag.
        return _not_openable(device, error) if flag else _no_flag(device, flags)
    try:
        return _examine_open(fd, device, flag, flags)
    finally:
        os.close(fd)


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """The flags of the first CPU; none where the file can't be read or has no such line (other architectures)."""
    try:
        with cpuinfo.open(errors="replace") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def _missing(device: Path, flag: str | None, flags: frozenset[str]) -> _Verdict:
    if flag is None:
        return _Verdict(False, f"there is no {device}, and {_NO_FLAG}", _flag_remedy(flags))
    module = _MODULES[flag]
    return _Verdict(
        False,
        f"there is no {device}, although the CPU has {flag}",
        f"run: {_sudo()}modprobe {module} (if that fails, switch virtualization on in the machine's BIOS or UEFI)",
    )


def _not_openable(device: Path, error: OSError) -> _Verdict:
    if isinstance(error, PermissionError):
        return _Verdict(
            False,
            f"{device} may not be opened by this user",
            f"run: sudo usermod -aG {_group(device)} {_user()} (then log in again)",
        )
    return _Verdict(False, f"{device} can't be opened: {error.strerror}")


def _examine_open(fd: int, device: Path, flag: str | None, flags: frozenset[str]) -> _Verdict:
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0)
    except OSError as error:
        return _Verdict(False, f"{device} is not KVM: it refuses KVM_GET_API_VERSION ({error.strerror})")
    if version != _API_VERSION:
        return _Verdict(False, f"{device} speaks version {version} of KVM's interface, not {_API_VERSION}")
    if flag is None:
        return _no_flag(device, flags)
    from polyvisor.drivers.qemu.kvm_probe import ProbeFailed, run_probe

    try:
        milliseconds = run_probe(device)
    except ProbeFailed as error:
        return _Verdict(False, f"{device} and the CPU's {flag} are there, but {error}", _flag_remedy(flags))
    return _Verdict(True, f"a probe guest ran on the CPU's {flag} ({milliseconds:.0f} ms)")


_NO_FLAG = "the CPU offers no hardware virtualization (no vmx or svm flag)"


def _no_flag(device: Path, flags: frozenset[str]) -> _Verdict:
    return _Verdict(False, f"{device} exists, but {_NO_FLAG}", _flag_remedy(flags))


def _flag_remedy(flags: frozenset[str]) -> str:
    """Where to switch hardware virtualization on; the `hypervisor` flag tells a virtual machine from a real one."""
    if "hypervisor" in flags:
        return "this is a virtual machine: switch nested virtualization on in the hypervisor that runs it"
    return "switch virtualization (VT-x, AMD-V, SVM) on in the machine's BIOS or UEFI"


def _sudo() -> str:
    return "" if os.geteuid() == 0 else "sudo "


def _group(device: Path) -> str:
    """The group that owns the device: `kvm` everywhere, but a renamed one is named right."""
    try:
        group = device.group()
    except (OSError, KeyError):
        return "kvm"
    return "kvm" if group == "root" else group


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
