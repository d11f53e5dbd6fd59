"""The power button of a VM, and waiting for its guest to heed it."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from polyvisor.errors import PolyvisorError
from polyvisor.host.store import VMDirectory
from polyvisor.operation import Progress, Step
from polyvisor.status import VMState
from polyvisor.waiting import pause

if TYPE_CHECKING:
    from polyvisor.host.host import Host

_POLL_S = 0.1
_AGAIN_S = 5.0  # a guest that answers by SSH may not have loaded yet what listens to its power button


async def shut_down(host: Host, vm: VMDirectory, timeout_s: float, progress: Progress) -> bool:
    """Press the power button and wait for the guest to end the VM; returns whether it has. A guest that is paused goes on."""
    began = time.monotonic()
    observed = await host.drivers.of(vm).inspect(vm)
    restoring = (vm.is_saved() and vm.is_restoring()) or vm.is_unborn()
    if observed.state in (VMState.PAUSED, VMState.RUNNING) and not restoring:
        await _press(host, vm, observed.state)
        again_s = _AGAIN_S
        while vm.alive() and (waited := time.monotonic() - began) < timeout_s:
            progress(Step("shutting down", int(waited), int(timeout_s), "s"))
            await pause(_POLL_S)
            if waited > again_s:
                again_s = waited + _AGAIN_S
                with suppress(PolyvisorError):  # a guest on its way down need not listen
                    await _press(host, vm, VMState.RUNNING)
    return not vm.alive()


async def _press(host: Host, vm: VMDirectory, state: VMState) -> None:
    try:
        if state is VMState.PAUSED:
            host._let_run(vm)
            await host.drivers.of(vm).resume(vm)
        await host.drivers.of(vm).shutdown(vm)
    except PolyvisorError:
        await pause(_POLL_S)
        if vm.alive():  # or it has ended on its own meanwhile
            raise
