"""From what a machine is to what makes it a host: a pure function, whose result is printed, and carried out by `apply`.

Systems of Debian's family are planned step by step, by what was found. For the others, on which Polyvisor was never tried,
the steps are those of their makers' documentation, all to be done by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from polyvisor.errors import InvalidInput
from polyvisor.host.setup import elsewhere, grub, xen
from polyvisor.host.setup.facts import MODULES_FILE, Facts
from polyvisor.host.setup.grub import Grub
from polyvisor.host.setup.systems import RELEASES, Family, Release
from polyvisor.host.setup.wish import Wish
from polyvisor.status import FileChange, HostKind, Setup, SetupStep, StepState

_APT = ("env", "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_MODE=l", "apt-get")
_OPTIONS = ("-o", "DPkg::Lock::Timeout=120", "-o", "Dpkg::Options::=--force-confold")
_INSTALL = (*_APT, *_OPTIONS, "install", "-y", "--no-install-recommends", "--no-remove")
_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}


def default_kind(facts: Facts) -> HostKind:
    """The kind of host that a machine is set up as where nobody says: what it runs, or KVM."""
    return HostKind.XEN if facts.xen is not None else HostKind.KVM


def plan(facts: Facts, wish: Wish) -> Setup:
    """What makes this machine what `wish` says, in order, and how far that is; raises InvalidInput for sizes that can't be."""
    kind = wish.kind or default_kind(facts)
    wish = replace(wish, kind=kind)
    _check(facts, wish)
    return Setup(
        kind=kind,
        system=facts.system.name,
        steps=_steps(facts, wish),
        notes=tuple(_notes(facts, wish)),
    )


def _check(facts: Facts, wish: Wish) -> None:
    if wish.kind is HostKind.KVM and (wish.dom0_memory_mib or wish.dom0_vcpus):
        field = "dom0-memory" if wish.dom0_memory_mib else "dom0-vcpus"
        raise InvalidInput(field, wish.dom0_memory_mib or wish.dom0_vcpus, "is for Xen hosts: KVM has no dom0")
    if wish.dom0_memory_mib is not None and not xen.MIN_DOM0_MIB <= wish.dom0_memory_mib < facts.memory_mib:
        hint = f"from {xen.MIN_DOM0_MIB}M to less than the machine's {facts.memory_mib}M"
        raise InvalidInput("dom0-memory", wish.dom0_memory_mib, "is no memory that dom0 could have here", hint=hint)
    if wish.dom0_vcpus is not None and not 1 <= wish.dom0_vcpus <= facts.cpus:
        raise InvalidInput("dom0-vcpus", wish.dom0_vcpus, f"is no number of vCPUs here: from 1 to {facts.cpus}")


def _steps(facts: Facts, wish: Wish) -> tuple[SetupStep, ...]:
    release, xen_host = facts.system.release, wish.kind is HostKind.XEN
    machine = _machine(facts, wish, release)
    if release is None or machine.state is StepState.BLOCKED:
        return (machine,)
    if release.family is not Family.DEBIAN:
        return (machine, *elsewhere.steps(facts, release, xen_host, wish.undo, *_dom0(facts, wish)))
    if wish.undo:
        return (machine, *(_without_xen(facts) if xen_host else _module_undone(facts)))
    return (machine, *(_xen(facts, wish, release) if xen_host else _kvm(facts, release)))


def _notes(facts: Facts, wish: Wish) -> Iterator[str]:
    release = facts.system.release
    if release is None or _obstacle(facts, wish, release):
        return
    if release.family is not Family.DEBIAN:
        yield f"untested: Polyvisor was never run on {release.name}; the steps are from its documentation, and all by hand"
    elif wish.kind not in release.tried:
        yield f"untested: a {wish.kind} host was never made of {release.name} in this way; only a xen host, of Debian 12"
    if release.note:
        yield release.note
    if wish.kind is HostKind.XEN and not wish.undo:
        if facts.cpu_flag is None:
            yield "this CPU offers no hardware virtualization: Xen can run guests in mode pv alone here"
        if facts.uefi:
            yield "untested: this machine boots by UEFI; Xen was tried by BIOS alone"
        if facts.xen is None:
            yield "under Xen there is no KVM: VMs made with --hypervisor kvm do not start until Linux is booted without Xen"
            yield "if the machine does not come up with Xen, choose the entry without Xen in GRUB's menu, at its console"


