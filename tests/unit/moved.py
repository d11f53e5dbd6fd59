"""Hosts between which a VM is moved, without a hypervisor: what the drivers offer is made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from polyvisor.errors import PolyvisorError
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.host.moves import Cargo, Move
from polyvisor.images.image import Image
from polyvisor.remote.move import Place, Wish, move_vm
from polyvisor.spec.vm import Disk, Nic, VMSpec
from polyvisor.status import Accelerator, Capabilities
from tests.unit.disks import qemu_img
from tests.unit.exported import add_full

TCG = Capabilities(
    driver="qemu",
    version="8",
    accelerators=(
        Accelerator(name="kvm", available=False, reason="/dev/kvm is not there"),
        Accelerator(name="tcg", available=True, reason="it works"),
    ),
    modes=("pvh", "hvm"),
)
XEN = Capabilities(
    driver="xen",
    version="4.17",
    accelerators=(Accelerator(name="xen", available=True, reason="this is a Xen host"),),
    modes=("pv", "pvh"),
    missing={"hvm": "its CPU has no virtualization", "uefi": "UEFI is not there yet", "private": "no private networks"},
)
SPEC = VMSpec(
    name="web",
    image="full",
    disks=(Disk(size_gib=1), Disk(size_gib=2)),
    nics=(Nic(mac="52:54:00:00:00:01", forwards=(":80",)), Nic(network="none")),
    labels={"of": "test"},
    user_data="#!/bin/sh\necho für alle\n",
)


class Machine(Host):
    """A host with these capabilities; `failing` names a verb that fails instead of being done, or `after` it was done."""

    def __init__(self, path: Path, *capabilities: Capabilities) -> None:
        super().__init__(Home(path))
        self.home.prepare()
        self.offered = capabilities or (TCG,)
        self.failing: str | None = None
        self.after = False
        self.error: PolyvisorError = PolyvisorError("a fault of the test")
        for verb in ("move_begin", "arrive", "move_finish", "arrival_release", "arrival_cancel", "move_cancel"):
            setattr(self, verb, self._wrapped(verb, getattr(self, verb)))

    def _wrapped(self, name: str, verb: Any) -> Any:
        async def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.failing == name and not self.after:
                raise self.error
            result = await verb(*arguments, **options)
            if self.failing == name:
                raise self.error
            return result

        return wrapped

    async def capabilities(self) -> tuple[Capabilities, ...]:
        return self.offered

    def files(self, name: str) -> dict[str, bytes]:
        """What is in the directory of a VM."""
        directory = self.home.vms / name
        return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


async def made(source: Machine, scratch: Path, spec: VMSpec = SPEC) -> Image:
    """Make the VM on a host, with something on its disks; returns its image."""
    scratch.mkdir(exist_ok=True)
    image = add_full(source.images.store, scratch)
    await source.create(spec)
    for i, pattern in enumerate(("0x11", "0x22")):
        disk = source.home.vms / spec.name / f"disks/disk{i}.qcow2"
        qemu_img("bench", "-f", "qcow2", "-w", "-c", "16", "-s", "64k", "-o", "4M", f"--pattern={pattern}", disk)
    return image


async def move(source: Machine, target: Machine, vm: str = "web", **wish: Any) -> Any:
    return await move_vm(Place("a", source), vm, Place("b", target), Wish(**wish))


async def offered(source: Machine, target: Machine, name: str = "web", **changes: Any) -> tuple[Cargo, Move]:
    """The cargo of a VM, and a move of it that nobody has begun."""
    cargo = (await source.move_show(name)).cargo
    assert cargo is not None
    move = Move(
        token="0" * 8 + "-0000-0000-0000-" + "0" * 12,
        vm_id=cargo.id,
        name=name,
        new_name=name,
        source="a",
        source_id=await source.host_id(),
        target="b",
        target_id=await target.host_id(),
    )
    return cargo, replace(move, **changes)
