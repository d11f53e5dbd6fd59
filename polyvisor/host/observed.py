"""The status of a VM: what its driver has observed, and what its directory says of its memory, its resources and its moves."""

from __future__ import annotations

from dataclasses import replace

from polyvisor.drivers.base import Observed
from polyvisor.host.record import Devices, Launch, Record, devices_of, resources_of
from polyvisor.host.store import VMDirectory
from polyvisor.spec.resources import SETTINGS, Resources
from polyvisor.spec.vm import disk_size
from polyvisor.status import Pending, VMState, VMStatus


def status_of(vm: VMDirectory, observed: Observed) -> VMStatus:
    """The status of a VM that its driver has `observed`."""
    record, launch = vm.record, vm.launch()
    alive = observed.state.alive
    if observed.state is not VMState.RUNNING:
        observed = with_saved(vm, observed)
    given = launch.resources if launch and observed.state.keeps_devices else None
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
        pending=tuple(each.setting for each in waiting(record, launch, observed.state)),
    )


def with_saved(vm: VMDirectory, observed: Observed) -> Observed:
    """What was `observed` of a VM that does not run, and what its directory says of its memory."""
    if vm.is_unborn():
        return replace(observed, reason=f"it is being forked; if that was cut off: polyvisor rm --force {vm.name}")
    if observed.state is VMState.PAUSED and vm.is_forking():
        reason = f"its memory is being copied; if that was cut off: polyvisor resume {vm.name}, or fork again"
        return replace(observed, reason=reason)
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
    if observed.state is VMState.PAUSED and vm.is_being_kept():
        reason = f"a snapshot is being made; if that was cut off: polyvisor resume {vm.name}"
        return replace(observed, reason=reason)
    return observed


def waiting(record: Record, launch: Launch | None, state: VMState) -> tuple[Pending, ...]:
    """What is other at the next boot of a VM that is alive, or saved, than it is now.

    Room for more is a change only where the spec says how much is wanted: otherwise it follows what there is.
    """
    if not state.keeps_devices or launch is None or (given := launch.resources) is None:
        return ()
    wanted = resources_of(record.spec, record.memory_mib)
    return (*_settings_waiting(record, given, wanted), *devices_waiting(record, launch))


def _settings_waiting(record: Record, given: Resources, wanted: Resources) -> tuple[Pending, ...]:
    return tuple(
        Pending(setting=name, now=shown(name, now), then=shown(name, then))
        for name in SETTINGS
        if (now := getattr(given, name)) != (then := getattr(wanted, name))
        and (name not in ("vcpus_max", "memory_max_mib") or getattr(record.spec, name) is not None)
    )


def devices_waiting(record: Record, launch: Launch) -> tuple[Pending, ...]:
    """The disks and cards that come, go or grow at the next boot; none where they are as the VM was made."""
    if record.slots is None or (has := launch.devices) is None:
        return ()
    wanted = devices_of(record)
    return tuple(
        Pending(setting=name, now=before, then=after)
        for now, then in ((_disks_shown(has), _disks_shown(wanted)), (_nics_shown(has), _nics_shown(wanted)))
        for name in {**now, **then}
        if (before := now.get(name, "none")) != (after := then.get(name, "none"))
    )


def _disks_shown(devices: Devices) -> dict[str, str]:
    return {name: disk_size(size_gib) for name, size_gib in devices.disks.items()}


def _nics_shown(devices: Devices) -> dict[str, str]:
    """A card on network `none` is not none."""
    return {name: f"on {network}" for name, network in devices.nics.items()}


def shown(name: str, value: int | str | None) -> str:
    """The value of a setting for people, with its unit."""
    if value is None:
        return "none"
    units = {"cpu_limit": "%", "disk_iops_limit": " requests a second", "disk_rate_limit_mib": " MiB a second"}
    return f"{value}{units.get(name, ' MiB' if name.endswith('_mib') else '')}"
