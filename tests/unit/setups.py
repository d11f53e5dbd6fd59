"""Machines for tests of `host prepare`: os-release texts as their makers write them, and facts of a machine like any other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from polyvisor.host.setup.facts import Facts
from polyvisor.host.setup.grub import Grub
from polyvisor.host.setup.systems import assignments, identify

OS_RELEASES = {
    "debian-12": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\n',
    "debian-13": 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nNAME="Debian GNU/Linux"\nVERSION_ID="13"\nID=debian\n',
    "ubuntu-22.04": 'PRETTY_NAME="Ubuntu 22.04.5 LTS"\nNAME="Ubuntu"\nVERSION_ID="22.04"\nID=ubuntu\nID_LIKE=debian\n',
    "ubuntu-24.04": 'PRETTY_NAME="Ubuntu 24.04.2 LTS"\nNAME="Ubuntu"\nVERSION_ID="24.04"\nID=ubuntu\nID_LIKE=debian\n',
    "leap-15.6": 'NAME="openSUSE Leap"\nVERSION="15.6"\nID="opensuse-leap"\nID_LIKE="suse opensuse"\nVERSION_ID="15.6"\n'
    'PRETTY_NAME="openSUSE Leap 15.6"\n',
    "leap-16.0": 'NAME="openSUSE Leap"\nID="opensuse-leap"\nVERSION_ID="16.0"\nPRETTY_NAME="openSUSE Leap 16.0"\n',
    "tumbleweed": 'NAME="openSUSE Tumbleweed"\nID="opensuse-tumbleweed"\nVERSION_ID="20260110"\n'
    'PRETTY_NAME="openSUSE Tumbleweed"\n',
    "sles-15": 'NAME="SLES"\nVERSION="15-SP6"\nVERSION_ID="15.6"\nID="sles"\nID_LIKE="suse"\n'
    'PRETTY_NAME="SUSE Linux Enterprise Server 15 SP6"\n',
    "sles-16": 'NAME="SLES"\nVERSION_ID="16.0"\nID="sles"\nPRETTY_NAME="SUSE Linux Enterprise Server 16.0"\n',
    "rhel-8": 'NAME="Red Hat Enterprise Linux"\nID="rhel"\nID_LIKE="fedora"\nVERSION_ID="8.10"\n'
    'PRETTY_NAME="Red Hat Enterprise Linux 8.10 (Ootpa)"\n',
    "alma-9": 'NAME="AlmaLinux"\nID="almalinux"\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.6"\n'
    'PRETTY_NAME="AlmaLinux 9.6 (Sage Margay)"\n',
    "rocky-9": 'NAME="Rocky Linux"\nID="rocky"\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.5"\n'
    'PRETTY_NAME="Rocky Linux 9.5 (Blue Onyx)"\n',
    "rhel-10": 'NAME="Red Hat Enterprise Linux"\nID="rhel"\nVERSION_ID="10.0"\n'
    'PRETTY_NAME="Red Hat Enterprise Linux 10.0 (Coughlan)"\n',
    "fedora-42": 'NAME="Fedora Linux"\nID=fedora\nVERSION_ID=42\nPRETTY_NAME="Fedora Linux 42 (Server Edition)"\n',
}
UNKNOWN = {
    "mint": 'NAME="Linux Mint"\nID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_ID="22"\nPRETTY_NAME="Linux Mint 22"\n',
    "debian-11": 'PRETTY_NAME="Debian GNU/Linux 11 (bullseye)"\nVERSION_ID="11"\nID=debian\n',
    "sid": 'PRETTY_NAME="Debian GNU/Linux forky/sid"\nID=debian\n',
    "rhel-7": 'NAME="Red Hat Enterprise Linux Server"\nID="rhel"\nVERSION_ID="7.9"\n',
    "alpine": 'NAME="Alpine Linux"\nID=alpine\nVERSION_ID=3.21.0\nPRETTY_NAME="Alpine Linux v3.21"\n',
    "arch": 'NAME="Arch Linux"\nPRETTY_NAME="Arch Linux"\nID=arch\n',
    "nothing": "",
}
DEFAULT_GRUB = """\
GRUB_DEFAULT=0
GRUB_TIMEOUT=5
GRUB_DISTRIBUTOR=`lsb_release -i -s 2> /dev/null || echo Debian`
GRUB_CMDLINE_LINUX_DEFAULT="quiet"
GRUB_CMDLINE_LINUX=""
"""
LINUX_ENTRY = "\tlinux\t/boot/vmlinuz-6.1.0-30-amd64 root=UUID=x ro quiet\n\tinitrd\t/boot/initrd.img-6.1.0-30-amd64"
XEN_ENTRY = (
    "\tmultiboot2\t/boot/xen-4.17-amd64.gz placeholder {} ${{xen_rm_opts}}\n"
    "\tmodule2\t/boot/vmlinuz-6.1.0-30-amd64 placeholder root=UUID=x ro quiet\n\tmodule2\t--nounzip /boot/initrd.img"
)


def grub(text: str = DEFAULT_GRUB, *, more: tuple[tuple[str, str], ...] = (), **changes: Any) -> Grub:
    """GRUB with these settings; `more` are files of /etc/default/grub.d."""
    files = (("/etc/default/grub", text), *((f"/etc/default/grub.d/{name}", content) for name, content in more))
    parsed = tuple((path, assignments(content)) for path, content in files)
    return replace(Grub(files=parsed, default=LINUX_ENTRY), **changes)


def facts(name: str = "debian-12", **changes: Any) -> Facts:
    """A machine of 16 GiB and 8 CPUs with AMD-V that runs system `name`, fresh from its installer."""
    usual = Facts(
        system=identify((OS_RELEASES | UNKNOWN)[name]),
        memory_mib=15984,
        cpus=8,
        cpu_flag="svm",
        kvm=True,
        dom0_kernel=True,
        installed=frozenset({"python3", "openssh-client", "gpgv", "iproute2"}),
        grub=grub(),
    )
    return replace(usual, **changes)
