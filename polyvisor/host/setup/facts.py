"""What has to be known of this machine before it is made a host; nothing here changes anything."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from polyvisor.errors import PolyvisorError
from polyvisor.host.setup import grub
from polyvisor.host.setup.grub import Grub
from polyvisor.host.setup.systems import Family, System, assignments, identify
from polyvisor.process import run
from polyvisor.values import dataclass

MODULES_FILE = "/etc/modules-load.d/polyvisor.conf"
_SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """This machine. Memory is in MiB, and the whole machine's, also where this system is Xen's dom0 and has a part of it.

    `cpu_flag` is vmx or svm where the CPU has one ("hvm" where Xen says so), `xen` the command line of the Xen that this system
    is the dom0 of. `installed` and `available` are packages. `dom0_kernel` says whether a kernel in /boot can be a dom0. `grub`
    is None where GRUB does not boot this machine. `units` is what systemd says of units; `domains` are those of /etc/xen/auto.
    """

    system: System
    architecture: str = "x86_64"
    root: bool = True
    container: bool = False
    memory_mib: int
    cpus: int
    cpu_flag: str | None = None
    kvm: bool = False
    xen: str | None = None
    secure_boot: bool = False
    uefi: bool = False
    installed: frozenset[str] = frozenset()
    available: frozenset[str] = frozenset()
    dom0_kernel: bool = False
    grub: Grub | None = None
    units: tuple[tuple[str, str], ...] = ()
    domains: tuple[str, ...] = ()
    modules_file: bool = False

    def unit(self, name: str) -> str:
        """What `systemctl is-enabled` says of a unit; "" for one that is not there."""
        return dict(self.units).get(name, "")


async def gather(root: Path = Path("/")) -> Facts:
    """The facts of this machine, whose files are below `root`. What can't be read is taken for not there."""
    system = identify(_text(root / "etc/os-release") or _text(root / "usr/lib/os-release"))
    ours = system.release is not None and system.release.family is Family.DEBIAN
    memory_mib, cpus, xen, flag = await _machine(root)
    return Facts(
        system=system,
        architecture=platform.machine(),
        root=os.geteuid() == 0,
        container=(root / "run/systemd/container").exists() or (root / ".dockerenv").exists(),
        memory_mib=memory_mib,
        cpus=cpus,
        cpu_flag=flag,
        kvm=(root / "dev/kvm").exists(),
        xen=xen,
        secure_boot=_bytes(root / _SECURE_BOOT)[4:5] == b"\x01",
        uefi=(root / "sys/firmware/efi").is_dir(),
        installed=await _installed() if ours else frozenset(),
        available=await _available(system) if ours else frozenset(),
        dom0_kernel=any("\nCONFIG_XEN_DOM0=y\n" in _text(path) for path in (root / "boot").glob("config-*")),
        grub=read_grub(root),
        units=await _units("xen.service", "xendomains.service") if ours else (),
        domains=tuple(sorted(path.name for path in (root / "etc/xen/auto").glob("*"))),
        modules_file=(root / MODULES_FILE[1:]).exists(),
    )


def read_grub(root: Path) -> Grub | None:
    """How GRUB is set and what it boots; None where this system has no update-grub, or no menu of it."""
    config = root / grub.CONFIG[1:]
    programs = (root / directory / "update-grub" for directory in ("usr/sbin", "sbin"))
    if not config.exists() or not any(path.exists() for path in programs):
        return None
    paths = [root / grub.SETTINGS[1:], *sorted((root / "etc/default/grub.d").glob("*.cfg"))]
    ours = root / grub.DROP_IN[1:]
    files = tuple((f"/{path.relative_to(root)}", assignments(_text(path))) for path in paths if path != ours)
    menu = _text(config)
    saved = re.search(r"^saved_entry=(.+)$", _text(config.with_name("grubenv")), re.MULTILINE)
    return Grub(
        files=files,
        drop_in=_text(ours) if ours.exists() else None,
        default=grub.default_entry(menu, saved[1] if saved else ""),
        menu=bool(menu),
    )


async def _machine(root: Path) -> tuple[int, int, str | None, str | None]:
    """Memory, CPUs, Xen's command line and the CPU's flag: as the kernel has them, or, in a dom0, as Xen does."""
    meminfo = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    memory_mib, cpus = int(meminfo[1]) // 1024 if meminfo else 0, os.cpu_count() or 1
    flags = re.search(r"^flags\s*:(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    flag = next((name for name in (flags[1].split() if flags else ()) if name in ("vmx", "svm")), None)
    if "control_d" not in _text(root / "proc/xen/capabilities"):
        return memory_mib, cpus, None, flag
    from polyvisor.drivers.xen.xl import info

    try:
        xen = await info()
    except PolyvisorError:  # its daemons do not run yet, say
        return memory_mib, cpus, "", flag
    # Xen hides the flag from its dom0.
    return xen.total_memory_mib, xen.cpus, xen.command_line, flag or ("hvm" if "hvm" in xen.virt_caps else None)


async def _installed() -> frozenset[str]:
    listed = await run(["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package}\n"], check=False)
    return frozenset(line[4:].strip() for line in listed.stdout.splitlines() if line.startswith(("ii", "hi")))


async def _available(system: System) -> frozenset[str]:
    """Which packages of this release's hosts apt can install."""
    release = system.release
    assert release is not None  # noqa: S101 (who calls has looked)
    names = sorted({name for entry in (*release.kvm, *release.xen) for name in entry.split("|")})
    said = (await run(["apt-cache", "policy", *names], check=False)).stdout
    return frozenset(re.findall(r"^(\S+):\n  Installed: .*\n  Candidate: (?!\(none\))", said, re.MULTILINE))


async def _units(*names: str) -> tuple[tuple[str, str], ...]:
    try:
        return tuple([(n, (await run(["systemctl", "is-enabled", n], check=False)).stdout.strip()) for n in names])
    except PolyvisorError:  # a system without systemd
        return ()


def _text(path: Path) -> str:
    return _bytes(path).decode(errors="replace")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
