"""The image `debian`: a full Debian with systemd, cloud-init, SSH and GRUB, built from packages without root.

Its disk boots by BIOS, by UEFI (also with Secure Boot) and, with the image's own kernel and initrd, directly. The root
file system is made by mmdebstrap and `mke2fs -d` in a user namespace (`data/debian/build.sh`); `debian_disk` writes
what stands around it. docs/design/debian-image.md says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from polyvisor.errors import InvalidInput, NotFound, ProcessFailed, StorageFull, Unavailable
from polyvisor.files import is_flocked, storage_errors, take_flock
from polyvisor.images.debian_disk import Disk, cmdline, generated_files, plan_disk, write_boot
from polyvisor.images.debian_log import BuildLog
from polyvisor.images.fetch import fetch
from polyvisor.images.flavours import FLAVOURS, SUITES, Flavour
from polyvisor.images.image import Image, ImageFile, Seed
from polyvisor.images.mirror import MAX_INRELEASE, check_mirror
from polyvisor.images.namespace import check_namespace, missing_ids, namespace_argv, remove_tree
from polyvisor.images.partition import MIB
from polyvisor.images.qemu_img import pack
from polyvisor.images.sources import DEFAULT_MIRROR, default_mirror
from polyvisor.images.store import ImageStore, check_image_name
from polyvisor.operation import Progress, Step, silent
from polyvisor.process import install_command, run

PACKAGES = (
    # The cloud kernel lacks AHCI, e1000 and a display: the general one drives emulated devices too.
    "linux-image-amd64",
    "initramfs-tools",
    "zstd",
    "grub-pc-bin",
    "grub2-common",
    "grub-efi-amd64-signed",
    "shim-signed",
    "systemd-sysv",
    "udev",
    "dbus",
    "libpam-systemd",
    "systemd-resolved",
    "systemd-timesyncd",
    "libnss-myhostname",
    "kmod",
    "cloud-init",
    "cloud-guest-utils",
    "fdisk",
    "e2fsprogs",
    "openssh-server",
    "sudo",
    "qemu-guest-agent",
    "iproute2",
    "iputils-ping",
    "netbase",
    "nftables",
    "ca-certificates",
    "curl",
    "apt-utils",
    "bash-completion",
    "less",
    "logrotate",
    "nano",
    "pciutils",
    "procps",
    "psmisc",
    "vim-tiny",
    "xz-utils",
)

MIN_SIZE_GIB = 2
MAX_SIZE_GIB = 2048
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NEEDED_FREE_MIB = 3072
_PROGRAMS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def sources_list(suite: str, mirror: str, security: str | None) -> str:
    """apt's sources: the suite and its updates from `mirror`, its security updates from `security`."""
    lines = [f"deb {mirror} {suite} main", f"deb {mirror} {suite}-updates main"]
    lines += [f"deb {security} {suite}-security main"] if security else []
    return "\n".join(lines) + "\n"


async def choose_sources(suite: str, mirror: str | None) -> str:
    """sources.list for a build: from `mirror`, else from the mirror that this host's apt uses.

    Beside a mirror `…/debian` there usually is `…/debian-security`; where there is none, the image has no source of
    security updates. On a host without Debian's apt sources the answer is empty: mmdebstrap knows Debian's own.
    """
    base = mirror or default_mirror()
    if mirror is None and base == DEFAULT_MIRROR:
        return ""
    security = f"{base}-security"
    try:
        await fetch(f"{security}/dists/{suite}-security/InRelease", limit=MAX_INRELEASE)
    except NotFound:
        return sources_list(suite, base, None)
    return sources_list(suite, base, security)


