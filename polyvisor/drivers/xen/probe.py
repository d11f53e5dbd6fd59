"""What a Xen host offers, by what its own toolstack says."""

from __future__ import annotations

from polyvisor.drivers.xen import xl
from polyvisor.errors import PolyvisorError
from polyvisor.status import Accelerator, Capabilities

NO_DRIVER = "this version of Polyvisor has no Xen driver yet"


async def probe() -> Capabilities | None:
    """The capabilities of the Xen below this system; None where it is no dom0."""
    if not xl.is_dom0():
        return None
    try:
        info = await xl.info()
    except PolyvisorError as error:
        reason = f"Xen runs here, but does not answer: {error.message}" + (f" ({error.hint})" if error.hint else "")
        absent = Accelerator(name="xen", available=False, reason=reason)
        return Capabilities(driver="xen", version=None, accelerators=(absent,), modes=(), missing={"start": reason})
    return Capabilities(
        driver="xen",
        version=info.version,
        accelerators=(
            Accelerator(name="xen", available=True, reason=f"virt_caps: {' '.join(info.virt_caps) or 'none'}"),
        ),
        modes=info.modes,
        missing={"start": NO_DRIVER, **xl.missing_modes(info.modes)},
    )
