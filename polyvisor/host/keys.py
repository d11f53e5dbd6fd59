"""The SSH key pair of a home: Polyvisor logs in to guests with it, so that `polyvisor ssh` needs no set-up."""

from __future__ import annotations

import contextlib
from pathlib import Path

from polyvisor.files import storage_errors
from polyvisor.process import find_program, run


async def login_key(keys: Path) -> tuple[Path, str]:
    """The private key's file and the public key in directory `keys`; made at first use (ssh-keygen, Ed25519).

    Raises Unavailable where there is no ssh-keygen.
    """
    private, public = keys / "id_ed25519", keys / "id_ed25519.pub"
    if not (private.exists() and public.exists()):
        await _make(private)
    with storage_errors("reading Polyvisor's SSH key"):
        return private, public.read_text().strip()


async def _make(private: Path) -> None:
    """Make the pair in a directory of its own, then move it into place; who comes second finds the first one's."""
    import tempfile

    program = find_program("ssh-keygen", package="openssh-client")
    with tempfile.TemporaryDirectory(dir=private.parent) as directory:
        made = Path(directory) / "key"
        await run([program, "-q", "-t", "ed25519", "-N", "", "-C", "polyvisor", "-f", str(made)], timeout_s=30)
        with contextlib.suppress(FileExistsError):
            private.hardlink_to(made)
        text = (await run([program, "-y", "-f", str(private)], timeout_s=30)).stdout
        made.with_suffix(".pub").write_text(f"{text.strip()}\n")
        made.with_suffix(".pub").replace(private.with_suffix(".pub"))
