"""The disks of a VM: which files they are, and freezing them.

To freeze is to put what the VM has written so far under its record as layers (see `storage/layers.py`), and new, empty
overlays above them. The record moves first, then the hypervisor's process: where a command is killed between the two, that
process writes to what the record takes for frozen, and the next start finds all of it below an empty overlay. So nothing is
lost, and whoever wants to stand on a layer calls `settle` before, which lets the process follow. See docs/design/snapshots.md.

Each function here wants the VM's lock to be held.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.drivers.base import BootDisk
from polyvisor.errors import NotFound, PolyvisorError, TimedOut, WrongState
from polyvisor.files import storage_errors, sync_directory, sync_files
from polyvisor.host.plan import boot_disks, disk_path
from polyvisor.host.record import Record
from polyvisor.host.store import VMDirectory
from polyvisor.images import qemu_img
from polyvisor.storage.layers import Layer, virtual_size

if TYPE_CHECKING:
    from polyvisor.host.host import Host

_GIB = 1 << 30
MAX_LAYERS = 100  # every read of what was never written goes through all of them


def disks_of(host: Host, record: Record) -> tuple[BootDisk, ...]:
    """The disks of a VM with this record, each with all that it stands on."""
    image = host.images.store.by_id(record.image_id)
    layers = [host.layers.files(layer) for layer in record.layers]
    return boot_disks(record, image, host.images.store.directory(image), layers)


async def freeze(host: Host, vm: VMDirectory) -> Record:
    """Freeze the disks of a VM, running or not, at one moment; returns its new record, whose `layers` they are.

    A VM without disks is left as it is. Where it fails nothing has changed. A running VM's guest goes on, so its disks are as
    after a power cut; who wants more pauses it.
    """
    await settle(host, vm)
    record = vm_record(vm)
    before = disks_of(host, record)
    if not before:
        return record
    if (deepest := max(len(host.layers.chain(layer)) for layer in (*record.layers, None))) >= MAX_LAYERS:
        hint = f"stop it, and remove snapshots that nobody needs: polyvisor snapshot rm {vm.name} …"
        raise WrongState(f"VM '{vm.name}': its disks stand on {deepest} layers already", hint=hint)
    frozen = [(vm.path / disk.path, record.layer(i)) for i, disk in enumerate(before)]
    with host.layers.frozen(frozen, vm.name) as layers:
        new = replace(record, layers=tuple(layer.id for layer in layers), generation=record.generation + 1)
        try:
            await make_overlays(host, vm.path, new, layers)
            await _move_on(host, vm, new)
        except TimedOut:
            raise  # it may have been done all the same, which the records are ready for
        except PolyvisorError:
            _take_back(host, vm, record)
            raise
    settled(host, vm, new)
    return new


async def settle(host: Host, vm: VMDirectory) -> None:
    """Let a VM that is alive write to the disks of its record, where a command was killed that was to see to it."""
    record = vm_record(vm)
    if vm.alive() and record.layers:
        await host.drivers.of(vm).switch_disks(vm, disks_of(host, record))
    if not vm.is_saved():
        settled(host, vm, record)


def settled(host: Host, vm: VMDirectory, record: Record) -> None:
    """All that the VM writes from now on goes to the overlays of `record`: seal its layers, drop earlier names of theirs."""
    for top in record.layers:
        host.layers.seal(*(layer.id for layer in host.layers.chain(top) if host.layers.file(layer.id).exists()))
    drop_others(vm, record)


def drop_others(vm: VMDirectory, record: Record) -> None:
    """Remove overlays that are not those of `record`: commands that were killed, or have failed, have left them."""
    with storage_errors(f"tidying the disks of VM '{vm.name}'"):
        for path in vm.disks.glob("disk*.qcow2"):
            if generation_of(path) != record.generation:
                path.unlink(missing_ok=True)


def generation_of(overlay: Path) -> int:
    """The generation that stands in an overlay's name, as `disk_path` writes it."""
    return int(overlay.stem.partition("-")[2] or 0)


async def make_overlays(
    host: Host, directory: Path, record: Record, layers: Sequence[Layer | None], *, durable: bool = True
) -> None:
    """Make the empty overlays of `record` in a VM's `directory`, on `layers`; they are durable, unless the caller sees to that.

    One that a killed command has left is replaced. A disk without a layer below is not this function's to make.
    """
    made = []
    for i, layer in enumerate(layers):
        if layer is not None:
            made.append(path := directory / disk_path(record.disk_number(i), record.generation))
            await qemu_img.create_on_layer(path, host.layers.file(layer.id), layer.size)
    give_to_user(made, record.user)
    if durable:
        with storage_errors("making overlays"):
            sync_files(*made)
            sync_directory(directory / "disks")


async def grow(path: Path, size_gib: int | None) -> None:
    """Let a disk that nothing has open be as large as the spec says; one that is, or is larger, stays as it is."""
    with storage_errors(f"looking at {path}"):
        size = virtual_size(path)
    if size_gib and size_gib * _GIB > size:
        await qemu_img.grow(path, size_gib * _GIB)


def give_to_user(paths: Iterable[Path], user: int | None) -> None:
    """Let the VM's process, where it is a user of its own, have these files."""
    if user is None:
        return
    with storage_errors("giving disks to their VM"):
        for path in paths:
            os.chown(path, user, user)


def vm_record(vm: VMDirectory) -> Record:
    """The record as it is now: a `VMDirectory` keeps the one that it has read first."""
    return VMDirectory(vm.path).record


async def _move_on(host: Host, vm: VMDirectory, new: Record) -> None:
    """The record first, then how it runs, then the process that runs it: at each moment a start finds all that was written."""
    vm.write_record(new)
    if not vm.alive():
        return
    disks, driver = disks_of(host, new), host.drivers.of(vm)
    if launch := vm.launch():
        vm.write_launch(driver.with_disks(launch, disks))
    await driver.switch_disks(vm, disks)


def _take_back(host: Host, vm: VMDirectory, old: Record) -> None:
    """Let all be as before `_move_on`, in the opposite order; the layers are for `sweep`."""
    if vm.alive() and (launch := vm.launch()):
        vm.write_launch(host.drivers.of(vm).with_disks(launch, disks_of(host, old)))
    if vm_record(vm) != old:
        vm.write_record(old)
    drop_others(vm, old)


def standing(host: Host) -> set[str]:
    """The layers on which VMs and their snapshots stand; raises PolyvisorError where a record can't be read."""
    from polyvisor.host import templates
    from polyvisor.host.snapshots import layers_of

    found: set[str] = set()
    for name in host.store.names():
        vm = host.store.directory(name)
        with contextlib.suppress(NotFound):  # it was removed just now
            found |= {layer for layer in vm.record.layers if layer} | layers_of(vm)
    for template in templates.records(host):
        found |= {layer for layer in template.record.layers if layer}
    return found


def sweep(host: Host) -> None:
    """Remove the layers that nobody stands on; where that can't be told or done now, a later call does it."""
    with contextlib.suppress(PolyvisorError):
        host.layers.sweep(lambda: standing(host))
