"""What a target can do, found out by doing it: every probe makes a guest, uses the feature, and looks.

Nothing is taken from documentation or from what drivers say of themselves: a driver that refuses is quoted, a feature that does
not do what it should is a failure. What the image does not allow to be tried is not probed, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from polyvisor.compare.machine import BOOT_S, Guest, Shell
from polyvisor.compare.target import Target, spec_of
from polyvisor.errors import InvalidInput, PolyvisorError, TimedOut, Unsupported
from polyvisor.host.api import HostApi
from polyvisor.operation import Progress, Step, silent
from polyvisor.spec.resources import Changes
from polyvisor.spec.vm import DeviceModel, Firmware, Mode, VMSpec
from polyvisor.ssh import execute
from polyvisor.values import dataclass

_QUESTION_S = 120.0
_NETWORK_S = 60.0
_LOGIN = b"login:"


class Outcome(StrEnum):
    WORKS = "works"
    REFUSED = "not offered"
    FAILED = "failed"
    SKIPPED = "not probed"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of one probe on one target; `detail` is what was seen, or why not."""

    feature: str
    target: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Prober:
    """A target to be probed: makes guests of it, one at a time, and removes them."""

    target: Target
    api: HostApi
    shell: Shell
    name: str
    image: str

    @contextlib.asynccontextmanager
    async def guest(self, **settings: Any) -> AsyncIterator[Guest]:
        """A guest with `settings` of its spec beside those of the target; it is not started yet."""
        guest = Guest(self.target, self.api, self.shell, replace(self.spec, **settings))
        try:
            yield guest
        finally:
            await guest.close()

    @property
    def spec(self) -> VMSpec:
        return spec_of(self.target, self.name, self.image)


class Disagrees(PolyvisorError):
    """A feature was used without an error, and did not do what it should."""

    code = "disagrees"


class NotProbed(PolyvisorError):
    """The image of the probes does not allow to try a feature."""

    code = "not-probed"


def _expect(true: bool, seen: object, wanted: str) -> None:
    if not true:
        raise Disagrees(f"{seen} was seen instead of {wanted}")


async def _paravirtual(prober: Prober) -> str:
    async with prober.guest() as guest:
        said = await guest.run("ls /sys/bus/virtio/devices /sys/bus/xen/devices 2>/dev/null", timeout_s=_QUESTION_S)
    found = [word for word in said.split() if not word.endswith(":")]
    _expect(bool(found), "no paravirtual device", "some")
    return f"{len(found)} devices"


async def _emulated(prober: Prober) -> str:
    """Kernels made for clouds have no driver for an emulated card: then the login on the console has to do."""
    async with prober.guest(devices=DeviceModel.EMULATED) as guest:
        await guest.login()
        try:
            await prober.api.wait_for_ssh(guest.spec.name, timeout_s=_NETWORK_S)
        except TimedOut:
            return "it boots to its login; the image does not drive the network card"
        card = "readlink /sys/class/net/eth0/device/driver /sys/class/net/en*/device/driver 2>/dev/null | head -n 1"
        completed = await execute(prober.api, guest.spec.name, ["sh", "-c", card], timeout_s=_QUESTION_S)
        said = completed.stdout
    driver = said.strip().rpartition("/")[2]
    _expect(driver not in ("", "virtio_net", "vif"), f"network card {driver or 'none'}", "an emulated one")
    return f"network card {driver}"


async def _firmware(prober: Prober, firmware: Firmware) -> str:
    if (await prober.api.image_show(prober.image)).image.disk is None:
        raise NotProbed(f"image '{prober.image}' has no disk to boot from; --image debian-12 has one")
    mode = {} if prober.target.kind.on_xen else {"mode": Mode.HVM}
    async with prober.guest(firmware=firmware, **mode) as guest:
        said = await guest.run("test -d /sys/firmware/efi && echo uefi || echo bios", timeout_s=_QUESTION_S)
    _expect(said.strip() == firmware.value, said.strip(), firmware.value)
    return "the guest says so too"


