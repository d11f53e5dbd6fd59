"""Disks and network cards of a guest of QEMU that come and go while it runs, and disks that grow. See docs/design/devices.md.

The first half is pure: the arguments of a VM as they are with a device more or less, which is what a QEMU is started with that
goes on with its guest. Commands of the second: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (blockdev-add,
netdev_add, device_add, device_del, block_resize).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from polyvisor.drivers.base import BootDisk, BootNic
from polyvisor.drivers.qemu.devices import device_name, disk_argv, disk_options, netdev, nic_argv, pinned
from polyvisor.drivers.qemu.incoming import parsed
from polyvisor.drivers.qemu.qmp import Monitor, QMPRefused
from polyvisor.errors import TimedOut
from polyvisor.host.record import kind_of
from polyvisor.spec.vm import DeviceModel, Firmware

UNPLUG_S = 15.0
RELEASE_S = 2.0
_POLL_S = 0.05
_ORDER = ("disk", "seed", "nic", "rng")  # in which `build_argv` names them
_PLUGGED = re.compile(r"((?:disk|nic)[0-9]+)-dev\Z")


def device_argv(device: BootDisk | BootNic) -> list[str]:
    """A device as `build_argv` names it; only paravirtual ones of machines with BIOS, or none, are plugged in."""
    if isinstance(device, BootNic):
        return nic_argv(device, DeviceModel.PARAVIRTUAL)
    return disk_argv(device, DeviceModel.PARAVIRTUAL, Firmware.BIOS)


def with_device(argv: Sequence[str], device: BootDisk | BootNic, slots: Mapping[str, int]) -> tuple[str, ...]:
    """The arguments `argv` with a device more, each where `slots` says."""
    program, options = parsed(without_device(argv, device.name, slots))
    own = _rank(device.name)
    place = next((i for i, option in enumerate(options) if _rank(_name(*option)) > own >= 0), len(options))
    words = pinned(device_argv(device), slots)
    return (*program, *_joined(options[:place]), *words, *_joined(options[place:]))


def without_device(argv: Sequence[str], name: str, slots: Mapping[str, int]) -> tuple[str, ...]:
    """The arguments `argv` with a device less; the others stay where they are, which `slots` says."""
    program, options = parsed(pinned(argv, slots))
    return (*program, *_joined([option for option in options if _name(*option) != name]))


def _joined(options: Sequence[tuple[str, str | None]]) -> list[str]:
    return [word for option in options for word in option if word is not None]


def _name(option: str, value: str | None) -> str:
    """The name of the device that an option is about; nothing for others."""
    if value is None or option not in ("-blockdev", "-netdev", "-device"):
        return ""
    if option == "-device":
        return device_name(value)
    if option == "-blockdev":
        return str(json.loads(value)["node-name"]).partition("-")[0]
    return dict(word.partition("=")[::2] for word in value.split(","))["id"]


def _rank(name: str) -> int:
    """Which place a device has among those of other kinds; -1 for what has none."""
    kind = kind_of(name)
    return _ORDER.index(kind) if kind in _ORDER else -1


def device_options(value: str) -> dict[str, Any]:
    """The value of -device as device_add takes it, which converts no text into numbers."""
    driver, *properties = value.split(",")
    options: dict[str, Any] = dict(each.partition("=")[::2] for each in properties)
    if "bootindex" in options:
        options["bootindex"] = int(options["bootindex"])
    return {"driver": driver, **options}


def netdev_options(value: str) -> dict[str, Any]:
    """The value of -netdev as netdev_add takes it."""
    kind, *properties = value.split(",")
    pairs = [each.partition("=")[::2] for each in properties]
    options: dict[str, Any] = {key: text for key, text in pairs if key != "hostfwd"}
    if forwards := [{"str": text} for key, text in pairs if key == "hostfwd"]:
        options["hostfwd"] = forwards
    return {"type": kind, **options}


async def attached(monitor: Monitor) -> frozenset[str]:
    """The names of the disks and cards that the guest has."""
    listed = await monitor.execute("qom-list", path="/machine/peripheral")
    return frozenset(match[1] for each in listed if (match := _PLUGGED.match(str(each["name"]))))


async def attach(monitor: Monitor, device: BootDisk | BootNic, slots: Mapping[str, int]) -> None:
    """Plug a device in, unless it is; where that fails QEMU is as before. Raises QMPRefused."""
    if device.name in await attached(monitor):
        return
    await _forget(monitor, device.name)  # what a command has left that was killed halfway
    if isinstance(device, BootDisk):
        await monitor.execute("blockdev-add", **disk_options(device))
    elif device.network != "none":
        await monitor.execute("netdev_add", **netdev_options(netdev(device)))
    try:
        [*_, value] = pinned(device_argv(device), slots)
        await monitor.execute("device_add", **device_options(value))
    except QMPRefused:
        await _forget(monitor, device.name)
        raise


async def detach(monitor: Monitor, name: str) -> None:
    """Ask the guest to let go of a device, and wait until it has; raises TimedOut."""
    if name in await attached(monitor):
        with contextlib.suppress(QMPRefused):  # it has been asked before, and may be about to
            await monitor.execute("device_del", id=f"{name}-dev")
        deadline = time.monotonic() + UNPLUG_S
        while name in await attached(monitor):
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"its guest does not let go of {name}", hint="let it boot to its end; or change it at rest"
                )
            await asyncio.sleep(_POLL_S)
    await _forget(monitor, name)


async def _forget(monitor: Monitor, name: str) -> None:
    """Let QEMU close what is behind a device that is gone: it may hold a disk for a moment longer."""
    if name.startswith("nic"):
        with contextlib.suppress(QMPRefused):  # there is none
            await monitor.execute("netdev_del", id=name)
        return
    deadline = time.monotonic() + RELEASE_S
    while nodes := await _nodes(monitor, name):
        for node in nodes:  # those that another one stands on are refused until that is gone
            with contextlib.suppress(QMPRefused):
                await monitor.execute("blockdev-del", **{"node-name": node})
        if time.monotonic() > deadline:
            return  # the next one of this name tries again
        await asyncio.sleep(_POLL_S)


async def _nodes(monitor: Monitor, name: str) -> list[str]:
    """The block nodes of a disk: one for each of its overlays since QEMU was started."""
    known = await monitor.execute("query-named-block-nodes", flat=True)
    return [node["node-name"] for node in known if node["node-name"].partition("-")[0] == name]


async def grow(monitor: Monitor, disk: BootDisk, size: int) -> None:
    """Make a disk `size` bytes large, upon which QEMU tells the guest; raises QMPRefused."""
    await monitor.execute("block_resize", **{"node-name": disk.node, "size": size})
