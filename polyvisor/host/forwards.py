"""Port forwards added to a VM and removed from it: in its record, and at once where it is alive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard

from polyvisor.drivers.base import Driver
from polyvisor.errors import NotFound, Unsupported
from polyvisor.host.moves import require_settled
from polyvisor.host.record import Launch, nic_name
from polyvisor.host.store import VMDirectory
from polyvisor.network.ports import chosen_forwards
from polyvisor.spec.forward import Forward, parse_forward
from polyvisor.spec.vm import VMSpec


async def add(vm: VMDirectory, driver: Driver, forward: Forward) -> None:
    """Open a port of the host to the guest of `vm`, whose lock is held; raises Unsupported, InvalidInput."""
    require_settled(vm, "change its forwards")
    index = _user_nic(vm.record.spec)
    number = vm.record.nic_number(index)
    launch = vm.launch()
    if vm.alive() and _has(launch, number) and not any(_leads(forward, live) for live in launch.forwards):
        [chosen] = chosen_forwards([forward])
        await driver.add_forward(vm, number, chosen)
        vm.write_launch(replace(launch, forwards=(*launch.forwards, chosen)))
    if _matching(forward, vm.record.spec.nics[index].forwards) is None:
        _write(vm, index, (*vm.record.spec.nics[index].forwards, str(forward)))


async def remove(vm: VMDirectory, driver: Driver, forward: Forward) -> None:
    """Close it again; raises NotFound where there is none."""
    require_settled(vm, "change its forwards")
    index = _user_nic(vm.record.spec)
    number = vm.record.nic_number(index)
    kept = vm.record.spec.nics[index].forwards
    launch = vm.launch()
    live = (
        next((f for f in launch.forwards if _leads(forward, f)), None) if _has(launch, number) and vm.alive() else None
    )
    text = _matching(forward, kept) or (_of_any_port(forward, kept) if live else None)
    if text is None and live is None:
        raise NotFound(f"VM '{vm.name}' has no forward {forward}", hint=f"polyvisor show {vm.name} lists them")
    if launch is not None and live is not None:
        await driver.remove_forward(vm, number, live)
        vm.write_launch(replace(launch, forwards=tuple(f for f in launch.forwards if f != live)))
    _write(vm, index, tuple(t for t in kept if t != text))


def _write(vm: VMDirectory, index: int, texts: tuple[str, ...]) -> None:
    spec = vm.record.spec
    nics = tuple(replace(nic, forwards=texts) if i == index else nic for i, nic in enumerate(spec.nics))
    vm.write_record(replace(vm.record, spec=replace(spec, nics=nics)))


def _user_nic(spec: VMSpec) -> int:
    """The index of the network card that forwards go through; raises Unsupported where there is none."""
    for i, nic in enumerate(spec.nics):
        if nic.network == "user":
            return i
    raise Unsupported(f"VM '{spec.name}' has no card on a user network", hint="port forwards need one")


def _has(launch: Launch | None, number: int) -> TypeGuard[Launch]:
    """Whether the VM that was started so has the card `number` already: one that was added since may wait for a start."""
    return launch is not None and (launch.devices is None or nic_name(number) in launch.devices.nics)


def _leads(asked: Forward, there: Forward) -> bool:
    """Whether `there` is what `asked` names; without a host port, any to that guest port."""
    same = (asked.guest_port, asked.protocol) == (there.guest_port, there.protocol)
    return same and (
        not asked.host_port or (asked.host_port, asked.host_address) == (there.host_port, there.host_address)
    )


def _of_any_port(asked: Forward, texts: Sequence[str]) -> str | None:
    """The one that lets the host choose the port, and so may have got the port `asked` for."""
    wanted = (asked.guest_port, asked.protocol, 0)
    return next((t for t in texts if ((f := parse_forward(t)).guest_port, f.protocol, f.host_port) == wanted), None)


def _matching(asked: Forward, texts: Sequence[str]) -> str | None:
    return next((text for text in texts if _leads(asked, parse_forward(text))), None)
