"""Which systems Polyvisor knows as hosts, and which hypervisors each release of them still ships.

A release is found by `ID` and `VERSION_ID` of os-release(5) alone, never by `ID_LIKE`: a system that is only like another
may boot otherwise, and is left alone. Where each line comes from: docs/design/host-prepare.md, "Sources".
"""

from __future__ import annotations

import re
import shlex
from enum import StrEnum

from polyvisor.values import dataclass


class Family(StrEnum):
    """Systems that are set up alike. Only Debian's are set up by Polyvisor; for the others it says what to do."""

    DEBIAN = "debian"
    SUSE = "suse"
    RED_HAT = "red-hat"


@dataclass(frozen=True, kw_only=True)
class Release:
    """A release of a system. `kvm` and `xen` are the packages of a host that runs it, empty where it ships none.

    `no_xen` says why there is no Xen. `kernel` is a package with a kernel that can be Xen's dom0, where others can't.
    `versions` is matched against the whole of VERSION_ID. `tried` are the kinds of host that one was really made of it.
    """

    name: str
    family: Family
    ids: tuple[str, ...]
    versions: str
    kvm: tuple[str, ...]
    xen: tuple[str, ...] = ()
    xen_version: str | None = None
    no_xen: str | None = None
    kernel: str | None = None
    tried: tuple[str, ...] = ()
    note: str | None = None


# What Polyvisor itself calls on a host, and on Xen hosts what its own network is made with.
_DEBIAN_TOOLS = ("qemu-utils", "openssh-client", "gpgv")
_DEBIAN_KVM = ("qemu-system-x86", "ovmf", *_DEBIAN_TOOLS)
_DEBIAN_NET = ("nftables", "dnsmasq-base", "iproute2")
# "a|b" is the first of the two that the release has. Ubuntu has called the QEMU of Xen guests by both names.
_DEBIAN_XEN = ("xen-system-amd64", "qemu-system-xen", "grub-xen-host", *_DEBIAN_TOOLS, *_DEBIAN_NET)
_UBUNTU_XEN = (
    *("xen-system-amd64", "qemu-system-xen|qemu-system-x86-xen", "grub-xen-host"),
    *(*_DEBIAN_TOOLS, *_DEBIAN_NET),
)
_SUSE_TOOLS = ("qemu-tools", "openssh-clients", "gpg2")
_SUSE_KVM = ("qemu-x86", "qemu-ovmf-x86_64", *_SUSE_TOOLS)
_SUSE_XEN = ("xen", "xen-tools", "qemu-x86", "nftables", "dnsmasq", "iproute2", *_SUSE_TOOLS)
_RED_HAT_KVM = ("qemu-kvm", "qemu-img", "edk2-ovmf", "openssh-clients", "gnupg2")
_FEDORA_XEN = ("xen", "qemu-system-x86", "qemu-img", "openssh-clients", "gnupg2", "nftables", "dnsmasq", "iproute")

_NO_XEN_16 = "SUSE dropped Xen hosts with version 16; the last with Xen is 15"
_NO_XEN_RHEL = "Red Hat dropped Xen hosts with RHEL 6; KVM has been its only hypervisor since"
_LIBEXEC = "QEMU lies outside of PATH here: export POLYVISOR_QEMU=/usr/libexec/qemu-kvm"
_REBUILDS = ("rhel", "almalinux", "rocky", "centos")

