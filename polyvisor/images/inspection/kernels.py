"""From a kernel and an initramfs, wherever they lie, to what is told of them."""

from __future__ import annotations

from dataclasses import replace

from polyvisor.images.inspection.budget import Budget, Unreadable
from polyvisor.images.inspection.drivers import XEN_PV, XEN_PVH, Assumed, Known, locate
from polyvisor.images.inspection.findings import KernelFound
from polyvisor.images.inspection.initrd import read_initrd
from polyvisor.images.inspection.kernel import read_kernel
from polyvisor.images.inspection.unpacking import packing_of
from polyvisor.values import dataclass

CONTENT = "its content"


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What the system's disk says of the kernel of a version; None for what is not there."""

    settings: dict[str, str] | None = None
    built_in: frozenset[str] | None = None
    modules: frozenset[str] | None = None
    assumed: Assumed | None = None


def describe_kernel(path: str, data: bytes, budget: Budget) -> KernelFound:
    """The kernel in `data`, by what it says itself; raises Spent alone."""
    try:
        kernel = read_kernel(data, budget)
    except Unreadable as error:
        return KernelFound(path=path, version=None, architecture="unknown", packing=None, problem=str(error))
    return KernelFound(
        path=path,
        version=kernel.version,
        architecture=kernel.architecture,
        packing=kernel.packing,
        xen_pv=kernel.xen_pv,
        xen_pvh=kernel.xen_pvh,
        known_by="its ELF notes" if kernel.xen_pv is not None else "",
        problem=kernel.problem,
    )


def with_drivers(
    kernel: KernelFound, initrd: str | None, data: bytes | None, beside: Beside, budget: Budget, problem: str = ""
) -> KernelFound:
    """`kernel` with where its drivers are, and what its configuration says of Xen where its notes did not.

    `data` is the content of its initramfs at `initrd`, None with a `problem` where that could not be read.
    """
    known = Known(settings=beside.settings, built_in=beside.built_in, modules=beside.modules)
    if initrd is None:
        known = replace(known, initrd=frozenset())
        return _located(kernel, known, beside)
    kernel = replace(kernel, initrd=initrd, initrd_problem=problem or None)
    if data is not None:
        kernel = replace(kernel, initrd_packing=packing_of(data[:16]))
        try:
            found = read_initrd(data, budget)
        except Unreadable as error:
            kernel = replace(kernel, initrd_problem=str(error))
        else:
            kernel = replace(kernel, initrd_packing=found.packing, initrd_known_by=CONTENT)
            known = replace(known, initrd=found.modules, built_in=known.built_in or found.built_in or None)
            return _located(kernel, known, beside)
    if beside.assumed is not None:
        kernel = replace(kernel, initrd_known_by=beside.assumed.known_by)
        known = replace(known, assumed=beside.assumed)
    return _located(kernel, known, beside)


def _located(kernel: KernelFound, known: Known, beside: Beside) -> KernelFound:
    return _with_settings(replace(kernel, drivers=locate(known)), beside.settings)


def _with_settings(kernel: KernelFound, settings: dict[str, str] | None) -> KernelFound:
    """Xen's modes as the kernel's configuration has them, which knows more of pvh than the notes do."""
    if settings is None:
        return kernel
    pv, pvh = settings.get(XEN_PV) == "y", settings.get(XEN_PVH) == "y"
    if kernel.xen_pv is None:
        return replace(kernel, xen_pv=pv, xen_pvh=pvh, known_by="its configuration")
    return replace(kernel, xen_pvh=kernel.xen_pvh and pvh)
