"""The verbs about disks and network cards: a VM gets them, loses them, or, of disks, has more room on them. See `plugging.py`.

Each verb checks everything first, then writes a new disk's file, then the record; the rest is `plugging`'s. A removed disk's
file goes last. So whoever is killed in between leaves a VM that starts, and the same command completes it. Those that change
something want the VM's lock to be held. See docs/design/devices.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from polyvisor.errors import AlreadyExists, InvalidInput, NotFound, WrongState
from polyvisor.files import storage_errors, sync_directory, sync_files
from polyvisor.host import disks
from polyvisor.host.plan import check_devices, check_networks, choose_accelerator, disk_path, first_slot, mac_addresses
from polyvisor.host.plugging import Now, begin, drop_removed, looked, note, pull_out, put_in_force, seen, take_back
from polyvisor.host.record import devices_of, kind_of, number_of
from polyvisor.host.store import VMDirectory
from polyvisor.images import qemu_img
from polyvisor.spec.vm import MAX_DISKS, MAX_NICS, DeviceModel, Disk, Nic, disk_size
from polyvisor.status import DiskStatus, NicStatus
from polyvisor.storage.layers import virtual_size

if TYPE_CHECKING:
    from polyvisor.host.host import Host

T = TypeVar("T")
_MIB, _GIB = 1 << 20, 1 << 30
_SLOTS = range(31)  # of a PCI bus; on the last there is something already in machines for UEFI


# Looking


async def list_disks(host: Host, vm: VMDirectory) -> list[DiskStatus]:
    """The disks of a VM as they are now; needs no lock."""
    now = await seen(host, vm)
    waits = _waits(now, devices_of(now.record).disks, now.has.disks, "disk")
    paths = {disk.name: vm.path / disk.path for disk in disks.disks_of(host, now.record)}
    generation = now.record.generation
    paths |= {name: vm.path / disk_path(number_of(name), generation) for name in now.has.disks if name not in paths}
    with storage_errors(f"looking at the disks of VM '{vm.name}'"):
        return [
            DiskStatus(name=name, size_mib=virtual_size(path) // _MIB, pending=pending, reason=reason)
            for name, path in paths.items()
            for pending, reason in [waits.get(name, (None, None))]
        ]


async def list_nics(host: Host, vm: VMDirectory) -> list[NicStatus]:
    """The network cards of a VM; needs no lock."""
    now = await seen(host, vm)
    wanted = devices_of(now.record).nics
    networks = {**wanted, **now.has.nics}
    waits = _waits(now, wanted, now.has.nics, "nic")
    macs = dict(zip(wanted, mac_addresses(now.record), strict=True))
    return [
        NicStatus(name=name, network=network, mac=macs.get(name, ""), pending=pending, reason=reason)
        for name, network in networks.items()
        for pending, reason in [waits.get(name, (None, None))]
    ]


def _waits(
    now: Now, wanted: Mapping[str, T], has: Mapping[str, T], kind: str
) -> dict[str, tuple[str | None, str | None]]:
    """What waits for the next boot, by the name of the device, and why."""
    found: dict[str, tuple[str | None, str | None]] = {}
    for name in {**wanted, **has}:
        if name not in has:
            found[name] = "added at the next boot", now.refusals.get(f"{kind}-add")
        elif name not in wanted:
            found[name] = "removed at the next boot", now.refusals.get(f"{kind}-remove")
        elif wanted[name] != has[name]:
            found[name] = f"grown to {wanted[name]} GiB at the next boot", now.refusals.get(f"{kind}-grow")
    return found


# Disks


async def add_disk(host: Host, vm: VMDirectory, size_gib: int, name: str | None) -> None:
    """Give a VM an empty disk, named `name` or as the first name that is free; see `HostApi.disk_add`."""
    disk = Disk(size_gib=size_gib)
    now = await looked(host, vm, "get another disk")
    wanted = devices_of(now.record).disks
    name = name or _free("disk", MAX_DISKS, {*wanted, *now.has.disks})
    _check_name(name, "disk", MAX_DISKS)
    if name in wanted:
        if wanted[name] != size_gib:
            raise _there_is(vm, name, disk_size(wanted[name]))
        await put_in_force(host, vm, now, now.record, name)
        return
    _require_free_name(vm, now, name)
    spec = now.record.spec
    layers = tuple(now.record.layer(i) for i in range(len(spec.disks)))
    new = replace(
        now.record,
        spec=replace(spec, disks=(*spec.disks, disk)),
        disk_numbers=(*now.record.disk_numbers, number_of(name)),
        layers=(*layers, None) if any(layers) else (),
        slots=_slots(now, name, fixed=spec.devices is DeviceModel.EMULATED),
    )
    check_devices(new.spec, now.image)
    path = vm.path / disk_path(number_of(name), new.generation)
    await qemu_img.create_blank(path, size_gib * _GIB // _MIB)
    disks.give_to_user([path], new.user)
    with storage_errors(f"making {name} of VM '{vm.name}'"):
        sync_files(path)
        sync_directory(vm.disks)
    await put_in_force(host, vm, now, new, name)


async def grow_disk(host: Host, vm: VMDirectory, name: str, size_gib: int) -> None:
    """Make a disk larger; see `HostApi.disk_grow`."""
    Disk(size_gib=size_gib)
    now = await looked(host, vm, "get a larger disk")
    record = now.record
    index = _index(vm, name, devices_of(record).disks, "disk")
    disk = disks.disks_of(host, record)[index]
    with storage_errors(f"looking at {name} of VM '{vm.name}'"):
        size = virtual_size(vm.path / disk.path)
    least = max(size, (record.spec.disks[index].size_gib or 0) * _GIB)
    if size_gib * _GIB < least:
        problem = f"is less than {name} has ({least // _MIB} MiB)"
        raise InvalidInput("size_gib", size_gib, problem, hint="disks only ever grow; a smaller one: disk add")
    sizes = (*record.spec.disks[:index], Disk(size_gib=size_gib), *record.spec.disks[index + 1 :])
    new = replace(record, spec=replace(record.spec, disks=sizes))
    waits = now.launch is not None and name in now.has.disks and "disk-grow" in now.refusals
    before = begin(vm, now, new)
    try:
        if now.launch is None or name not in now.has.disks:
            await disks.grow(vm.path / disk.path, size_gib)
        elif not waits:
            await disks.settle(host, vm)
            await host.drivers.of(vm).grow_disk(vm, disk, size_gib * _GIB)
            note(vm, now.launch, replace(now.has, disks={**now.has.disks, name: size_gib}))
    except BaseException as error:
        take_back(vm, before, error)
        raise


async def remove_disk(host: Host, vm: VMDirectory, name: str, *, force: bool) -> None:
    """Remove a disk and what is on it; see `HostApi.disk_remove`."""
    now = await looked(host, vm, "lose a disk")
    record = now.record
    wanted = devices_of(record).disks
    index = _index(vm, name, {**wanted, **now.has.disks}, "disk")
    if index == 0 and now.image.disk is not None:
        raise InvalidInput(
            "disk", name, "has the VM's image on it", hint=f"to remove all of it: polyvisor rm {vm.name}"
        )
    new = record
    if name in wanted:
        if not force:
            hint = f"polyvisor disk rm --force {vm.name} {name}"
            raise WrongState(f"VM '{vm.name}': what is on {name} would be lost", hint=hint)
        spec, layers = record.spec, _without(record.layers, index)
        new = replace(
            record,
            spec=replace(spec, disks=_without(spec.disks, index)),
            disk_numbers=_without(record.disk_numbers, index),
            layers=layers if any(layers) else (),
        )
    if await pull_out(host, vm, now, new, name):
        launch = vm.launch() if now.launch else None
        drop_removed(vm, new, launch.devices if launch else None)
        host._sweep_layers()


# Network cards


async def add_nic(host: Host, vm: VMDirectory, nic: Nic, name: str | None) -> None:
    """Give a VM a network card; see `HostApi.nic_add`."""
    now = await looked(host, vm, "get another network card")
    wanted = devices_of(now.record).nics
    name = name or _free("nic", MAX_NICS, {*wanted, *now.has.nics})
    _check_name(name, "nic", MAX_NICS)
    if name in wanted:
        there = now.record.spec.nics[list(wanted).index(name)]
        if (there.network, nic.mac or there.mac) != (nic.network, there.mac):
            raise _there_is(vm, name, there.network)
        await put_in_force(host, vm, now, now.record, name)
        return
    _require_free_name(vm, now, name)
    spec = now.record.spec
    new = replace(
        now.record,
        spec=replace(spec, nics=(*spec.nics, nic)),
        nic_numbers=(*now.record.nic_numbers, number_of(name)),
        slots=_slots(now, name),
    )
    drivers = await host.capabilities()
    runs_on = now.launch.hypervisor if now.launch else choose_accelerator(new.spec, *drivers).name
    for xen in (each for each in drivers if each.driver == runs_on):
        check_networks(new.spec, xen)
    *others, mac = mac_addresses(new)
    if mac in others:
        raise InvalidInput("mac", mac, "is that of another card of this VM", hint="leave it out, or choose another")
    await put_in_force(host, vm, now, new, name)


async def remove_nic(host: Host, vm: VMDirectory, name: str) -> None:
    """Remove a network card and the forwards through it; see `HostApi.nic_remove`."""
    now = await looked(host, vm, "lose a network card")
    record = now.record
    wanted = devices_of(record).nics
    index = _index(vm, name, {**wanted, **now.has.nics}, "nic")
    new = record
    if name in wanted:
        nics = _without(record.spec.nics, index)
        new = replace(record, spec=replace(record.spec, nics=nics), nic_numbers=_without(record.nic_numbers, index))
    await pull_out(host, vm, now, new, name)


# What both have in common


def _slots(now: Now, name: str, *, fixed: bool = False) -> dict[str, int]:
    """The places of all devices and of a new one, unless that is `fixed` elsewhere; raises WrongState where there is none."""
    has = {*now.has.disks, *now.has.nics, *devices_of(now.record).disks, *devices_of(now.record).nics}
    kept = {each: slot for each, slot in (now.record.slots or {}).items() if each in has or not each[-1].isdigit()}
    if fixed:
        return kept
    last = max(kept.values())  # behind all others, where there is room, or the guest's next boot would count them anew
    places = [*_SLOTS[last + 1 :], *_SLOTS[first_slot(now.record.spec, now.image) :]]
    free = [slot for slot in places if slot not in kept.values()]
    if not free:
        hint = "those that were removed take theirs until the next boot: stop it and start it"
        raise WrongState("its PCI bus has no place left", hint=hint)
    return {**kept, name: free[0]}


def _free(kind: str, most: int, taken: Collection[str]) -> str:
    """The first free name; where there is none, one that is refused as too many."""
    return next((each for i in range(most) if (each := f"{kind}{i}") not in taken), f"{kind}{most}")


def _check_name(name: str, kind: str, most: int) -> None:
    if name not in [f"{kind}{i}" for i in range(most)]:
        raise InvalidInput(kind, name, f"is no name for a {kind}", hint=f"use {kind}0 to {kind}{most - 1}")


def _require_free_name(vm: VMDirectory, now: Now, name: str) -> None:
    if name in (*now.has.disks, *now.has.nics):
        hint = f"take another name; or stop it and start it: polyvisor stop {vm.name}"
        raise WrongState(f"VM '{vm.name}' has the removed {name} until its next boot", hint=hint)


def _there_is(vm: VMDirectory, name: str, what: str) -> AlreadyExists:
    kind = kind_of(name)
    return AlreadyExists(f"VM '{vm.name}' has a {name} already: {what}", hint=f"polyvisor {kind} ls {vm.name}")


def _index(vm: VMDirectory, name: str, there: Mapping[str, object], kind: str) -> int:
    if name not in there:
        hint = f"it has {', '.join(there) or 'none'}"
        raise NotFound(f"VM '{vm.name}' has no {kind} '{name}'", hint=hint)
    return list(there).index(name)


def _without(values: tuple[T, ...], index: int) -> tuple[T, ...]:
    return (*values[:index], *values[index + 1 :])
