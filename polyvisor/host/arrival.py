"""The target's side of a move: a VM is taken in, held until its source has let go of it, and then released.

A parcel comes from another host, and is not believed. The VM is made in a private directory: each disk must be one
sound qcow2 file that names no other, and gets this host's image below it; keys must be keys. It appears as a whole, with
the note that it has arrived, and can't start before `release`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.errors import AlreadyExists, ImageRefused, InvalidInput, NotFound, StorageFull, WrongState
from polyvisor.files import storage_errors, write_new
from polyvisor.host import moves
from polyvisor.host.keys import HOST_KEY, KNOWN_HOSTS, LOGIN, SSH, is_whole
from polyvisor.host.machine import check_room, total_memory_mib
from polyvisor.host.moves import Cargo, Landing, Move, Phase
from polyvisor.host.parcel import Manifest, Parcel, check_image, refused
from polyvisor.host.plan import (
    boot_nics,
    check_devices,
    check_networks,
    choose_accelerator,
    choose_firmware,
    choose_mode,
    disk_count,
    disk_path,
)
from polyvisor.host.prepare import BLANK_GIB, check_disk_sizes, finish, new_user
from polyvisor.host.record import Record
from polyvisor.host.store import VMDirectory
from polyvisor.images import qemu_img
from polyvisor.images.formats import Reader, qcow2
from polyvisor.images.hostkey import secret_of
from polyvisor.images.image import Image, Seed
from polyvisor.images.store import ImageStore
from polyvisor.images.unpack import SPARE
from polyvisor.spec.vm import Firmware, VMSpec

if TYPE_CHECKING:
    from polyvisor.host.host import Host

_MIB = 1 << 20
_GIB = 1 << 30
_PUBLIC = re.compile(r"ssh-ed25519 [A-Za-z0-9+/=]+(?: [^\r\n]*)?\n?\Z")
_KNOWN = re.compile(r"\S+ ((?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]+)\Z")


async def check(host: Host, cargo: Cargo, move: Move) -> Landing:
    """Whether the VM can come here, and run here; raises what stands in the way, and changes nothing."""
    _check_meant(host, cargo, move)
    vm = host.store.directory(move.new_name)
    if _holds(vm, move.token):
        return Landing(arrived=True, image_id=vm.record.image_id)
    if moves.has_arrived(host.home, move.token):
        problem = f"VM '{move.name}' has come by this move before, as '{move.new_name}'"
        raise WrongState(problem, hint="look where it is now: polyvisor ls")
    if vm.path.exists() and not _is_void(vm, move):
        raise AlreadyExists(f"there is a VM '{vm.name}' already", hint="give the one that comes another name: --name")
    image = find_image(host.images.store, cargo.image)
    notes = await check_runs(host, record_of(cargo, move, image or cargo.image), image or cargo.image)
    check_storage(host, cargo.data_bytes + (0 if image else cargo.image.size))
    return Landing(image_id=image.id if image else None, notes=notes)


async def take_in(host: Host, chunks: AsyncIterator[bytes]) -> None:
    """Make the VM that comes in `chunks`, and hold it; one that is here already by the same move stays as it is.

    Raises as `check`, ImageRefused, StorageFull, and ConnectionLost where the parcel breaks off.
    """
    parcel = Parcel(chunks)
    manifest = await parcel.manifest()
    move, cargo = manifest.move, manifest.cargo
    async with host.store.locked(move.new_name, "move") as vm:
        landing = await check(host, cargo, move)
        if landing.arrived:
            return
        if landing.image_id is None:
            raise NotFound(f"image '{cargo.image.name}', which the VM stands on, is not here", hint="repeat the move")
        image = host.images.store.by_id(landing.image_id)
        if vm.path.exists():  # void
            host.store.remove(vm.name)
        record = replace(record_of(cargo, move, image), user=new_user(host.home))
        with host.images.store.held(image), host.store.creating(vm.name) as staging:
            with storage_errors(f"receiving VM '{vm.name}'"):
                (staging.path / SSH).mkdir(mode=0o700)
            await parcel.unpack(manifest, staging.path)
            for i in range(disk_count(record.spec, image)):
                backing = host.images.store.file(image, image.disk) if i == 0 and image.disk else None
                await settle_disk(staging.path / disk_path(i), backing, disk_size(record.spec, image, i))
            settle_keys(staging, manifest, image)
            moves.write_note(staging, replace(move, phase=Phase.ARRIVING))
            with storage_errors(f"receiving VM '{vm.name}'"):
                finish(staging, record)


async def release(host: Host, move: Move) -> None:
    """Let the VM start here: its source has let go of it. One that was released before stays as it is.

    Raises NotFound, and WrongState where that name is another VM's.
    """
    async with host.store.locked(move.new_name, "move") as vm:
        if not vm.path.is_dir():
            problem = f"VM '{move.name}' was moved to {move.target}, and there is no VM '{vm.name}' there any more"
            raise NotFound(problem, hint="it was removed since, or moved on")
        if _holds(vm, move.token):
            moves.note_arrival(host.home, move)
            moves.drop_note(vm)
        elif vm.record.id != move.vm_id or _arriving(vm) is not None:
            raise WrongState(f"VM '{vm.name}' is another one than that which came from {move.source}")


async def discard(host: Host, name: str, token: str) -> None:
    """Remove what has come of VM `name` by the move with this `token`, which its source has cancelled; another VM stays."""
    moves.check_id(token, "token")
    async with host.store.locked(name, "move") as vm:
        if _holds(vm, token):
            host.store.remove(name)
        host.store.sweep(name)


def find_image(store: ImageStore, wanted: Image) -> Image | None:
    """The image here that a VM on `wanted` can stand on: the same files, to be booted in the same way."""
    if (found := store.find(wanted.id)) and _boots_alike(found, wanted):
        return found
    return next((image for image in store.all() if _boots_alike(image, wanted)), None)


def _boots_alike(one: Image, other: Image) -> bool:
    def core(image: Image) -> Image:
        return replace(image, id="", name="", created_at=0.0, source="", os=None, recipe=None, memory_mib=0)

    return core(one) == core(other)


def record_of(cargo: Cargo, move: Move, image: Image) -> Record:
    """The record that the VM gets here; raises InvalidInput for a spec that can't be meant."""
    spec = replace(cargo.spec, name=move.new_name)
    spec = replace(spec, hypervisor=move.hypervisor or spec.hypervisor, mode=move.mode or spec.mode)
    return Record(id=cargo.id, created_at=cargo.created_at, spec=spec, image_id=image.id, memory_mib=cargo.memory_mib)