async def build_debian(
    store: ImageStore,
    cache: Path,
    *,
    flavour: Flavour = FLAVOURS["debian"],
    suite: str = "bookworm",
    name: str | None = None,
    size_gib: int | None = None,
    mirror: str | None = None,
    progress: Progress = silent,
) -> Image:
    """Build a Debian image of `suite` with a disk of `size_gib` (by default the flavour's) and put it into `store`.

    `mirror` is the URL of a Debian archive; see `choose_sources`. The packages fetched stay in `cache` for the next
    build. Raises InvalidInput, Unavailable (with all that is missing), StorageFull, NotPermitted, DownloadFailed,
    ProcessFailed.
    """
    size_gib = flavour.size_gib if size_gib is None else size_gib
    mirror = _check(suite, size_gib, mirror)
    name = check_image_name(name or flavour.name(suite))
    check_programs()
    await check_namespace()
    sources = await choose_sources(suite, mirror)
    await _sweep(store)
    with store.staging() as staging:
        _check_space(staging)
        work = staging / "work"
        try:
            disk = plan_disk(size_gib << 30)
            packages = packages_directory(cache, suite)
            prepare(work, packages, disk, sources, flavour)
            async with _alone(packages, progress):
                await _build(work, packages, disk, suite, flavour, progress)
            await _finish(work, staging, disk, progress)
        finally:
            await asyncio.shield(remove_tree(work))
        return store.add(staging, _image(name, suite, disk, mirror, flavour), progress)


def recipe(flavour: Flavour, suite: str) -> str:
    """What Polyvisor itself contributes to an image, in 12 characters: with another recipe it would be another image."""
    import hashlib

    disk = plan_disk(MIN_SIZE_GIB << 30)
    parts = {
        path: text.replace(str(disk.root_uuid), "").replace(str(disk.efi.uuid), "").encode()
        for path, text in generated_files(disk, flavour).items()
    }
    for directory in flavour.data:
        parts |= {path: file.read_bytes() for file, path in _walk(files(__package__) / "data" / directory)}
    digest = hashlib.sha256(repr((suite, PACKAGES, flavour.packages, flavour.user, sorted(parts.items()))).encode())
    return digest.hexdigest()[:12]


def packages_directory(cache: Path, suite: str) -> Path:
    """Where the packages of a suite stay between builds."""
    return cache.absolute() / "debian-packages" / suite


def check_programs() -> None:
    """Raise one Unavailable that names everything this host lacks for a build, with the command that brings it."""
    also = {} if os.geteuid() == 0 else {"newuidmap": "uidmap", "newgidmap": "uidmap"}
    lacking = {program: package for program, package in {**_PROGRAMS, **also}.items() if not _found(program)}
    if not _KEYRING.exists():
        lacking[str(_KEYRING)] = "debian-archive-keyring"
    ids = missing_ids()
    if not lacking and ids is None:
        return
    commands = [install_command(" ".join(dict.fromkeys(lacking.values())))] if lacking else []
    what = [*lacking, *(["subordinate ids (/etc/subuid, /etc/subgid)"] if ids else [])]
    commands += [ids] if ids else []
    raise Unavailable(f"building a Debian image needs: {', '.join(what)}", hint=f"run: {' && '.join(commands)}")


def _found(program: str) -> bool:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_PATH}") is not None


def _check(suite: str, size_gib: int, mirror: str | None) -> str | None:
    """The mirror, without a slash at its end; raises InvalidInput for what can't be built."""
    if suite not in SUITES:
        raise InvalidInput("suite", suite, "is not known", hint=f"use {' or '.join(SUITES)}")
    if not MIN_SIZE_GIB <= size_gib <= MAX_SIZE_GIB:
        raise InvalidInput("size_gib", size_gib, f"is not between {MIN_SIZE_GIB} and {MAX_SIZE_GIB}")
    if mirror is None:
        return None
    if not mirror.isascii() or not mirror.isprintable() or any(each in mirror for each in " []#\"'\\"):
        raise InvalidInput("mirror", mirror, "has characters that sources.list can't hold")
    return check_mirror(mirror)


def _check_space(staging: Path) -> None:
    free = shutil.disk_usage(staging).free // MIB
    if free < _NEEDED_FREE_MIB:
        raise StorageFull(
            f"building a Debian image needs {_NEEDED_FREE_MIB} MiB for a while, and {staging.parent} has {free}",
            hint="free some space: polyvisor image ls; polyvisor ls",
        )


