"""What `xl` has no word for, by calls of the libraries that `xl` itself stands on: libxenctrl, libxenguest, libxenstore.

*The reset button*: `xl trigger DOMAIN reset` does nothing on any guest, and a guest that hangs does not hear `xl reboot`. The
hypervisor can end a domain with the reason "reboot" (XEN_DOMCTL / SCHEDOP_remote_shutdown), upon which `xl` starts it anew,
within the same VM.

*Going on after a suspend*: a guest that has suspended itself for an `xl save` which was killed stays so. Its hypercall is made
to return, and xenstore is told, as libxl does it (libxl__domain_resume in libxl_dom_suspend.c). `xl resume` came with 4.20.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from polyvisor.drivers.xen.listing import REBOOT
from polyvisor.errors import PolyvisorError, Unsupported

_DIRECTORIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


def shut_down(domain: int, reason: int = REBOOT) -> None:
    """End `domain` for `reason`, whatever its guest does; raises Unsupported without the library, PolyvisorError."""
    with _hypervisor() as (library, interface):
        library.xc_domain_shutdown.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int]
        if library.xc_domain_shutdown(interface, domain, reason):
            raise PolyvisorError(f"Xen did not end domain {domain}: error {ctypes.get_errno()}")


def resume(domain: int) -> None:
    """Let `domain`, which has suspended itself, go on as if it had not; raises as `shut_down` does."""
    with _hypervisor() as (_, interface):
        guest = ctypes.CDLL(str(_library("libxenguest")), use_errno=True)
        guest.xc_domain_resume.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int]
        if guest.xc_domain_resume(interface, domain, 1):
            raise PolyvisorError(f"Xen did not let domain {domain} go on: error {ctypes.get_errno()}")
    store = ctypes.CDLL(str(_library("libxenstore")), use_errno=True)
    store.xs_open.restype = ctypes.c_void_p
    store.xs_open.argtypes = [ctypes.c_ulong]
    store.xs_resume_domain.restype = ctypes.c_bool
    store.xs_resume_domain.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    store.xs_close.argtypes = [ctypes.c_void_p]
    if not (connection := store.xs_open(0)):
        raise PolyvisorError("libxenstore can't reach xenstore", hint="is xenstored there? polyvisor doctor")
    try:
        if not store.xs_resume_domain(connection, domain):
            raise PolyvisorError(f"xenstore does not know domain {domain}: error {ctypes.get_errno()}")
    finally:
        store.xs_close(connection)


@contextlib.contextmanager
def _hypervisor() -> Iterator[tuple[ctypes.CDLL, int]]:
    """libxenctrl, and its connection to the hypervisor."""
    library = ctypes.CDLL(str(_library("libxenctrl")), use_errno=True)
    library.xc_interface_open.restype = ctypes.c_void_p
    library.xc_interface_open.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    library.xc_interface_close.argtypes = [ctypes.c_void_p]
    if not (interface := library.xc_interface_open(None, None, 0)):
        raise PolyvisorError("libxenctrl can't reach the hypervisor", hint="this needs root")
    try:
        yield library, interface
    finally:
        library.xc_interface_close(interface)


def _library(name: str) -> Path:
    """The newest library `name` of this host."""
    found = [path for directory in _DIRECTORIES for path in sorted(Path(directory).glob(f"{name}.so.*"))]
    if not found:
        raise Unsupported(f"there is no {name} here, which Xen's own tools stand on", hint="kill the VM, then start it")
    return found[-1]