async def _memory_at_rest(prober: Prober) -> str:
    async with prober.guest(memory_mib=128, memory_max_mib=None) as guest:
        small = await _memory_mib(guest)
        await guest.set_at_rest(Changes(memory_mib=192, memory_max_mib=192))
        large = await _memory_mib(guest)
    _expect(40 < large - small < 90, f"{large - small} MiB more", "64 MiB more")
    return f"{small} MiB, then {large} MiB in the guest"


async def _memory_while_running(prober: Prober) -> str:
    async with prober.guest(memory_mib=256, memory_max_mib=256) as guest:
        before = await _memory_mib(guest)
        await _set(prober, guest, Changes(memory_mib=160))
        less = await _memory_mib(guest)
        await _set(prober, guest, Changes(memory_mib=256))
        again = await _memory_mib(guest)
    _expect(before - less > 60 and again - less > 60, f"{before}, {less}, {again} MiB", "256, 160, 256 MiB")
    return f"{before}, {less}, {again} MiB in the guest"


async def _vcpus_while_running(prober: Prober) -> str:
    async with prober.guest(vcpus=1, vcpus_max=2) as guest:
        before = await guest.run("nproc", timeout_s=_QUESTION_S)
        await _set(prober, guest, Changes(vcpus=2))
        after = await guest.run("sleep 2; nproc", timeout_s=_QUESTION_S)
    _expect((before.strip(), after.strip()) == ("1", "2"), f"{before.strip()}, then {after.strip()}", "1, then 2")
    return "1, then 2 in the guest"


async def _vcpu_removed(prober: Prober) -> str:
    async with prober.guest(vcpus=2, vcpus_max=2) as guest:
        await guest.up()
        await _set(prober, guest, Changes(vcpus=1))
        after = await guest.run("nproc", timeout_s=_QUESTION_S)
    _expect(after.strip() == "1", after.strip(), "1")
    return "2, then 1 in the guest"


async def _set(prober: Prober, guest: Guest, changes: Changes) -> None:
    """Change a running guest; what waits for its next boot is not what is probed."""
    done = await prober.api.set(guest.spec.name, changes)
    if done.pending:
        why = next(iter(done.reasons.values()), "it waits for the next boot")
        raise Unsupported(f"{done.pending[0].setting}: {why}")


async def _memory_mib(guest: Guest) -> int:
    said = await guest.run("sed -n 's/^MemTotal: *//p' /proc/meminfo", timeout_s=_QUESTION_S)
    return int(said.split()[0]) // 1024


async def _saved(prober: Prober) -> str:
    async with prober.guest() as guest:
        await guest.run("echo kept >/run/polyvisor-probe", timeout_s=_QUESTION_S)
        save, restore = await guest.time_of("save"), await guest.time_of("restore")
        said = await guest.run("cat /run/polyvisor-probe", timeout_s=_QUESTION_S)
    _expect(said.strip() == "kept", said.strip(), "what was in its memory")
    return f"saved in {save:.1f} s, restored in {restore:.1f} s"


async def _forked(prober: Prober) -> str:
    async with prober.guest() as guest:
        await guest.run("echo kept >/run/polyvisor-probe", timeout_s=_QUESTION_S)
        name = f"{guest.spec.name[:58]}-fork"
        forked = await prober.api.fork(guest.spec.name, [name])
        try:
            await prober.api.wait_for_ssh(name, timeout_s=BOOT_S)
            completed = await execute(
                prober.api, name, ["sh", "-c", "cat /run/polyvisor-probe; hostname"], timeout_s=60
            )
        finally:
            await prober.api.remove(name, force=True)
    said = completed.stdout.split()
    _expect(said == ["kept", name], said, "the source's memory under a name of its own")
    return f"ran {(forked.copy_s + forked.begin_s) * 1000:.0f} ms later; the source stood still for {forked.pause_s * 1000:.0f}"


