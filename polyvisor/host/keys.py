"""SSH keys, made by ssh-keygen: the pair of a home, with which Polyvisor logs in to guests, and each VM's host key.

Making a host key takes longer than all the rest of making a VM, so each start leaves one in reserve while it waits for
the hypervisor, and the next VM takes it.
"""

from __future__ import annotations

import binascii
import contextlib
import fcntl
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from polyvisor.errors import PolyvisorError
from polyvisor.files import storage_errors, sync_directory, sync_files, take_flock
from polyvisor.images.hostkey import HostKey, secret_of
from polyvisor.process import begin, ended, find_program, run

if TYPE_CHECKING:
    from polyvisor.process import Program

SSH = "ssh"
HOST_KEY = "host_key"
KNOWN_HOSTS = Path(SSH, "known_hosts")
LOGIN = Path(SSH, "login")
RESERVE = "reserve"
KEYGEN_S = 30.0


async def login_key(keys: Path) -> tuple[Path, str]:
    """The private key's file and the public key in directory `keys`; made at first use.

    Raises Unavailable where there is no ssh-keygen.
    """
    private, public = keys / "id_ed25519", keys / "id_ed25519.pub"
    if not (private.exists() and public.exists()):
        await _make_login_key(private)
    with storage_errors("reading Polyvisor's SSH key"):
        return private, public.read_text().strip()


async def login_key_of(vm: Path, keys: Path) -> tuple[Path, str]:
    """The private key's file and the public key for the VM in directory `vm`: the one that it has brought from another host.

    Without such a key it is the one in `keys`; see `login_key`.
    """
    own = vm / LOGIN
    return (own, (await _public_of(own)).strip()) if own.exists() else await login_key(keys)


async def give_host_key(vm: Path, keys: Path) -> None:
    """Give the VM that is being made in directory `vm` a host key: the one in reserve in `keys`, or a new one."""
    with storage_errors("making the host key"):
        with contextlib.suppress(FileNotFoundError):
            (keys / RESERVE).rename(vm / SSH)
        if not is_whole(vm / SSH):
            shutil.rmtree(vm / SSH, ignore_errors=True)
            await _make_host_key(vm / SSH)


def is_whole(directory: Path) -> bool:
    """Whether there is a key pair: nobody waits until the one in reserve is on the disk, and a host may lose power before."""
    try:
        secret = secret_of((directory / HOST_KEY).read_text())
        algorithm, public = (directory / f"{HOST_KEY}.pub").read_text().split()[:2]
    except (OSError, ValueError):
        return False
    return algorithm == "ssh-ed25519" and binascii.a2b_base64(public).endswith(secret[32:])


class Reserve:
    """Sees to it that there is a host key in reserve: `begin` has it made, the end of an `async with` takes it in.

    It is no failure if that fails, and where somebody else has the keys in hand it is left to them.
    """

    def __init__(self, keys: Path) -> None:
        self._place = keys / RESERVE
        self._made = keys / f".{RESERVE}"
        self._held = contextlib.ExitStack()
        self._keygen: Program | None = None

    def begin(self) -> None:
        if self._place.exists():
            return
        with contextlib.suppress(PolyvisorError, OSError):
            fd = os.open(self._place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._held.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._place.exists():
                shutil.rmtree(self._made, ignore_errors=True)  # left by a command that was killed
                self._made.mkdir(mode=0o700)
                self._keygen = begin(_host_key_argv(self._made))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with self._held, contextlib.suppress(PolyvisorError, OSError):
            if self._keygen is not None and await ended(self._keygen, timeout_s=KEYGEN_S) == 0:
                self._made.rename(self._place)


async def _make_host_key(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    await run(_host_key_argv(directory), timeout_s=KEYGEN_S)


def read_host_key(vm: Path) -> HostKey:
    """The host key of the VM in directory `vm`."""
    with storage_errors("reading the host key"):
        public = (vm / SSH / f"{HOST_KEY}.pub").read_text().strip()
        return HostKey(private=(vm / SSH / HOST_KEY).read_text(), public=public)


async def _make_login_key(private: Path) -> None:
    """Make the pair beside its place, and move the public key there last: whoever is killed on the way can be followed."""
    made, public = private.with_name(".new"), private.with_name(".new.pub")
    with storage_errors("making Polyvisor's SSH key"):
        async with _alone(private.parent):
            if not private.exists():
                made.unlink(missing_ok=True)
                public.unlink(missing_ok=True)
                await run(_keygen_argv("-C", "polyvisor", "-f", str(made)), timeout_s=KEYGEN_S)
                sync_files(made)
                made.rename(private)
            public.write_text(await _public_of(private))
            sync_files(public)
            public.replace(private.with_suffix(".pub"))
            sync_directory(private.parent)


@contextlib.asynccontextmanager
async def _alone(directory: Path) -> AsyncIterator[None]:
    """Hold the lock on `directory`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        await take_flock(fd)
        yield
    finally:
        os.close(fd)


async def _public_of(private: Path) -> str:
    program = find_program("ssh-keygen", package="openssh-client")
    return (await run([program, "-y", "-f", str(private)], timeout_s=KEYGEN_S)).stdout


def _host_key_argv(directory: Path) -> list[str]:
    return _keygen_argv("-C", "", "-f", str(directory / HOST_KEY))


def _keygen_argv(*options: str) -> list[str]:
    program = find_program("ssh-keygen", package="openssh-client")
    return [program, "-q", "-t", "ed25519", "-N", "", *options]
