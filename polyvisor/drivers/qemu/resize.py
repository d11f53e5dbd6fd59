"""vCPUs and memory of a guest of QEMU while it runs: CPU hotplug by ACPI, and the virtio balloon. See docs/design/resize.md.

Commands: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (query-hotpluggable-cpus, device_add, device_del, balloon,
query-balloon); the balloon's statistics: docs/interop/virtio-balloon-stats.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import Any

from polyvisor.drivers.qemu.argv import BALLOON
from polyvisor.drivers.qemu.qmp import Monitor, QMPRefused
from polyvisor.errors import PolyvisorError, TimedOut, WrongState
from polyvisor.status import Usage
from polyvisor.values import dataclass

UNPLUG_S = 15.0
STATISTICS_S = 15.0
BALLOON_S = 30.0  # without any progress
RESERVE_MIB = 16  # what a guest keeps for itself when its memory shrinks
TRANSLATOR_S = 5.0
_REGION = 2 << 20
_SPARE_REGIONS = 2  # one for the new vCPU, one that the others may take before it comes
_POLL_S = 0.05
_MIB = 1 << 20
_BALLOON_PATH = f"/machine/peripheral/{BALLOON}"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place for a vCPU: QEMU's name of its type, where it is (`place`), and the path of what is plugged in there."""

    type: str
    place: tuple[tuple[str, int], ...]
    path: str | None

    @property
    def id(self) -> str:
        """The name under which it is plugged in."""
        return "cpu-" + "-".join(str(number) for _, number in self.place)


def read_slots(answer: Any) -> list[Slot]:
    """The places in the answer to query-hotpluggable-cpus, in the order in which they are filled; raises PolyvisorError."""
    try:
        slots = [
            Slot(
                type=str(each["type"]),
                place=tuple(sorted((str(key), int(number)) for key, number in each["props"].items())),
                path=each.get("qom-path"),
            )
            for each in answer
        ]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise PolyvisorError("QEMU's list of vCPUs can't be understood") from error
    levels = ("node-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id")
    return sorted(slots, key=lambda slot: [dict(slot.place).get(level, 0) for level in levels])


async def usage(monitor: Monitor) -> Usage:
    """What the guest has at this moment."""
    slots = await _slots(monitor)
    memory: int | None = None
    with contextlib.suppress(QMPRefused):  # there is no balloon
        memory = (await monitor.execute("query-balloon"))["actual"] // _MIB
    return Usage(vcpus=sum(slot.path is not None for slot in slots), memory_mib=memory)


async def set_vcpus(monitor: Monitor, count: int, *, emulated: bool) -> None:
    """Plug in or pull out vCPUs, always the next or the last, until there are `count`.

    Raises TimedOut, QMPRefused, and WrongState where it can't be done for now.
    """
    slots = await _slots(monitor)
    for number, slot in enumerate(slots[:count]):
        if slot.path is None:
            if emulated:
                await _until_translator_has_room(monitor, number, len(slots))
            await monitor.execute("device_add", driver=slot.type, id=slot.id, **dict(slot.place))
    for slot in reversed(slots[count:]):
        if slot.path is not None:
            await _pull_out(monitor, slot)


async def _until_translator_has_room(monitor: Monitor, vcpus: int, most: int) -> None:
    """Wait until an emulator with `vcpus` of `most` vCPUs can take another one; raises WrongState where that does not come.

    A new vCPU begins with a region of its own in the buffer of translated code. Where none is left QEMU ends itself
    ("tcg_region_initial_alloc__locked: assertion failed"). Once the buffer is full it is emptied, and all is well again.
    """
    deadline = time.monotonic() + TRANSLATOR_S
    while free_regions(await monitor.human("info jit"), vcpus, most) < _SPARE_REGIONS:
        if time.monotonic() > deadline:
            hint = "try again when its guest has done more; or change it at rest"
            raise WrongState("QEMU has no room for the code of another vCPU at this moment", hint=hint)
        await asyncio.sleep(_POLL_S)


