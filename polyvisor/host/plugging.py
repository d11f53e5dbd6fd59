"""How the disks and network cards of a VM become what its record says: at once where that can be, otherwise at a start.

The record is what is wanted, the launch record what the VM has; the difference is pending. The record is written first, then
the driver is told, then the launch record is written. What the driver was told, and the launch record does not say, since a
command was killed in between, is found out by `settle`. Each function here wants the VM's lock to be held, but for `seen`.
See docs/design/devices.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from polyvisor.drivers.base import BootDisk, BootNic, Driver
from polyvisor.errors import PolyvisorError, WrongState
from polyvisor.files import storage_errors, sync_directory
from polyvisor.host import disks
from polyvisor.host.moves import require_settled
from polyvisor.host.observed import devices_waiting
from polyvisor.host.plan import boot_nic, is_uefi, numbered
from polyvisor.host.record import Devices, Launch, Record, devices_of, kind_of, number_of
from polyvisor.host.store import VMDirectory
from polyvisor.images.image import Image
from polyvisor.network.ports import SSH_PORT, chosen_forwards, wanted_forwards
from polyvisor.operation import silent
from polyvisor.spec.forward import Forward, parse_forward
from polyvisor.spec.vm import DeviceModel
from polyvisor.status import VMState
from polyvisor.values import dataclass

if TYPE_CHECKING:
    from polyvisor.host.host import Host

FEATURES = ("disk-add", "disk-remove", "disk-grow", "nic-add", "nic-remove")
EMULATED = "emulated devices are what they were at the start"
OLDER = "an older Polyvisor has started it"


@dataclass(frozen=True, kw_only=True)
class Now:
    """A VM whose devices are to change: its record with all of them, how it runs (None: it is at rest), and why what waits."""

    record: Record
    launch: Launch | None
    image: Image
    state: VMState
    refusals: Mapping[str, str]

    @property
    def has(self) -> Devices:
        """What it has at this moment; at rest what its record says."""
        given = self.launch.devices if self.launch else None
        return given or devices_of(self.record)


async def seen(host: Host, vm: VMDirectory) -> Now:
    """A VM as it is, which nobody holds."""
    state = (await host._status(vm)).state
    launch = vm.launch() if state.keeps_devices else None
    return await _now(host, vm, state, launch)


async def looked(host: Host, vm: VMDirectory, verb: str) -> Now:
    """A VM whose devices may change, with what commands have left tidied that were killed; raises WrongState."""
    from polyvisor.host import snapshotting
    from polyvisor.host.saved import still_restoring

    require_settled(vm, verb)
    host._require_born(vm, verb)
    await snapshotting.ready(host, vm, silent)
    alive = await host.drivers.lives(vm)
    if vm.is_saved():
        if alive:
            raise still_restoring(vm)
        hint = f"start it first: polyvisor start {vm.name}"
        raise WrongState(f"VM '{vm.name}' is saved with the disks and cards that it has: it can't {verb}", hint=hint)
    state = (await host.drivers.of(vm).inspect(vm)).state
    if alive and state not in (VMState.RUNNING, VMState.PAUSED):
        raise WrongState(f"VM '{vm.name}' is {state}: it can't {verb}", hint=f"polyvisor kill {vm.name}")
    if not alive:
        await tidy(host, vm)
    return await _now(host, vm, state, await settle(host, vm) if alive else None)


async def _now(host: Host, vm: VMDirectory, state: VMState, launch: Launch | None) -> Now:
    record = disks.vm_record(vm)
    image = host.images.store.by_id(record.image_id)
    whole = numbered(record, image)
    if launch is not None and record.slots is None:  # nothing has been added or removed so far
        launch = replace(launch, devices=devices_of(whole))
    refusals: dict[str, str] = {}
    if launch is not None:
        capabilities = await host._capabilities_of(vm)
        for each in FEATURES:
            reason = capabilities.refusal(each, launch.hypervisor, launch.mode)
            if reason is None and is_uefi(record.spec, image):
                reason = capabilities.refusal(each, "uefi")
            if reason is not None:
                refusals[each] = reason
        if record.spec.devices is DeviceModel.EMULATED:
            refusals |= dict.fromkeys(FEATURES, EMULATED)
        if launch.devices is None:
            refusals |= dict.fromkeys(FEATURES, OLDER)
    return Now(record=whole, launch=launch, image=image, state=state, refusals=refusals)


async def settle(host: Host, vm: VMDirectory) -> Launch | None:
    """Let the launch record of a VM that is alive say which devices it has; returns it.

    A command may have been killed, or the guest have let go of a device when nobody waited any more.
    """
    record, launch = disks.vm_record(vm), VMDirectory(vm.path).launch()
    if launch is None or launch.devices is None or record.slots is None:
        return launch
    driver = host.drivers.of(vm)
    there = await driver.attached(vm)
    for name in (*launch.devices.disks, *launch.devices.nics):
        if name not in there:
            launch = _without_device(vm, driver, record, launch, name)
    for name in (*devices_of(record).disks, *devices_of(record).nics):
        if name in there and name not in (*_given(launch).disks, *_given(launch).nics):
            launch = _with_device(host, vm, driver, record, launch, name)
    return launch


async def require_in_force(host: Host, vm: VMDirectory, verb: str) -> None:
    """Raise WrongState where a VM that is alive has other disks and cards than its record says: memory would not fit it."""
    launch = await settle(host, vm)
    waiting = devices_waiting(disks.vm_record(vm), launch) if launch else ()
    if names := [each.setting for each in waiting if "none" in (each.now, each.then)]:
        hint = f"stop it and start it, then try again: polyvisor stop {vm.name}; polyvisor start {vm.name}"
        raise WrongState(f"VM '{vm.name}' can't {verb} while {', '.join(names)} wait for its next boot", hint=hint)


async def tidy(host: Host, vm: VMDirectory) -> None:
    """Let the files of a VM that is at rest be as its record says: disks that were to grow are grown, removed ones go."""
    record = disks.vm_record(vm)
    if record.slots is None:
        return
    drop_removed(vm, record, None)
    for disk, wanted in zip(disks.disks_of(host, record), record.spec.disks, strict=True):
        await disks.grow(vm.path / disk.path, wanted.size_gib)


def drop_removed(vm: VMDirectory, record: Record, has: Devices | None) -> None:
    """Remove the files of disks that neither the record names nor the VM has."""
    kept = {*devices_of(record).disks, *(has.disks if has else ())}
    with storage_errors(f"removing disks of VM '{vm.name}'"):
        for path in vm.disks.glob("disk*.qcow2"):
            if path.stem.partition("-")[0] not in kept:
                path.unlink(missing_ok=True)
        sync_directory(vm.disks)


def begin(vm: VMDirectory, now: Now, new: Record) -> Record:
    """Write the record that is wanted; returns the one before."""
    if now.launch is not None and now.launch != vm.launch():
        vm.write_launch(now.launch)  # with all devices by their names, while the record does not count on them yet
    before = disks.vm_record(vm)
    if new != before:
        vm.write_record(new)
    return before


def take_back(vm: VMDirectory, before: Record, error: BaseException) -> None:
    vm.write_record(before)
    if isinstance(error, PolyvisorError):
        error.about(f"VM '{vm.name}' was not changed")


def note(vm: VMDirectory, launch: Launch, has: Devices) -> Launch:
    """Write down what a VM has now."""
    launch = replace(launch, devices=has)
    vm.write_launch(launch)
    return launch


async def put_in_force(host: Host, vm: VMDirectory, now: Now, new: Record, name: str) -> None:
    """Write the record, and plug in the device `name` and all others of its kind that the VM has not, where that can be."""
    before = begin(vm, now, new)
    if (launch := now.launch) is None:
        return
    kind, driver = kind_of(name), host.drivers.of(vm)
    if f"{kind}-add" in now.refusals:
        return
    wanted, has = (each.disks if kind == "disk" else each.nics for each in (devices_of(new), now.has))
    try:
        for each in wanted:
            if each not in has:
                await driver.attach(vm, _device(host, new, each), new.slots or {})
                launch = _with_device(host, vm, driver, new, launch, each)
        if kind == "nic":
            await _lead_in(vm, driver, new, launch)
    except BaseException as error:
        with contextlib.suppress(
            PolyvisorError
        ):  # a guest that keeps it has what is wanted: the same command goes on from there
            if name not in has and name in await driver.attached(vm):
                await driver.detach(vm, name)
                _without_device(vm, driver, new, launch, name)
            take_back(vm, before, error)
            drop_removed(vm, numbered(before, now.image), now.has)
        raise


async def pull_out(host: Host, vm: VMDirectory, now: Now, new: Record, name: str) -> bool:
    """Write the record without a device, and let the VM do without, where that can be; returns whether it has not got it."""
    kind = kind_of(name)
    has = name in (*now.has.disks, *now.has.nics) if now.launch else False
    at_once = has and f"{kind}-remove" not in now.refusals
    if at_once and now.state is not VMState.RUNNING:
        hint = f"let it go on first: polyvisor resume {vm.name}"
        raise WrongState(f"VM '{vm.name}' is {now.state}: its guest can't let go of {name}", hint=hint)
    before = begin(vm, now, new)
    if now.launch is None or not at_once:
        return not has
    driver = host.drivers.of(vm)
    try:
        await driver.detach(vm, name)
    except BaseException as error:
        take_back(vm, before, error)
        raise
    launch = _without_device(vm, driver, now.record, now.launch, name)
    if kind == "nic":
        await _lead_in(vm, driver, new, launch)
    return True


async def _lead_in(vm: VMDirectory, driver: Driver, record: Record, launch: Launch) -> None:
    """Open the ports that lead to the first card on a user network, and to SSH by it, where they are not: as a start does."""
    has = _given(launch).nics
    names = list(devices_of(record).nics)
    name = next((each for each in names if has.get(each) == "user"), None)
    if name is None:
        return
    there = {(each.guest_port, each.protocol) for each in launch.forwards}
    wanted = wanted_forwards(record.spec.nics[names.index(name)].forwards, ssh=True)
    for forward in chosen_forwards(each for each in wanted if (each.guest_port, each.protocol) not in there):
        await driver.add_forward(vm, number_of(name), forward)
        launch = replace(launch, forwards=(*launch.forwards, forward))
        vm.write_launch(launch)


def _with_device(host: Host, vm: VMDirectory, driver: Driver, record: Record, launch: Launch, name: str) -> Launch:
    """Write down that a VM has a device more."""
    wanted, has = devices_of(record), _given(launch)
    if name in wanted.disks:
        has = replace(has, disks={**has.disks, name: wanted.disks[name]})
    else:
        has = replace(has, nics={**has.nics, name: wanted.nics[name]})
    return note(vm, driver.with_device(launch, _device(host, record, name), record.slots or {}), has)


def _without_device(vm: VMDirectory, driver: Driver, record: Record, launch: Launch, name: str) -> Launch:
    """Write down that a VM has a device less; `record` may name it still."""
    has = _given(launch)
    through = _forwards_through(record, launch, name) if name in has.nics else ()
    launch = driver.without_device(launch, name, record.slots or {})
    launch = replace(launch, forwards=tuple(each for each in launch.forwards if each not in through))
    left = Devices(
        disks={each: size for each, size in has.disks.items() if each != name},
        nics={each: network for each, network in has.nics.items() if each != name},
    )
    return note(vm, launch, left)


def _forwards_through(record: Record, launch: Launch, name: str) -> tuple[Forward, ...]:
    """The forwards that lead through a card: those of its spec and, through the first one on a user network, SSH's."""
    users = [each for each, network in _given(launch).nics.items() if network == "user"]
    names = list(devices_of(record).nics)
    if name not in users:
        return ()
    if users == [name]:
        return launch.forwards
    texts = record.spec.nics[names.index(name)].forwards if name in names else ()
    asked = [(each.guest_port, each.protocol) for each in map(parse_forward, texts)]
    asked += [(SSH_PORT, "tcp")] if name == users[0] else []
    return tuple(each for each in launch.forwards if (each.guest_port, each.protocol) in asked)


def _device(host: Host, record: Record, name: str) -> BootDisk | BootNic:
    """A device as the driver gets it; ports that lead to a card are opened afterwards."""
    if kind_of(name) == "disk":
        return next(disk for disk in disks.disks_of(host, record) if disk.name == name)
    return boot_nic(record, list(devices_of(record).nics).index(name), str(host.home.path))


def _given(launch: Launch) -> Devices:
    return launch.devices or Devices(disks={}, nics={})
