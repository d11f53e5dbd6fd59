"""Polyvisor: one virtual machine, any hypervisor.

    from polyvisor import Host, VMSpec

`Host` does everything that the command line does, as coroutines on typed values; see `polyvisor.host.api.HostApi` for the
verbs. Names are imported when they are first used: the command line's start-up must not pay for them.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # the real one costs the import of typing
if TYPE_CHECKING:
    from typing import Any

    from polyvisor.errors import PolyvisorError as PolyvisorError
    from polyvisor.host.api import HostApi as HostApi
    from polyvisor.host.host import Host as Host
    from polyvisor.spec.forward import Forward as Forward
    from polyvisor.spec.vm import Disk as Disk
    from polyvisor.spec.vm import Nic as Nic
    from polyvisor.spec.vm import VMSpec as VMSpec
    from polyvisor.status import VMState as VMState
    from polyvisor.status import VMStatus as VMStatus

__version__ = "0.1.0"

_NAMES = {
    "PolyvisorError": "polyvisor.errors",
    "HostApi": "polyvisor.host.api",
    "Host": "polyvisor.host.host",
    "Forward": "polyvisor.spec.forward",
    "Disk": "polyvisor.spec.vm",
    "Nic": "polyvisor.spec.vm",
    "VMSpec": "polyvisor.spec.vm",
    "VMState": "polyvisor.status",
    "VMStatus": "polyvisor.status",
}
__all__ = ["__version__", *_NAMES]  # noqa: PLE0604 - they are names, taken from one table


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'polyvisor' has no attribute '{name}'")
    return getattr(import_module(_NAMES[name]), name)