# The machine itself


def _machine(facts: Facts, wish: Wish, release: Release | None) -> SetupStep:
    reason = _obstacle(facts, wish, release)
    if reason is not None:
        return SetupStep(name="machine", state=StepState.BLOCKED, found=reason)
    assert release is not None  # noqa: S101 (an obstacle of its own)
    flag = {"vmx": "VT-x", "svm": "AMD-V", "hvm": "hardware virtualization"}.get(
        facts.cpu_flag or "", "no VT-x or AMD-V"
    )
    shipped = f", which ships Xen {release.xen_version}" if wish.kind is HostKind.XEN and release.xen_version else ""
    found = f"{facts.system.name}{shipped}; {facts.cpus} CPUs with {flag}, {facts.memory_mib} MiB"
    return SetupStep(name="machine", state=StepState.DONE, found=found)


def _obstacle(facts: Facts, wish: Wish, release: Release | None) -> str | None:
    """Why nothing is done here; None where something can be."""
    if release is None:
        known = ", ".join(known.name for known in RELEASES)
        return f"{facts.system.name} is not a system that Polyvisor knows; it changes nothing here (known: {known})"
    if facts.architecture != "x86_64":
        return f"hosts are x86_64, and this is {facts.architecture}"
    if facts.container:
        return "this is a container: prepare the machine that runs it"
    if wish.kind is HostKind.XEN:
        return _xen_obstacle(facts, release, wish.undo)
    if facts.cpu_flag is None and not wish.undo:
        return (
            "the CPU offers no hardware virtualization (no vmx or svm flag): switch it on in the machine's BIOS or UEFI, or, "
            "in a VM, in what runs that; Xen needs none for guests in mode pv: polyvisor host prepare xen"
        )
    return None


def _xen_obstacle(facts: Facts, release: Release, undo: bool) -> str | None:
    if not release.xen:
        return f"{release.name} ships no Xen for hosts: {release.no_xen}"
    if release.family is Family.DEBIAN and (facts.grub is None or not facts.grub.menu):
        what = "GRUB does not boot this machine (no update-grub, or no menu of it)"
        return what if facts.grub is None else f"{grub.CONFIG} can't be read by this user: run it as root"
    if undo:
        return None
    if facts.secure_boot:
        return "Secure Boot is on, and GRUB can't boot Xen with it: switch it off in the machine's UEFI"
    if facts.memory_mib < xen.MIN_HOST_MIB:
        return f"{facts.memory_mib} MiB of memory are too little for Xen with a dom0 and guests: {xen.MIN_HOST_MIB} are needed"
    return None


# Debian and Ubuntu


def _xen(facts: Facts, wish: Wish, release: Release) -> tuple[SetupStep, ...]:
    found = facts.grub
    assert found is not None  # noqa: S101 (an obstacle)
    memory_mib, vcpus = _dom0(facts, wish)
    settings = xen.settings_step(found, memory_mib, vcpus, wish.dom0_memory_mib or wish.dom0_vcpus)
    kernel = () if facts.dom0_kernel or release.kernel is None else (release.kernel,)
    wanted = xen.wanted_words(found, memory_mib, vcpus)
    booted = set((grub.xen_command_line(found.default or "") or "").split())
    steps = (
        settings,
        _packages(facts, (*release.xen, *kernel)),
        _boot(settings, found.boots_xen() and wanted <= booted, "Xen"),
        *xen.daemon_steps(facts),
    )
    # No program of Xen's is put beside settings that would boot it otherwise.
    if settings.state is StepState.BLOCKED:
        return (settings,)
    right = facts.xen is not None and wanted <= set(facts.xen.split())
    running = "this system is not Xen's dom0" if facts.xen is None else "Xen runs, with other settings"
    return (*steps, _reboot(right, "Xen runs, with these settings" if right else running, "boot Xen"))


