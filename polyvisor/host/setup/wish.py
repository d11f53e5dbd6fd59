"""What the user wants a machine to be made."""

from __future__ import annotations

from polyvisor.status import HostKind
from polyvisor.values import dataclass


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A kind of host (what the machine runs, or else KVM, where they do not say), or the way back from it.

    Memory in MiB, and vCPUs, of Xen's dom0 are None where they are left to us.
    """

    kind: HostKind | None = None
    undo: bool = False
    dom0_memory_mib: int | None = None
    dom0_vcpus: int | None = None
