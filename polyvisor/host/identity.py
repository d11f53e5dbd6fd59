"""Telling the guest of a fork, which believes to be another VM, who it is: name, keys, random numbers, time.

Two lines on the guest's second serial port, for the agent that images of ours have (images/data/debian/…/agent, tiny's too).
It answers when it is done. Until then the file `renewing` in the VM's directory says that the answer is awaited, and to what:

    polyvisor-seed HEX
    polyvisor-identity 1 id=UUID name=NAME time=SECONDS seed=HEX macs=OLD/NEW,… dropbear=OCTAL openssh=OCTAL
    polyvisor-renewed UUID

`seed` is for the kernel's random numbers, which are those of the source until then: so it comes by itself before all the rest,
and once more for agents that do not know that. `dropbear` and `openssh` are the new host key in the formats of the two servers;
`macs` are the addresses that cards on shared networks change from and to.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from polyvisor.drivers.qemu.agent import heard, tell
from polyvisor.errors import PolyvisorError, TimedOut, WrongState
from polyvisor.files import storage_errors
from polyvisor.host.keys import read_host_key
from polyvisor.host.plan import mac_addresses
from polyvisor.host.record import Record
from polyvisor.host.store import RENEWING, VMDirectory
from polyvisor.images.hostkey import HostKey
from polyvisor.images.image import Image, Seed
from polyvisor.operation import Progress, Step
from polyvisor.waiting import pause

_POLL_S = 0.05
# What the serial port took in before it got the source's state is lost, and each time that the guest's driver resets it: as
# much as its FIFO holds. To a shell that reads lines, spaces are less work than lines.
_PADDING = b" " * 255 + b"\n"
# A guest that was copied while it booted may have lost what it was told even so.
_AGAIN_S = 10.0
_SEED_BYTES = 32
_KEPT_BYTES = 256  # of what a guest has said; an answer is shorter


def message(record: Record, source: Record, key: HostKey | None, now: float, seed: Seed = Seed.NOCLOUD) -> bytes:
    """What the guest of the fork `record` is told; it has the memory of `source`, whose image takes such a `seed`.

    The key is for the SSH server of such images: dropbear in ours, which an initrd seeds, OpenSSH elsewhere.
    """
    words = {
        "id": record.id,
        "name": record.spec.name,
        "time": str(int(now)),
        "seed": os.urandom(_SEED_BYTES).hex(),
        "macs": ",".join(f"{old}/{new}" for old, new in changed_macs(record, source)) or "-",
    }
    if key is not None and seed is Seed.INITRD:
        words["dropbear"] = _octal(key.dropbear)
    elif key is not None:
        words["openssh"] = _octal(key.private.encode())
    line = " ".join(f"{word}={value}" for word, value in words.items())
    return _PADDING + f"polyvisor-seed {words['seed']}\npolyvisor-identity 1 {line}\n".encode()


def _octal(data: bytes) -> str:
    """Bytes as every shell's printf takes them."""
    return "".join(f"\\{byte:03o}" for byte in data)


def to_be_told(vm: VMDirectory, source: Record, image: Image) -> bytes:
    """What the guest of a fork, whose directory this is, is to be told; from now on its answer is awaited."""
    record = vm.record
    key = read_host_key(vm.path) if image.seed is not Seed.NONE else None
    told = message(record, source, key, time.time(), image.seed)
    expect(vm.path, record.id, told)
    return told


def told_again(vm: VMDirectory) -> bytes:
    """What a guest that has not answered is told again, by way of another process of its VM; nothing where it has."""
    if look(vm):
        return b""
    with storage_errors(f"reading what the guest of VM '{vm.name}' was told"):
        return (vm.path / RENEWING).read_bytes().partition(b"\n")[2]


def changed_macs(record: Record, source: Record) -> Sequence[tuple[str, str]]:
    """The addresses to change: a user network is the VM's own, with its one guest, and remembers that by its address."""
    pairs = zip(record.spec.nics, mac_addresses(source), mac_addresses(record), strict=True)
    return [(old, new) for nic, old, new in pairs if nic.network != "user"]


def expect(vm: Path, vm_id: str, told: bytes) -> None:
    """Note in a VM's directory what its guest is told, which has not answered so far."""
    with storage_errors("noting that a guest was told who it is"):
        (vm / f"{RENEWING}.heard").unlink(missing_ok=True)
        (vm / RENEWING).unlink(missing_ok=True)
        (vm / RENEWING).touch(mode=0o600)
        (vm / RENEWING).write_bytes(vm_id.encode() + b"\n" + told)


def look(vm: VMDirectory) -> bool:
    """Whether the guest is who it is to be; its answer is taken note of."""
    place = vm.path / RENEWING
    try:
        vm_id = place.read_bytes().partition(b"\n")[0]
    except FileNotFoundError:
        return True
    said = vm.path / f"{RENEWING}.heard"
    with storage_errors(f"listening to the guest of VM '{vm.name}'"):
        answer = said.read_bytes() if said.exists() else b""  # it may come in pieces
        answer += heard(vm)
        if b"polyvisor-renewed " + vm_id not in answer:
            said.write_bytes(answer[-_KEPT_BYTES:])  # a guest may say anything, for ever
            return False
        place.unlink(missing_ok=True)
        said.unlink(missing_ok=True)
    return True


async def until_renewed(vm: VMDirectory, timeout_s: float, progress: Progress) -> None:
    """Wait until a fork's guest has taken on its own identity; raises TimedOut, WrongState where the VM ends."""
    began = told = time.monotonic()
    while not look(vm):
        waited = time.monotonic() - began
        if not vm.alive():
            raise WrongState(f"VM '{vm.name}' has ended", hint=f"polyvisor logs {vm.name}")
        if waited > timeout_s:
            problem = f"the guest of VM '{vm.name}' has not taken on its own name and keys after {timeout_s:.0f} s"
            raise TimedOut(problem, hint=f"polyvisor resume {vm.name}, if it is paused; polyvisor console {vm.name}")
        progress(Step("waiting for the fork's own identity", int(waited), int(timeout_s), "s"))
        if time.monotonic() - told > _AGAIN_S:
            told = time.monotonic()
            with contextlib.suppress(PolyvisorError):  # it has been told often enough, and does not listen
                tell(vm, told_again(vm))
        await pause(_POLL_S)