def _dom0(facts: Facts, wish: Wish) -> tuple[int, int]:
    """Memory in MiB and vCPUs of dom0: those asked for, those of an earlier time, or the usual ones."""
    earlier = xen.dom0_of((facts.grub.drop_in if facts.grub else None) or "")
    memory_mib = wish.dom0_memory_mib or earlier[0] or xen.usual_memory_mib(facts.memory_mib)
    return memory_mib, wish.dom0_vcpus or earlier[1] or xen.usual_vcpus(facts.cpus)


def _kvm(facts: Facts, release: Release) -> tuple[SetupStep, ...]:
    packages = _packages(facts, release.kvm)
    if facts.xen is None and not (facts.grub and facts.grub.boots_xen()):
        return (packages, _module(facts))
    # The module is looked at again once Linux is booted without Xen.
    return (packages, *_without_xen(facts))


def _module(facts: Facts) -> SetupStep:
    module = _MODULES.get(facts.cpu_flag or "", "kvm")
    why = "KVM is a module of the kernel, one for each maker's CPUs"
    if facts.kvm:
        return SetupStep(name="module", state=StepState.DONE, found="/dev/kvm is there", why=why)
    return SetupStep(
        name="module",
        state=StepState.TODO,
        found="there is no /dev/kvm",
        why=f"{why}; where systems do not load it by themselves, {MODULES_FILE} does at each boot",
        files=(FileChange(path=MODULES_FILE, content=f"# Written by polyvisor host prepare kvm.\n{module}\n"),),
        commands=(("modprobe", module),),
    )


def _packages(facts: Facts, entries: tuple[str, ...]) -> SetupStep:
    names = [_alternative(facts, entry) for entry in entries]
    missing = sorted(set(names) - facts.installed)
    if not missing:
        return SetupStep(name="packages", state=StepState.DONE, found=f"all {len(names)} are installed")
    return SetupStep(
        name="packages",
        state=StepState.TODO,
        found=f"{len(names) - len(missing)} of {len(names)} are installed",
        why="the hypervisor, and what Polyvisor calls on a host; nothing is removed or replaced for them",
        commands=((*_APT, "update"), (*_INSTALL, *missing)),
    )


def _alternative(facts: Facts, entry: str) -> str:
    """The package of `a|b` that is installed, or else can be."""
    names = entry.split("|")
    there = [name for name in names if name in facts.installed] or [name for name in names if name in facts.available]
    return (there or names)[0]


def _boot(settings: SetupStep, right: bool, what: str) -> SetupStep:
    if right and settings.state is StepState.DONE:
        return SetupStep(name="boot", state=StepState.DONE, found=f"GRUB boots {what} by default, with these settings")
    return SetupStep(
        name="boot",
        state=StepState.TODO,
        found=f"GRUB does not boot {what} by default, or with other settings",
        why="GRUB's menu is made from its settings; afterwards it is looked into, whether it does",
        commands=(("update-grub",),),
    )


def _reboot(done: bool, found: str, why: str) -> SetupStep:
    state = StepState.DONE if done else StepState.BY_HAND
    commands = () if done else (("systemctl", "reboot"),)
    why = "" if done else f"to {why}; stop or save the VMs of this machine first. Polyvisor never does this by itself"
    return SetupStep(name="reboot", state=state, found=found, why=why, commands=commands, reboot=not done)


# The way back


def _module_undone(facts: Facts) -> tuple[SetupStep, ...]:
    if not facts.modules_file:
        return (SetupStep(name="module", state=StepState.DONE, found=f"there is no {MODULES_FILE}"),)
    step = SetupStep(
        name="module",
        state=StepState.TODO,
        found=f"{MODULES_FILE} is there",
        why="packages stay: others may need them by now",
        files=(FileChange(path=MODULES_FILE),),
    )
    return (step,)


def _without_xen(facts: Facts) -> tuple[SetupStep, ...]:
    """Linux is booted without Xen; its packages stay, and so do their entries in GRUB's menu."""
    found = facts.grub or Grub()
    settings = xen.linux_settings_step(found, "xen-hypervisor-common" in facts.installed)
    boot = _boot(settings, not found.boots_xen(), "Linux without Xen")
    running = "this system is Xen's dom0" if facts.xen is not None else "Xen does not run"
    return (settings, boot, _reboot(facts.xen is None, running, "boot Linux without Xen"))