async def _sweep(store: ImageStore) -> None:
    """Remove what killed builds left: files of subordinate ids, which the store's own sweep can't remove."""
    for left in (store.path / "store").glob(".new-*/work"):
        if not is_flocked(left.parent):
            await remove_tree(left)


@contextlib.asynccontextmanager
async def _alone(packages: Path, progress: Progress) -> AsyncIterator[None]:
    """Hold the packages of a suite, which apt fetches for one build at a time."""
    fd = os.open(packages, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        await take_flock(fd, lambda: progress(Step("waiting for another build of this suite")))
        yield
    finally:
        os.close(fd)


async def _build(work: Path, packages: Path, disk: Disk, suite: str, flavour: Flavour, progress: Progress) -> None:
    """Make the root file system inside `work`/disk.raw, and the boot files beside it."""
    log = BuildLog(progress)
    progress(log.step)
    try:
        await run(build_argv(work, packages, disk, suite, flavour), env=_environment(), on_output=log.feed)
    except ProcessFailed as error:
        raise ProcessFailed(
            ["mmdebstrap", suite],
            error.status,
            log.last_words() or error.stderr,
            hint="check the network, the mirror and the free space; --debug shows the end of the build's output",
        ) from error


def build_argv(work: Path, packages: Path, disk: Disk, suite: str, flavour: Flavour) -> list[str]:
    """The command that runs build.sh; see there for its arguments."""
    include = ",".join((*PACKAGES, *flavour.packages))
    script = ["sh", str(work / "build.sh"), str(work), str(packages), suite, include]
    place = [str(disk.root_uuid), str(disk.root.start), str(disk.root.size // 1024)]
    return namespace_argv([*script, *place], root=os.geteuid() == 0)


def _environment() -> dict[str, str]:
    """Maintainer scripts expect root's PATH, and no temporary directory that exists only outside."""
    return {"PATH": _PATH, "TMPDIR": "/tmp", "HOME": "/root"}  # noqa: S108 (inside the new system)


def prepare(work: Path, packages: Path, disk: Disk, sources: str, flavour: Flavour) -> None:
    """Fill a new directory `work` with what build.sh expects there; `sources` is sources.list, or empty.

    Raises StorageFull, NotPermitted.
    """
    with storage_errors("preparing the build"):
        work.mkdir()
        packages.mkdir(parents=True, exist_ok=True)
        for directory in flavour.data:
            for file, path in _walk(files(__package__) / "data" / directory):
                _write(work / path, file.read_bytes())
        for path, text in generated_files(disk, flavour).items():
            _write(work / path, text.encode())
        if sources:
            _write(work / "sources.list", sources.encode())
        with (work / "disk.raw").open("wb") as raw:
            raw.truncate(disk.size)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _walk(directory: Traversable, prefix: str = "") -> Iterator[tuple[Traversable, str]]:
    """Every file below a directory of package data (which may stand in a zip file), with its relative path."""
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        else:
            yield entry, f"{prefix}{entry.name}"


async def _finish(work: Path, staging: Path, disk: Disk, progress: Progress) -> None:
    """Make the disk bootable, and leave the image's files in `staging`."""
    with storage_errors("writing the disk"):
        write_boot(work, disk)
        for file in ("vmlinuz", "initrd.img"):
            (work / file).rename(staging / file)
    await pack(work / "disk.raw", staging / "disk.qcow2", disk.size, progress)


def _image(name: str, suite: str, disk: Disk, mirror: str | None, flavour: Flavour) -> Image:
    def file(name: str) -> ImageFile:
        return ImageFile(name=name, sha256="", size=0)

    return Image(
        id="",
        name=name,
        created_at=0.0,
        source=f"built from Debian {suite}" + (f" at {mirror}" if mirror else ""),
        os=SUITES[suite],
        disk=file("disk.qcow2"),
        disk_size_mib=disk.size // MIB,
        kernel=file("vmlinuz"),
        initrd=file("initrd.img"),
        cmdline=cmdline(disk),
        firmware=flavour.firmware,
        seed=Seed.NOCLOUD,
        user=flavour.user,
        memory_mib=flavour.memory_mib,
        recipe=recipe(flavour, suite),
        agent=True,
    )