def _check_meant(host: Host, cargo: Cargo, move: Move) -> None:
    if move.target_id != moves.host_id(host.home):
        raise WrongState(f"VM '{move.name}' is moving to another host than this, which was called {move.target} then")
    if (cargo.id, cargo.spec.name) != (move.vm_id, move.name):
        raise refused("it holds another VM than its move is of")
    try:
        check_image(cargo.image)
    except InvalidInput as error:
        raise refused(f"its image can't be used: {error.message}") from error


def _arriving(vm: VMDirectory) -> Move | None:
    """The move by which what is there has come and is held; None for a VM that is not, and for none."""
    note = moves.read_note(vm)
    return note if note is not None and note.phase is Phase.ARRIVING else None


def _holds(vm: VMDirectory, token: str) -> bool:
    """Whether the VM is there by the move with this `token`, and held."""
    return (move := _arriving(vm)) is not None and move.token == token


def _is_void(vm: VMDirectory, move: Move) -> bool:
    """Whether what is there came by an earlier move of the same VM from the same host.

    That host has it still, so it has not let go by the earlier move, and never will.
    """
    earlier = _arriving(vm)
    return earlier is not None and (earlier.vm_id, earlier.source_id) == (move.vm_id, move.source_id)


async def check_runs(host: Host, record: Record, image: Image) -> tuple[str, ...]:
    """Raise what keeps the VM from running here; returns what a person should know."""
    spec, capabilities = record.spec, await host.capabilities()
    chosen = choose_accelerator(spec, *capabilities)
    xen = next((c for c in capabilities if c.driver == chosen.name), None)
    total = (xen and xen.memory_mib) or total_memory_mib()
    if record.memory_mib > total:
        raise InvalidInput("memory_mib", record.memory_mib, f"the host has {total} MiB", hint="move it elsewhere")
    check_room(spec, record.memory_mib, chosen.name, capabilities)
    if xen is not None:
        check_networks(spec, xen)
    mode = choose_mode(spec, image, xen)
    if choose_firmware(spec, image, mode, xen) is Firmware.UEFI:
        from polyvisor.drivers.qemu.programs import find_uefi

        find_uefi()
    check_devices(spec, image)
    check_disk_sizes(spec, image)
    qemu_img.program()
    boot_nics(record, None, "")
    private = sorted({nic.network for nic in spec.nics if nic.network.startswith("private:")})
    return (
        f"it will run on {chosen.name}, in mode {mode.value}",
        *(f"on network {network} it will meet VMs of its new host alone" for network in private),
    )


