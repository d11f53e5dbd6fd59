"""The status of a VM: what its driver has observed, and what its directory says of its memory, its resources and its moves."""

from __future__ import annotations

from dataclasses import replace

from polyvisor.drivers.base import Observed
from polyvisor.host.store import VMDirectory
from polyvisor.status import VMState, VMStatus


def status_of(vm: VMDirectory, observed: Observed) -> VMStatus:
    """The status of a VM that its driver has `observed`."""
    record, launch = vm.record, vm.launch()
    alive = observed.state.alive
    if observed.state is not VMState.RUNNING:
        observed = with_saved(vm, observed)
    given = launch.resources if launch and observed.state.keeps_devices else None
    pending: tuple[str, ...] = ()
    if launch is not None and given is not None:
        from polyvisor.host.resize import waiting

        pending = tuple(each.setting for each in waiting(record, launch, observed.state))
    return VMStatus(
        name=vm.name,
        id=record.id,
        state=observed.state,
        reason=observed.reason,
        image=record.spec.image,
        hypervisor=launch.hypervisor if launch else None,
        mode=launch.mode if launch else None,
        vcpus=given.vcpus if given else record.spec.vcpus,
        memory_mib=given.memory_mib if given else record.memory_mib,
        pid=observed.pid,
        created_at=record.created_at,
        started_at=launch.started_at if launch and alive else None,
        forwards=launch.forwards if launch and alive else (),
        labels=record.spec.labels,
        pending=pending,
    )


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
