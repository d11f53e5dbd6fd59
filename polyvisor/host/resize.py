"""`set`: vCPUs, memory, and shares of CPUs and disks of a VM, changed in its record and, where that can be, at once.

Everything is checked first. Then the record is written, and then the hypervisor is told, one thing after the other; what it
was told is noted in the launch record. So a command that was killed leaves a record of what is wanted and a launch record of
what is in force: the difference is shown as pending, and the same command completes it. Where the hypervisor or the guest
refuses, all is put back. See docs/design/resize.md.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from polyvisor.drivers.base import Driver
from polyvisor.errors import InvalidInput, PolyvisorError, WrongState
from polyvisor.host.observed import waiting
from polyvisor.host.plan import choose_accelerator
from polyvisor.host.record import Launch, Record, resources_of
from polyvisor.host.store import VMDirectory
from polyvisor.spec.resources import LIMITS, SCHEDULING, SETTINGS, Changes, Resources
from polyvisor.spec.vm import DeviceModel
from polyvisor.status import Capabilities, Resized, Usage, VMState, VMStatus

if TYPE_CHECKING:
    from polyvisor.host.host import Host

NO_BALLOON = dict.fromkeys(("memory-add", "memory-remove"), "emulated devices have no balloon")
NO_ROOM = "it was started with room for {most}"


def asked(changes: Changes) -> tuple[str, ...]:
    """The settings that are to change."""
    return tuple(name for name in SETTINGS if getattr(changes, name) is not None)


def changed(record: Record, changes: Changes) -> Record:
    """The record as it is to be; raises InvalidInput for values that can't be meant."""
    values = {name: getattr(changes, name) for name in asked(changes)}
    if not values:
        raise InvalidInput("changes", "", "nothing is to change", hint="name a setting, as --vcpus 2")
    values |= {name: None for name in LIMITS if values.get(name) == 0}
    spec = replace(record.spec, **values)
    return replace(record, spec=spec, memory_mib=spec.memory_mib or record.memory_mib)


def at_once(
    given: Resources, wanted: Resources, names: tuple[str, ...], capabilities: Capabilities, launch: Launch
) -> tuple[Resources, dict[str, str]]:
    """What a VM that is alive can get now, and of the other settings in `names` the reason why they wait."""
    values, reasons = {}, {}
    for name in names:
        value, before = getattr(wanted, name), getattr(given, name)
        if value == before:
            values[name] = value
        elif reason := _refusal(name, value, given, capabilities, launch):
            reasons[name] = reason
        else:
            values[name] = value
    return replace(given, **values), reasons


def _refusal(name: str, value: int, given: Resources, capabilities: Capabilities, launch: Launch) -> str | None:
    """Why a setting can't become `value` now."""
    if name in ("vcpus_max", "memory_max_mib"):
        return "room is made at a start"
    feature = name.replace("_", "-")
    if name in ("vcpus", "memory_mib"):
        most = given.vcpus_max if name == "vcpus" else given.memory_max_mib
        if value > most:
            return NO_ROOM.format(most=most if name == "vcpus" else f"{most} MiB")
        what = "vcpus" if name == "vcpus" else "memory"
        feature = f"{what}-{'add' if value > getattr(given, name) else 'remove'}"
    return capabilities.refusal(feature, launch.hypervisor, launch.mode)


async def observed_usage(vm: VMDirectory, driver: Driver, status: VMStatus) -> Usage | None:
    """What a VM that is alive really has, where it answers."""
    if status.state in (VMState.RUNNING, VMState.PAUSED):
        with contextlib.suppress(PolyvisorError, OSError):
            return await driver.usage(vm)
    return None


async def change(host: Host, vm: VMDirectory, changes: Changes) -> Resized:
    """Change a VM whose lock is held; raises WrongState, TimedOut, Unsupported, InvalidInput, with nothing changed."""
    before = vm.record
    after = changed(before, changes)
    alive = await host.drivers.lives(vm)
    launch = vm.launch() if alive else None
    capabilities = await _checked(host, after, launch)
    reasons: dict[str, str] = {}
    if launch is None:
        if after != before:
            vm.write_record(after)
    else:
        reasons = await _change_alive(host, vm, launch, before, after, asked(changes), capabilities)
    status = await host._status(VMDirectory(vm.path))
    pending = waiting(after, vm.launch(), status.state)
    left = {each.setting for each in pending} | reasons.keys()
    applied = tuple(name for name in asked(changes) if name not in left) if alive else ()
    return Resized(status=status, applied=applied, pending=pending, reasons=reasons)