RELEASES = (
    Release(
        name="Debian 12",
        family=Family.DEBIAN,
        ids=("debian",),
        versions="12",
        kvm=("python3", *_DEBIAN_KVM),
        xen=("python3", *_DEBIAN_XEN),
        xen_version="4.17",
        kernel="linux-image-amd64",
        tried=("xen",),
    ),
    Release(
        name="Debian 13",
        family=Family.DEBIAN,
        ids=("debian",),
        versions="13",
        kvm=("python3", *_DEBIAN_KVM),
        xen=("python3", *_DEBIAN_XEN),
        xen_version="4.20",
        kernel="linux-image-amd64",
    ),
    Release(
        name="Ubuntu 22.04",
        family=Family.DEBIAN,
        ids=("ubuntu",),
        versions=r"22\.04",
        kvm=("python3.11", *_DEBIAN_KVM),
        xen=("python3.11", *_UBUNTU_XEN),
        xen_version="4.16",
        kernel="linux-image-generic",
        note="its python3 is older than 3.11: Polyvisor runs with python3.11 here",
    ),
    Release(
        name="Ubuntu 24.04",
        family=Family.DEBIAN,
        ids=("ubuntu",),
        versions=r"24\.04",
        kvm=("python3", *_DEBIAN_KVM),
        xen=("python3", *_UBUNTU_XEN),
        xen_version="4.17",
        kernel="linux-image-generic",
    ),
    Release(
        name="openSUSE Leap 15",
        family=Family.SUSE,
        ids=("opensuse-leap",),
        versions=r"15\.\d+",
        kvm=("python311", *_SUSE_KVM),
        xen=("python311", *_SUSE_XEN),
    ),
    Release(
        name="openSUSE Leap 16",
        family=Family.SUSE,
        ids=("opensuse-leap",),
        versions=r"16\.\d+",
        kvm=("python3", *_SUSE_KVM),
        no_xen=_NO_XEN_16,
    ),
    Release(
        name="openSUSE Tumbleweed",
        family=Family.SUSE,
        ids=("opensuse-tumbleweed",),
        versions=r"\d{8}",
        kvm=("python3", *_SUSE_KVM),
        xen=("python3", *_SUSE_XEN),
    ),
    Release(
        name="SUSE Linux Enterprise Server 15",
        family=Family.SUSE,
        ids=("sles",),
        versions=r"15(\.\d+)?",
        kvm=("python311", *_SUSE_KVM),
        xen=("python311", *_SUSE_XEN),
    ),
    Release(
        name="SUSE Linux Enterprise Server 16",
        family=Family.SUSE,
        ids=("sles",),
        versions=r"16\.\d+",
        kvm=("python3", *_SUSE_KVM),
        no_xen=_NO_XEN_16,
    ),
    Release(
        name="Red Hat Enterprise Linux 8 or 9",
        family=Family.RED_HAT,
        ids=_REBUILDS,
        versions=r"[89](\.\d+)?",
        kvm=("python3.11", *_RED_HAT_KVM),
        no_xen=_NO_XEN_RHEL,
        note=_LIBEXEC,
    ),
    Release(
        name="Red Hat Enterprise Linux 10",
        family=Family.RED_HAT,
        ids=_REBUILDS,
        versions=r"10(\.\d+)?",
        kvm=("python3", *_RED_HAT_KVM),
        no_xen=_NO_XEN_RHEL,
        note=_LIBEXEC,
    ),
    Release(
        name="Fedora 40 or later",
        family=Family.RED_HAT,
        ids=("fedora",),
        versions=r"[4-9]\d",
        kvm=("python3", "qemu-system-x86", "qemu-img", "edk2-ovmf", "openssh-clients", "gnupg2"),
        xen=("python3", *_FEDORA_XEN),
        xen_version="4.18 or later",
    ),
)


@dataclass(frozen=True, kw_only=True)
class System:
    """A system as its os-release names it, and the release that it is, where it is one of those known."""

    name: str
    release: Release | None


def identify(os_release: str) -> System:
    """The system that the text of an os-release(5) file describes."""
    values = assignments(os_release)
    system, version = values.get("ID", ""), values.get("VERSION_ID", "")
    name = values.get("PRETTY_NAME") or values.get("NAME") or system or "an unknown system"
    found = (r for r in RELEASES if system in r.ids and re.fullmatch(r.versions, version))
    return System(name=name, release=next(found, None))


def assignments(text: str) -> dict[str, str]:
    """The assignments of a file in the form of a shell script, as os-release and /etc/default/grub: the last of each name.

    Values are as they stand, without quotes; what a shell would expand in them is left as it is. Lines that are no plain
    assignment are passed over.
    """
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"\s*(?:export\s+)?([A-Za-z_]\w*)=(.*)", line):
            try:
                found[match[1]] = " ".join(shlex.split(match[2], comments=True))
            except ValueError:  # a quote that goes on in the next line
                continue
    return found
