"""What a VM's directory says of its memory, and of its way to another host, beside what its driver has observed."""

from __future__ import annotations

from dataclasses import replace

from polyvisor.drivers.base import Observed
from polyvisor.host.store import VMDirectory
from polyvisor.status import VMState


def with_saved(vm: VMDirectory, observed: Observed) -> Observed:
    """What was `observed` of a VM that does not run, and what its directory says of its memory."""
    if not observed.state.alive:
        if vm.is_moving():
            from polyvisor.host.moves import describe

            return replace(observed, reason=describe(vm) or observed.reason)
        return Observed(state=VMState.SAVED) if vm.is_saved() else observed
    if vm.is_saved() and vm.is_restoring():
        reason = f"its memory is being read; if that was cut off: polyvisor start {vm.name}"
        return replace(observed, state=VMState.PAUSED, reason=reason)
    if observed.state is VMState.PAUSED and vm.is_saving():
        reason = f"its memory is being saved; if that was cut off: polyvisor resume {vm.name}, or save again"
        return replace(observed, reason=reason)
    return observed