async def _checked(host: Host, record: Record, launch: Launch | None) -> Capabilities:
    """What the driver can do that the VM runs by, or will; raises where this host can't give what is asked."""
    from polyvisor.host.machine import check_room

    drivers = await host.capabilities()
    name = launch.hypervisor if launch else choose_accelerator(record.spec, *drivers).name
    return check_room(record.spec, record.memory_mib, name, drivers)


async def _change_alive(
    host: Host,
    vm: VMDirectory,
    launch: Launch,
    before: Record,
    after: Record,
    names: tuple[str, ...],
    capabilities: Capabilities,
) -> dict[str, str]:
    """Change a VM that is alive as far as that can be; returns why the rest waits."""
    driver = host.drivers.of(vm)
    if before.spec.devices is DeviceModel.EMULATED:
        capabilities = replace(capabilities, missing={**capabilities.missing, **NO_BALLOON})
    given = launch.resources or resources_of(before.spec, before.memory_mib)
    target, reasons = at_once(given, resources_of(after.spec, after.memory_mib), names, capabilities, launch)
    acts = [name for name in ("cpu_affinity", "memory_mib", "vcpus") if name not in reasons and _concerns(name, names)]
    await _require(vm, driver, [name for name in acts if name != "cpu_affinity"])
    if launch.resources is None:
        launch = replace(launch, resources=given)
        vm.write_launch(launch)
    vm.write_record(after)
    done: list[str] = []
    try:
        for name in acts:
            done.append(name)
            await _act(driver, vm, name, target)
            _note(vm, name, target)
    except BaseException as error:
        for name in reversed(done):
            with contextlib.suppress(PolyvisorError):
                await _act(driver, vm, name, given, wait=False)
                _note(vm, name, given)
        vm.write_record(before)
        if isinstance(error, PolyvisorError):
            error.about(f"VM '{vm.name}' was not changed")
        raise
    return reasons


def _concerns(act: str, names: tuple[str, ...]) -> bool:
    """Whether the act that is named after a setting is for one of those asked for: all scheduling is one act."""
    return any(name in names for name in (SCHEDULING if act == "cpu_affinity" else (act,)))


async def _act(driver: Driver, vm: VMDirectory, name: str, target: Resources, *, wait: bool = True) -> None:
    if name == "vcpus":
        await driver.set_vcpus(vm, target.vcpus)
    elif name == "memory_mib":
        await driver.set_memory(vm, target.memory_mib, wait=wait)
    else:
        await driver.set_scheduling(vm, target)


def _note(vm: VMDirectory, act: str, target: Resources) -> None:
    """Write into the launch record what the hypervisor was told."""
    launch = vm.launch()
    if launch is not None and launch.resources is not None:
        names = SCHEDULING if act == "cpu_affinity" else (act,)
        now = replace(launch.resources, **{name: getattr(target, name) for name in names})
        vm.write_launch(replace(launch, resources=now))


async def _require(vm: VMDirectory, driver: Driver, acts: list[str]) -> None:
    """Raise WrongState where a guest has to take part that does not run."""
    state = (await driver.inspect(vm)).state
    if vm.is_saved() and vm.is_restoring():
        from polyvisor.host.saved import still_restoring

        raise still_restoring(vm)
    if acts and state is not VMState.RUNNING:
        what = " and ".join("vCPUs" if name == "vcpus" else "memory" for name in acts)
        hint = f"let it go on first: polyvisor resume {vm.name}" if state is VMState.PAUSED else None
        raise WrongState(f"VM '{vm.name}' is {state}: its guest can't take part in changing {what}", hint=hint)


async def settle(vm: VMDirectory, driver: Driver) -> None:
    """Finish a start that was cut off before its last steps: how fast the disks are, and how much memory the guest has."""
    launch = vm.launch()
    given = launch.resources if launch else None
    if given is not None and given.limits_disks:
        with contextlib.suppress(PolyvisorError):
            await driver.set_scheduling(vm, given)
    if given is not None and given.memory_mib < given.memory_max_mib:
        with contextlib.suppress(PolyvisorError):
            await driver.set_memory(vm, given.memory_mib, wait=False)
