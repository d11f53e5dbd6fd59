"""Machines whose plans are kept as golden files, tests/golden/setup/*.txt: what a person is shown of them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from polyvisor.cli.context import Context
from polyvisor.cli.prepare import _show
from polyvisor.host.setup.facts import Facts
from polyvisor.host.setup.plan import plan
from polyvisor.host.setup.wish import Wish
from polyvisor.status import HostKind
from tests.unit.setups import OS_RELEASES, XEN_ENTRY, facts, grub

SETUP_DIRECTORY = Path(__file__).parent / "setup"
KVM, XEN = Wish(kind=HostKind.KVM), Wish(kind=HostKind.XEN)
_SERIAL = 'GRUB_TIMEOUT=0\nGRUB_TIMEOUT_STYLE=hidden\nGRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200n8"\n'

PLANS: dict[str, tuple[Facts, Wish]] = {
    **{f"{name}-kvm": (facts(name), KVM) for name in OS_RELEASES},
    **{f"{name}-xen": (facts(name), XEN) for name in OS_RELEASES},
    "cloud-kernel-serial-console-xen": (
        facts(cpu_flag=None, kvm=False, dom0_kernel=False, uefi=True, grub=grub(_SERIAL)),
        XEN,
    ),
    "no-module-kvm": (facts(kvm=False), KVM),
    "xen-host-kvm": (
        facts(
            xen="dom0_mem=1824M",
            kvm=False,
            installed=frozenset({"xen-hypervisor-common"}),
            grub=grub(default=XEN_ENTRY.format("dom0_mem=1824M")),
        ),
        KVM,
    ),
    "leap-15.6-xen-undo": (facts("leap-15.6"), Wish(kind=HostKind.XEN, undo=True)),
}


def shown(name: str) -> str:
    """What `polyvisor host prepare` prints for machine `name`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        _show(Context(), plan(*PLANS[name]))
    return out.getvalue()
