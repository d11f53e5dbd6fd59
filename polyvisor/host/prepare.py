"""What a VM's directory must hold before the VM can start: disks, seed, firmware variables, and whose they are."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path

from polyvisor.errors import InvalidInput
from polyvisor.files import storage_errors, sync_files, write_atomic, write_new
from polyvisor.home import Home
from polyvisor.host.keys import KNOWN_HOSTS, give_host_key, login_key_of, read_host_key
from polyvisor.host.plan import (
    FORK_SEED,
    SEED_DISK,
    SEEDED_INITRD,
    UEFI_VARIABLES,
    boots_directly,
    choose_firmware,
    disk_count,
    disk_path,
)
from polyvisor.host.record import Record, record_to_json
from polyvisor.host.store import VMDirectory
from polyvisor.images.image import Image, Seed
from polyvisor.images.seed import SeedData, initrd_seed, nocloud_iso, write_seeded
from polyvisor.images.store import ImageStore
from polyvisor.spec.vm import Firmware, Mode, VMSpec

# Where root runs VMs, each QEMU is a user of its own, numbered from here: above what systemd gives to containers
# (524288–1879048191), below what some kernels' interfaces take for negative (https://systemd.io/UIDS-GIDS/).
FIRST_USER = 1_900_000_000
BLANK_GIB = 1
LOG_LIMIT = 1 << 20
LOG_KEPT = 256 << 10
_GIB = 1024


def new_user(home: Home) -> int | None:
    """A numeric user that no VM of this home has had, for root; None for others, whose VMs run as themselves.

    Whoever makes a VM of it makes `home.next_user` durable first: numbered twice after a power cut, two VMs could read each
    other's disks.
    """
    if os.geteuid() != 0:
        return None
    with storage_errors("numbering the VM"):
        fd = os.open(home.next_user, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            number = int(os.pread(fd, 16, 0) or FIRST_USER)
            os.pwrite(fd, str(number + 1).encode(), 0)
        finally:
            os.close(fd)
    return number


def check_disk_sizes(spec: VMSpec, image: Image) -> None:
    """Raise InvalidInput where the first disk would be smaller than the image on it."""
    if image.disk is None or image.disk_size_mib is None or not spec.disks or spec.disks[0].size_gib is None:
        return
    if spec.disks[0].size_gib * _GIB < image.disk_size_mib:
        least = -(-image.disk_size_mib // _GIB)
        problem = f"is less than image '{image.name}' holds ({image.disk_size_mib} MiB)"
        raise InvalidInput("disks[0].size_gib", spec.disks[0].size_gib, problem, hint=f"ask for {least} or more")


async def fill(vm: VMDirectory, record: Record, image: Image, images: ImageStore, keys: Path) -> None:
    """Put a new VM's disks and record into its directory, the record last; `VMStore.creating` makes them durable."""
    await _make_disks(vm, record, image, images)
    await furnish(vm, record, image, keys)


async def furnish(vm: VMDirectory, record: Record, image: Image, keys: Path) -> None:
    """Put all but its disks into a new VM's directory, the record last."""
    if image.seed is Seed.NONE:
        (vm.path / KNOWN_HOSTS).parent.mkdir(mode=0o700)  # for the key that the guest shows at the first login
    else:
        await give_host_key(vm.path, keys)
        # So that whoever logs in knows the guest's key beforehand, under the VM's name.
        write_new(vm.path / KNOWN_HOSTS, f"{record.spec.name} {read_host_key(vm.path).public}\n")
    finish(vm, record)


def finish(vm: VMDirectory, record: Record) -> None:
    """Give what is in a new VM's directory to the user that it runs as, and write its record."""
    if record.user is not None:
        vm.path.chmod(0o711)
        vm.disks.chmod(0o711)
        os.chown(vm.run, record.user, record.user)
        for disk in vm.disks.iterdir():
            os.chown(disk, record.user, record.user)
    write_new(vm.path / "vm.json", record_to_json(record))


