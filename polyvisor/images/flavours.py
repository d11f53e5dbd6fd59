"""The kinds of Debian image that can be built, and what makes each of them more than Debian.

`debian` is a system for any purpose; `bench` has the programs that `polyvisor compare` measures with; `lab-kvm` and `lab-xen`
are hosts of the lab: Debian with a hypervisor, SSH for root, and what Polyvisor needs on a host.
"""

from __future__ import annotations

from dataclasses import field
from uuid import UUID

from polyvisor.images import grub
from polyvisor.values import dataclass

SUITES = {"bookworm": "debian-12", "trixie": "debian-13"}
# Polyvisor's needs on a host (docs/guide.md, "Other hosts"), and what its user does there by hand.
_HOST_PACKAGES = (
    "python3",
    "qemu-utils",
    "util-linux-extra",
    "openssh-client",
    "gpgv",
    "nftables",
    "dnsmasq-base",
    "tcpdump",
)
_BENCH_PACKAGES = (
    "busybox-static",
    "fio",
    "sysbench",
    "iperf3",
    "stress-ng",
    "openssl",
    "rt-tests",  # hackbench, cyclictest
    "postgresql",  # with pgbench
    "nginx-light",
    "wrk",
    "gcc",
    "make",
    "libc6-dev",
    "linux-headers-amd64",  # what is compiled is a module of the kernel
)


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """A kind of Debian image.

    `data` are directories of package data whose `rootfs` and `boot` are copied into it, later ones over earlier ones. `user` is
    whom to log in as. `xen` is Xen's command line where the system is its dom0. Sizes are what is taken where nobody says.
    """

    kind: str
    about: str
    packages: tuple[str, ...] = ()
    data: tuple[str, ...] = ("debian",)
    user: str = "debian"
    xen: str | None = None
    firmware: tuple[str, ...] = ("bios", "uefi")
    size_gib: int = 4
    memory_mib: int = 512
    names: dict[str, str] = field(default_factory=dict)

    def name(self, suite: str) -> str:
        """What an image of `suite` is called where nobody says."""
        return self.names.get(suite, self.kind)

    def grub_config(self, root: UUID, cmdline: str) -> str:
        """The grub.cfg of a new image."""
        if self.xen is None:
            return grub.first_config(root, cmdline)
        return grub.first_xen_config(root, self.xen, cmdline)


FLAVOURS = {
    flavour.kind: flavour
    for flavour in (
        Flavour(kind="debian", about="a full system with cloud-init", names=SUITES),
        Flavour(
            kind="bench",
            about="a system with the programs that hypervisors are compared with",
            packages=_BENCH_PACKAGES,
            data=("debian", "lab", "bench"),
            user="root",
            size_gib=6,
            memory_mib=1024,
            names={"bookworm": "bench", "trixie": "bench-13"},
        ),
        Flavour(
            kind="lab-kvm",
            about="a host of the lab that runs KVM",
            packages=("qemu-system-x86", "ovmf", *_HOST_PACKAGES),
            data=("debian", "lab"),
            user="root",
            size_gib=12,
            memory_mib=3072,
            names={"bookworm": "lab-kvm", "trixie": "lab-kvm-13"},
        ),
        Flavour(
            kind="lab-xen",
            about="a host of the lab that runs Xen",
            packages=("xen-system-amd64", "qemu-system-xen", "grub-xen-host", *_HOST_PACKAGES),
            data=("debian", "lab", "lab-xen"),
            user="root",
            # The serial port is Xen's, which shares it with dom0. Dom0's memory is fixed: the rest is for guests.
            # Lazily restored FPU registers get mixed up where emulation runs PVH guests beside dom0 (docs/design/lab.md).
            xen="dom0_mem=2048M,max:2048M dom0_max_vcpus=2 spec-ctrl=eager-fpu console=com1 com1=115200,8n1",
            firmware=("bios",),  # by UEFI, Xen would need a boot loader entry of its own
            size_gib=12,
            memory_mib=4096,
            names={"bookworm": "lab-xen", "trixie": "lab-xen-13"},
        ),
    )
}
