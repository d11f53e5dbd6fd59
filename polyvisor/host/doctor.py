"""`polyvisor doctor`: what works on this host, what is missing, and the exact command that mends it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from polyvisor.drivers.qemu.kvm import check_kvm
from polyvisor.drivers.qemu.programs import find_qemu, find_uefi
from polyvisor.errors import PolyvisorError
from polyvisor.home import Home
from polyvisor.process import find_program, install_command
from polyvisor.status import Check, CheckResult

_LOW_STORAGE_MIB = 2048
# Program, package, and what lacks without it.
_PROGRAMS = (
    ("qemu-img", "qemu-utils", "VMs with disks, and importing images"),
    ("ssh", "openssh-client", "ssh, exec and cp"),
    ("ssh-keygen", "openssh-client", "logging in to guests"),
    ("gpgv", "gpgv", "building images"),
    ("mmdebstrap", "mmdebstrap", "building image 'debian'"),
)


async def check_host(home: Home) -> list[Check]:
    """Every check, in the order in which a person would mend things."""
    return [
        _python(),
        await _qemu(home),
        _kvm(),
        *_xen(),
        *(_program(*row) for row in _PROGRAMS),
        _checked("uefi", lambda: str(find_uefi()[0]), install_command("ovmf"), "booting by UEFI"),
        _home(home),
        _storage(home),
    ]


def _python() -> Check:
    return Check(name="python", result=CheckResult.OK, detail=f"{sys.executable}, version {platform.python_version()}")


def _kvm() -> Check:
    """Whether KVM works; where the CPU could and it does not, what sets it up."""
    if _is_dom0():
        return Check(
            name="kvm", result=CheckResult.WARNING, detail="this machine runs Xen, under which there is no KVM"
        )
    check = check_kvm()
    if check.result is CheckResult.OK or "modprobe" not in (check.remedy or ""):
        return check
    return replace(check, remedy=f"{check.remedy}; or for all at once: polyvisor host prepare kvm")


async def _qemu(home: Home) -> Check:
    try:
        qemu = await find_qemu(home.cache)
    except PolyvisorError as error:
        if _is_dom0():  # whose VMs run without it
            return Check(name="qemu", result=CheckResult.WARNING, detail=error.message, remedy=error.hint)
        remedy = f"{error.hint}; or with all else that a host needs: polyvisor host prepare kvm"
        return Check(name="qemu", result=CheckResult.MISSING, detail=error.message, remedy=remedy)
    return Check(name="qemu", result=CheckResult.OK, detail=f"{qemu.binary}, version {qemu.version}")


def _xen() -> list[Check]:
    """On a machine that runs Xen, whether what is needed to use it is there; nothing elsewhere."""
    if not _is_dom0():
        return []
    return [
        _checked(
            "xen", lambda: find_program("xl", package="xen-system-amd64"), "polyvisor host prepare xen", "VMs on Xen"
        ),
        _grub_xen(),
    ]


def _grub_xen() -> Check:
    """Whether guests in modes pv and pvh can boot from their disks."""
    from polyvisor.drivers.xen.loaders import PACKAGE, PROGRAMS, find_loader, missing_loaders

    if lacking := missing_loaders():
        detail = (
            f"none for {' and '.join(word.partition('-')[2] for word in lacking)} (for disks that boot in these modes)"
        )
        return Check(name="grub-xen", result=CheckResult.WARNING, detail=detail, remedy=install_command(PACKAGE))
    found = ", ".join(str(find_loader(mode)) for mode in PROGRAMS)
    return Check(name="grub-xen", result=CheckResult.OK, detail=found)


def _is_dom0() -> bool:
    """Whether this system is the dom0 of a Xen."""
    try:
        return "control_d" in Path("/proc/xen/capabilities").read_text()
    except OSError:
        return False


def _program(program: str, package: str, purpose: str) -> Check:
    return _checked(program, lambda: find_program(program, package=package), install_command(package), purpose)


def _checked(name: str, find: Callable[[], str], remedy: str, purpose: str) -> Check:
    """A check for something that only part of Polyvisor needs: without it, a warning."""
    try:
        return Check(name=name, result=CheckResult.OK, detail=find())
    except PolyvisorError as error:
        return Check(name=name, result=CheckResult.WARNING, detail=f"{error.message} (for {purpose})", remedy=remedy)


def _home(home: Home) -> Check:
    try:
        home.prepare()
        writable = os.access(home.path, os.W_OK | os.X_OK)
    except PolyvisorError as error:
        return Check(name="home", result=CheckResult.MISSING, detail=error.message, remedy=error.hint)
    if not writable:
        remedy = f"chown -R {os.geteuid()} {home.path}, or set POLYVISOR_HOME"
        return Check(name="home", result=CheckResult.MISSING, detail=f"{home.path} is not writable", remedy=remedy)
    blocked = _not_traversable(home.path) if os.geteuid() == 0 else None
    if blocked is not None:
        detail = f"QEMU, which runs without root's rights, can't pass {blocked}"
        return Check(name="home", result=CheckResult.MISSING, detail=detail, remedy=f"chmod o+x {blocked}")
    return Check(name="home", result=CheckResult.OK, detail=str(home.path))


def _not_traversable(path: Path) -> Path | None:
    """The first directory on the way to `path` that other users can't pass."""
    return next((p for p in (*reversed(path.parents), path) if p.is_dir() and not p.stat().st_mode & 0o001), None)


def _storage(home: Home) -> Check:
    path = next(p for p in (home.path, *home.path.parents) if p.is_dir())
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize >> 20
    if free >= _LOW_STORAGE_MIB:
        return Check(name="storage", result=CheckResult.OK, detail=f"{free / 1024:.1f} GiB free at {path}")
    detail = f"{free} MiB free at {path}"
    return Check(name="storage", result=CheckResult.WARNING, detail=detail, remedy="polyvisor image rm, polyvisor rm")