async def _paused(prober: Prober) -> str:
    async with prober.guest() as guest:
        ticks = "cut -d ' ' -f 1 /proc/uptime"
        before = float(await guest.run(ticks, timeout_s=_QUESTION_S))
        await prober.api.pause(guest.spec.name)
        state = (await prober.api.show(guest.spec.name)).status.state
        await prober.api.resume(guest.spec.name)
        after = float(await guest.run(ticks, timeout_s=_QUESTION_S))
    _expect(state == "paused" and after > before, f"{state}, uptime {before} and {after}", "a pause, and going on")
    return "it stood still, and went on"


async def _console(prober: Prober) -> str:
    """As an installation needs it: whoever watches the console sees the boot after the reboot too."""
    async with prober.guest() as guest:
        await guest.up()
        reader, writer = await prober.api.console(guest.spec.name)
        try:
            await prober.api.reboot(guest.spec.name)
            said = b""
            async with asyncio.timeout(BOOT_S):
                while _LOGIN not in said:
                    chunk = await reader.read(4096)
                    _expect(bool(chunk), "the end of the console's stream", "the boot after the reboot")
                    said = said[-64:] + chunk
        except TimeoutError as error:
            raise TimedOut("the console showed no login after the reboot") from error
        finally:
            writer.close()
    return "one connection saw the reboot and the login after it"


async def _density(prober: Prober) -> str:
    async with prober.guest() as guest:
        taken = await guest.memory_mib()
    _expect(taken > 0, f"{taken:.0f} MiB", "some memory")
    return f"{1024 / taken:.1f} (one takes {taken:.0f} MiB)"


async def _migrated(prober: Prober) -> str:
    raise Unsupported("this version of Polyvisor moves VMs that are stopped, and no others")


_LICENCES = r"""
for p in qemu-system-x86 qemu-system-xen xen-hypervisor-common xen-utils-common; do
  v=$(dpkg-query -W -f '${Version}' $p 2>/dev/null) && [ -n "$v" ] || continue
  f=/usr/share/doc/$p/copyright
  l=$(sed -n 's/^License: *//p' $f 2>/dev/null | head -n 1)
  [ -n "$l" ] || l=$(grep -o 'GNU General Public License[, ]*[vV]ersion 2\|GPL-2' $f 2>/dev/null | head -n 1)
  printf '%s %s (%s); ' "$p" "$v" "${l:-licence not stated in one line}"
done
printf 'Linux %s\n' "$(uname -r)"
"""


async def _stack(prober: Prober) -> str:
    return (await prober.shell(_LICENCES, _QUESTION_S)).stdout.strip() or "this host does not say"


PROBES: dict[str, Callable[[Prober], Awaitable[str]]] = {
    "paravirtual devices": _paravirtual,
    "emulated devices": _emulated,
    "boot by BIOS": lambda prober: _firmware(prober, Firmware.BIOS),
    "boot by UEFI": lambda prober: _firmware(prober, Firmware.UEFI),
    "guests per GiB": _density,
    "memory set at rest": _memory_at_rest,
    "memory set while running": _memory_while_running,
    "vCPU added while running": _vcpus_while_running,
    "vCPU removed while running": _vcpu_removed,
    "console through a reboot": _console,
    "pause and resume": _paused,
    "save and restore": _saved,
    "fork while running": _forked,
    "live migration": _migrated,
    "versions and licences": _stack,
}


async def probe(prober: Prober, progress: Progress = silent, *, only: Sequence[str] = ()) -> list[Finding]:
    """Do every probe (or those named) on one target; what fails is a finding, and the next one is done."""
    found = []
    names = [name for name in PROBES if not only or name in only]
    for i, name in enumerate(names):
        progress(Step(f"{prober.target.label}: {name}", i, len(names)))
        try:
            outcome, detail = Outcome.WORKS, await PROBES[name](prober)
        except (Unsupported, InvalidInput) as error:
            outcome, detail = Outcome.REFUSED, error.message
        except NotProbed as error:
            outcome, detail = Outcome.SKIPPED, error.message
        except PolyvisorError as error:
            outcome, detail = Outcome.FAILED, error.message
        found.append(Finding(feature=name, target=prober.target.label, outcome=outcome, detail=detail))
    return found
