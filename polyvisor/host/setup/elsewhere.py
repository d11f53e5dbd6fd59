"""Plans for SUSE and for Red Hat's family: what their makers document, to be done by hand. Polyvisor was never run there.

Sources: docs/design/host-prepare.md. What was found on the machine does not enter: nothing of it could be tested.
"""

from __future__ import annotations

from collections.abc import Iterator

from polyvisor.host.setup import grub
from polyvisor.host.setup.facts import Facts
from polyvisor.host.setup.systems import Family, Release
from polyvisor.status import SetupStep, StepState

_CONFIG = "/boot/grub2/grub.cfg"
_MAKE = ("grub2-mkconfig", "-o", _CONFIG)
_ENTRY = f"""sed -n "s/^menuentry '\\([^']*with Xen hypervisor\\)'.*/\\1/p" {_CONFIG} | head -n 1"""
_FIRST = f"""sed -n "s/^menuentry '\\([^']*\\)'.*/\\1/p" {_CONFIG} | head -n 1"""
_INSTALL = {Family.SUSE: ("zypper", "install"), Family.RED_HAT: ("dnf", "install")}
_UNITS = ("xenstored.service", "xenconsoled.service", "xen-init-dom0.service")


def steps(
    facts: Facts, release: Release, xen_host: bool, undo: bool, memory_mib: int, vcpus: int
) -> tuple[SetupStep, ...]:
    """The steps of a plan for `release`, each of them to be done by hand."""
    if undo:
        return tuple(_undone()) if xen_host else ()
    return tuple(_xen(release, memory_mib, vcpus) if xen_host else _kvm(facts, release))


def _kvm(facts: Facts, release: Release) -> Iterator[SetupStep]:
    yield _step("packages", "QEMU, and what Polyvisor calls on a host", (*_INSTALL[release.family], *release.kvm))
    module = {"vmx": "kvm_intel", "svm": "kvm_amd"}.get(facts.cpu_flag or "", "kvm")
    yield _step("module", "it is loaded by itself, unless there is no /dev/kvm", ("modprobe", module))


def _xen(release: Release, memory_mib: int, vcpus: int) -> Iterator[SetupStep]:
    yield _step("packages", "Xen, its tools, QEMU, and the network", (*_INSTALL[release.family], *release.xen))
    line = f'GRUB_CMDLINE_XEN="dom0_mem={memory_mib}M,max:{memory_mib}M dom0_max_vcpus={vcpus}"'
    why = f"dom0 gets a fixed share; make sure that {grub.SETTINGS} has no other line for it, and GRUB_DEFAULT=saved"
    yield _step("settings", why, ("sh", "-c", f"echo '{line}' >> {grub.SETTINGS}"), _MAKE)
    default = ("sh", "-c", f'grub2-set-default "$({_ENTRY})"')
    yield _step("boot", "the entry with Xen becomes GRUB's default; look at it before: grub2-editenv list", default)
    yield _step("daemons", "xl needs xenstored and xenconsoled", ("systemctl", "enable", *_UNITS))
    why = "it saves and restores domains behind Polyvisor's back; leave it where you have domains in /etc/xen/auto"
    yield _step("xendomains", why, ("systemctl", "disable", "xendomains.service"))
    yield _step("reboot", "to boot Xen", ("systemctl", "reboot"), reboot=True)


def _undone() -> Iterator[SetupStep]:
    command = ("sh", "-c", f'grub2-set-default "$({_FIRST})"')
    yield _step("boot", "the first entry, without Xen, becomes GRUB's default again", command)
    yield _step("reboot", "to boot Linux without Xen", ("systemctl", "reboot"), reboot=True)


def _step(name: str, why: str, *commands: tuple[str, ...], reboot: bool = False) -> SetupStep:
    return SetupStep(
        name=name, state=StepState.BY_HAND, found="not looked at", why=why, commands=commands, reboot=reboot
    )