def check_storage(host: Host, needed: int) -> None:
    host.home.prepare()
    if needed + SPARE > (free := shutil.disk_usage(host.home.vms).free):
        raise StorageFull(
            f"the VM needs {needed // _MIB} MiB, the host has {free // _MIB} MiB left",
            hint="free some space there: polyvisor ls; polyvisor image ls",
        )


def disk_size(spec: VMSpec, image: Image, index: int) -> int:
    """How large disk `index` is to the guest, in bytes."""
    wanted = spec.disks[index].size_gib if index < len(spec.disks) else None
    if wanted is None and index == 0 and image.disk_size_mib is not None:
        return image.disk_size_mib * _MIB
    return (wanted or BLANK_GIB) * _GIB


async def settle_disk(path: Path, backing: Path | None, size: int) -> None:
    """Refuse a disk of `size` bytes that is not one sound qcow2 file of its own, and give it `backing`, which is ours.

    What it said of a backing file itself is wiped out before anything but this function sees it.
    """
    with path.open("r+b") as file:
        if backing is not None and file.read(4) == qcow2.MAGIC:
            file.seek(8)
            file.write(bytes(12))  # backing_file_offset and backing_file_size: QEMU, docs/interop/qcow2.txt
            file.flush()
        reader = Reader(file, f"the VM's {path.name}")
        if reader.upto(0, len(qcow2.MAGIC)) != qcow2.MAGIC:
            reader.refuse("it is not a qcow2 disk")
        disk = qcow2.inspect(reader)
        if reader.unpack(">I", 60)[0]:
            reader.refuse("it has snapshots")
        if disk.virtual_size != size:
            reader.refuse(f"a disk of {disk.virtual_size} bytes, where the VM has one of {size}")
    await qemu_img.check(disk, str(path), reader.name)
    if backing is not None:
        await qemu_img.rebase(path, backing)


def settle_keys(vm: VMDirectory, manifest: Manifest, image: Image) -> None:
    """Refuse what is not keys, and note the guest's key under the name that the VM has here."""
    name = manifest.move.new_name
    try:
        if image.seed is not Seed.NONE:
            public = (vm.path / SSH / f"{HOST_KEY}.pub").read_text()
            if not _PUBLIC.match(public) or not is_whole(vm.path / SSH):
                raise refused("its host key is none")
            known = [" ".join(public.split()[:2])]
        else:
            known = _known(vm.path / KNOWN_HOSTS)
            (vm.path / KNOWN_HOSTS).unlink(missing_ok=True)
        if (vm.path / LOGIN).exists():
            secret_of((vm.path / LOGIN).read_text())
    except ValueError as error:
        raise refused(f"its keys are none: {error}") from error
    if known:
        with storage_errors("writing the guest's key"):
            write_new(vm.path / KNOWN_HOSTS, "".join(f"{name} {key}\n" for key in known))


def _known(path: Path) -> list[str]:
    """The keys in a file known_hosts; raises ImageRefused for anything else in it."""
    if not path.exists():
        return []
    found = [_KNOWN.match(line) for line in path.read_text().splitlines() if line.strip()]
    keys = [match[1] for match in found if match]
    if len(keys) < len(found):
        raise ImageRefused("the parcel with the VM: its known_hosts is none")
    return keys