def free_regions(told: str, vcpus: int, most: int) -> int:
    """How many regions of the buffer of translated code are free for certain, from what `info jit` prints.

    A region has 2 MiB or more; there are at least as many as there can be vCPUs, and at most eight times as many (QEMU's
    tcg/region.c, tcg_n_regions). Each of `vcpus` is in the middle of one. Raises PolyvisorError.
    """
    found = re.search(r"^gen code size +([0-9]+)/([0-9]+)", told, re.MULTILINE)
    if not found or not int(found[2]):
        raise PolyvisorError("QEMU's word of its translated code can't be understood", hint="change the VM at rest")
    used, size = int(found[1]), int(found[2])
    regions = max(most, min(round(size / _REGION), most * 8))
    return regions - min(regions, used * regions // size + vcpus)


async def _pull_out(monitor: Monitor, slot: Slot) -> None:
    """Ask the guest to let go of a vCPU, and wait until it has; raises TimedOut."""
    with contextlib.suppress(QMPRefused):  # it has been asked before, and may be about to
        await monitor.execute("device_del", id=slot.path)
    deadline = time.monotonic() + UNPLUG_S
    while any(each.place == slot.place and each.path for each in await _slots(monitor)):
        if time.monotonic() > deadline:
            raise TimedOut("its guest does not let go of the vCPU", hint="let it boot to its end; or change it at rest")
        await asyncio.sleep(_POLL_S)


async def _slots(monitor: Monitor) -> list[Slot]:
    return read_slots(await monitor.execute("query-hotpluggable-cpus"))


async def ask_for_memory(monitor: Monitor, memory_mib: int) -> None:
    """Tell the balloon how much the guest is to have; its driver obeys once it is loaded. Raises QMPRefused."""
    await monitor.execute("balloon", value=memory_mib * _MIB)


async def set_memory(monitor: Monitor, memory_mib: int) -> None:
    """Let the guest have `memory_mib`; raises WrongState where it can't or its driver is missing, TimedOut where it gives less.

    What it has to spare is asked first: the balloon takes whatever is free, and the guest would kill programs for want of more.
    """
    before = await _actual_mib(monitor)
    spare = await _spare_mib(monitor)
    if memory_mib < before and (wanted := before - memory_mib) > spare - RESERVE_MIB:
        raise WrongState(
            f"its guest has {max(0, spare - RESERVE_MIB)} MiB to spare, not {wanted}",
            hint="take less, or end programs in it",
        )
    await ask_for_memory(monitor, memory_mib)
    try:
        await _until_reached(monitor, memory_mib)
    except BaseException:
        with contextlib.suppress(PolyvisorError):
            await ask_for_memory(monitor, before)
        raise


async def _until_reached(monitor: Monitor, memory_mib: int) -> None:
    actual, since = await _actual_mib(monitor), time.monotonic()
    while (now := await _actual_mib(monitor)) != memory_mib:
        if now != actual:
            actual, since = now, time.monotonic()
        if time.monotonic() - since > BALLOON_S:
            raise TimedOut(f"its guest came to {actual} MiB and no further", hint="ask for what it can reach")
        await asyncio.sleep(_POLL_S)


async def _actual_mib(monitor: Monitor) -> int:
    try:
        return int((await monitor.execute("query-balloon"))["actual"]) // _MIB
    except QMPRefused as error:
        raise WrongState("it was started without a balloon", hint="stop it, then start it") from error


async def _spare_mib(monitor: Monitor) -> int:
    """How much its guest could do without, as it says itself; raises WrongState where no driver answers."""
    begun = await _statistics(monitor)
    await monitor.execute("qom-set", path=_BALLOON_PATH, property="guest-stats-polling-interval", value=1)
    try:
        deadline = time.monotonic() + STATISTICS_S
        while (told := await _statistics(monitor)).get("last-update", 0) in (0, begun.get("last-update", 0)):
            if time.monotonic() > deadline:
                hint = "let it boot to its end; its kernel needs virtio_balloon"
                raise WrongState("its guest has no balloon driver that answers", hint=hint)
            await asyncio.sleep(_POLL_S)
    finally:
        with contextlib.suppress(PolyvisorError):
            await monitor.execute("qom-set", path=_BALLOON_PATH, property="guest-stats-polling-interval", value=0)
    stats = told["stats"]
    # All ones: the guest does not say (Linux before 4.16 has no word for what is available).
    numbers = [int(stats.get(f"stat-{name}-memory", -1)) for name in ("available", "free")]
    return next((each // _MIB for each in numbers if 0 <= each < 1 << 62), 0)


async def _statistics(monitor: Monitor) -> dict[str, Any]:
    """What the guest's driver has told; nothing before it first did."""
    try:
        told = await monitor.execute("qom-get", path=_BALLOON_PATH, property="guest-stats")
    except QMPRefused:
        return {}
    return told if isinstance(told, dict) else {}
