"""SSH keys, made by ssh-keygen: the pair of a home, with which Polyvisor logs in to guests, and each VM's host key."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from polyvisor.files import storage_errors
from polyvisor.images.hostkey import HostKey
from polyvisor.process import find_program, run

HOST_KEY = "host_key"
KNOWN_HOSTS = "known_hosts"


async def login_key(keys: Path) -> tuple[Path, str]:
    """The private key's file and the public key in directory `keys`; made at first use.

    Raises Unavailable where there is no ssh-keygen.
    """
    private, public = keys / "id_ed25519", keys / "id_ed25519.pub"
    if not (private.exists() and public.exists()):
        await _make_login_key(private)
    with storage_errors("reading Polyvisor's SSH key"):
        return private, public.read_text().strip()


async def make_host_key(directory: Path) -> None:
    """Make a VM's host key in its `directory`, which nobody else sees yet."""
    await _keygen("-C", "", "-f", str(directory / HOST_KEY))


def read_host_key(directory: Path) -> HostKey:
    """The host key of the VM in `directory`."""
    with storage_errors("reading the host key"):
        public = (directory / f"{HOST_KEY}.pub").read_text().strip()
        return HostKey(private=(directory / HOST_KEY).read_text(), public=public)


async def _make_login_key(private: Path) -> None:
    """Make the pair in a directory of its own, then move it into place; who comes second finds the first one's."""
    with tempfile.TemporaryDirectory(dir=private.parent) as directory:
        made = Path(directory) / "key"
        await _keygen("-C", "polyvisor", "-f", str(made))
        with contextlib.suppress(FileExistsError):
            private.hardlink_to(made)
        made.with_suffix(".pub").write_text(await _public_of(private))
        made.with_suffix(".pub").replace(private.with_suffix(".pub"))


async def _public_of(private: Path) -> str:
    program = find_program("ssh-keygen", package="openssh-client")
    return (await run([program, "-y", "-f", str(private)], timeout_s=30)).stdout


async def _keygen(*options: str) -> None:
    program = find_program("ssh-keygen", package="openssh-client")
    await run([program, "-q", "-t", "ed25519", "-N", "", *options], timeout_s=30)
