"""The reset button of a domain, which `xl` has no word for: a call of libxenctrl, the library that `xl` itself stands on.

`xl trigger DOMAIN reset` does nothing on any guest, and a guest that hangs does not hear `xl reboot`. The hypervisor can end a
domain with the reason "reboot" (XEN_DOMCTL / SCHEDOP_remote_shutdown), upon which `xl` starts it anew, within the same VM.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from polyvisor.drivers.xen.listing import REBOOT
from polyvisor.errors import PolyvisorError, Unsupported

_DIRECTORIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


def shut_down(domain: int, reason: int = REBOOT) -> None:
    """End `domain` for `reason`, whatever its guest does; raises Unsupported without the library, PolyvisorError."""
    library = ctypes.CDLL(str(_library()), use_errno=True)
    library.xc_interface_open.restype = ctypes.c_void_p
    library.xc_interface_open.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    library.xc_domain_shutdown.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int]
    library.xc_interface_close.argtypes = [ctypes.c_void_p]
    if not (interface := library.xc_interface_open(None, None, 0)):
        raise PolyvisorError("libxenctrl can't reach the hypervisor", hint="this needs root")
    try:
        if library.xc_domain_shutdown(interface, domain, reason):
            raise PolyvisorError(f"Xen did not end domain {domain}: error {ctypes.get_errno()}")
    finally:
        library.xc_interface_close(interface)


def _library() -> Path:
    """The newest libxenctrl of this host."""
    found = [path for directory in _DIRECTORIES for path in sorted(Path(directory).glob("libxenctrl.so.*"))]
    if not found:
        raise Unsupported("there is no libxenctrl here, which presses a domain's reset button", hint="stop, then start")
    return found[-1]