async def refresh(
    vm: VMDirectory, record: Record, image: Image, images: ImageStore, keys: Path, mode: Mode, *, shared: bool = False
) -> None:
    """Make what a start in `mode` needs anew: the seed, from the spec and Polyvisor's key, and UEFI variables.

    Where the initrd is `shared`, as with forks (`plan.shares_initrd`), the seed is a file beside it.
    """
    with storage_errors(f"shortening the console log of VM '{vm.name}'"):
        shorten_log(vm.console_log)
    seed = await _write_seed(vm, record, image, images, keys, mode, shared=shared)
    if record.user is not None and seed is not None:
        os.chown(seed, record.user, record.user)
    _copy_uefi_variables(vm, record, image, mode)


def shorten_log(path: Path) -> None:
    """Cut a log of over 1 MiB back to its last 256 KiB; one that is not there, or is no plain file, is left alone."""
    try:
        # The VM's process can write in this directory: never follow a link that it may have put there.
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    with os.fdopen(fd, "r+b") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size <= LOG_LIMIT:
            return
        file.seek(-LOG_KEPT, os.SEEK_END)
        kept = file.read().partition(b"\n")[2]
        file.seek(0)
        file.write(kept)
        file.truncate()


async def _make_disks(vm: VMDirectory, record: Record, image: Image, images: ImageStore) -> None:
    count = disk_count(record.spec, image)
    if count == 0:
        return
    from polyvisor.images.qemu_img import create_blank, create_overlay

    for i in range(count):
        wanted = record.spec.disks[i].size_gib if i < len(record.spec.disks) else None
        path = vm.path / disk_path(i)
        if i == 0 and image.disk is not None:
            await create_overlay(path, images.file(image, image.disk), wanted * _GIB if wanted else None)
        else:
            await create_blank(path, (wanted or BLANK_GIB) * _GIB)


async def _write_seed(
    vm: VMDirectory, record: Record, image: Image, images: ImageStore, keys: Path, mode: Mode, *, shared: bool
) -> Path | None:
    if image.seed is Seed.NONE or (
        image.seed is Seed.INITRD and (not boots_directly(image, mode) or image.initrd is None)
    ):
        return None
    _, public = await login_key_of(vm.path, keys)
    spec = record.spec
    data = SeedData(
        instance_id=record.id,
        hostname=spec.name,
        ssh_keys=(public, *spec.ssh_keys),
        user_data=spec.user_data,
        host_key=read_host_key(vm.path),
        renew=record.origin is not None,
    )
    with storage_errors(f"writing the seed of VM '{vm.name}'"):
        if image.seed is Seed.NOCLOUD:
            (vm.path / SEED_DISK).unlink(missing_ok=True)
            nocloud_iso(data, vm.path / SEED_DISK)
            return vm.path / SEED_DISK
        if shared:
            write_atomic(vm.path / FORK_SEED, initrd_seed(data), durable=False)
            return vm.path / FORK_SEED
        (vm.path / FORK_SEED).unlink(missing_ok=True)  # it was a fork before
        assert image.initrd is not None  # noqa: S101 - checked above
        write_seeded(images.file(image, image.initrd), data, vm.path / SEEDED_INITRD)
    return vm.path / SEEDED_INITRD


def _copy_uefi_variables(vm: VMDirectory, record: Record, image: Image, mode: Mode) -> None:
    """Give the VM variables of its own, unless it has them: whole, and its user's, from their first moment."""
    path = vm.path / UEFI_VARIABLES
    if choose_firmware(record.spec, image, mode) is not Firmware.UEFI or path.exists():
        return
    from polyvisor.drivers.qemu.programs import find_uefi

    with storage_errors(f"copying the UEFI variables of VM '{vm.name}'"):
        temporary = path.with_suffix(".new")
        shutil.copyfile(find_uefi()[1], temporary)
        temporary.chmod(0o600)
        if record.user is not None:
            os.chown(temporary, record.user, record.user)
        sync_files(temporary)
        temporary.replace(path)
