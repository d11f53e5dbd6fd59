"""The lab of a home: brings its hosts up, registers them as hosts reached by SSH, saves them, takes them down.

Beside the VMs and the images nothing is kept but what SSH has to know of each host (`<home>/lab/NAME.known_hosts`); a host that
is registered has been made ready, so bringing it up again is restoring it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from polyvisor.drivers.qemu.programs import version_numbers
from polyvisor.errors import AlreadyExists, CannotStart, NotFound, ProcessFailed
from polyvisor.files import make_directory, storage_errors, take_flock, write_atomic
from polyvisor.host.api import SSHTarget
from polyvisor.host.host import Host
from polyvisor.host.keys import read_host_key
from polyvisor.host.plan import choose_accelerator
from polyvisor.images.debian import recipe
from polyvisor.images.flavours import FLAVOURS
from polyvisor.images.image import Image
from polyvisor.lab.plan import (
    LABEL,
    SUITES,
    Kind,
    LabHost,
    default_vcpus,
    freeze_script,
    image_name,
    lab_spec,
    thaw_script,
)
from polyvisor.operation import Progress, Step, silent
from polyvisor.remote.address import Entry, Hosts
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.transfer import copy_image
from polyvisor.spec.vm import NESTED, VMSpec
from polyvisor.ssh import execute
from polyvisor.status import VMState, VMStatus
from polyvisor.values import dataclass

BOOT_S = 900.0
GUEST_IMAGE = "tiny"
_SETTLE_S = 600.0
_ANSWER_S = 60.0
_OUTDATED = "made by another version of Polyvisor (polyvisor lab rm {0}, then lab up, makes it anew)"


@dataclass(frozen=True, kw_only=True)
class LabStatus:
    """A host of the lab as it is now: its VM, its address on the lab's network, and where SSH finds it, where it is ready."""

    name: str
    kind: Kind
    state: VMState
    address: str
    url: str | None
    reason: str | None = None
    memory_mib: int
    vcpus: int


class Lab:
    """The lab of `host`, which is this machine."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.hosts = Hosts(host.home.path / "hosts")
        self._directory = host.home.path / "lab"

    async def members(self) -> list[tuple[LabHost, VMStatus]]:
        """The hosts of the lab that there are."""
        found = []
        for status in await self.host.vms():
            with contextlib.suppress(ValueError):  # somebody else's label
                kind = Kind(status.labels.get(LABEL, ""))
                host = LabHost(kind=kind, number=int(status.name.removeprefix(f"lab-{kind}")))
                found.append((host, status))
        return found

    async def status(self) -> list[LabStatus]:
        return [self._status(host, status) for host, status in await self.members()]

    def outdated(self, host: LabHost) -> bool:
        """Whether a host that is there was made by another version of Polyvisor, which may have lacked what it needs today."""
        record = self.host.store.get(host.name).record
        fresh = lab_spec(host, None, record.spec.vcpus, record.spec.memory_mib)
        if replace(fresh, image=record.spec.image) != record.spec:
            return True
        return self._made_otherwise(self.host.images.store.by_id(record.image_id), host.kind)

    async def up(
        self,
        wanted: Sequence[LabHost],
        *,
        suite: str | None = None,
        vcpus: int | None = None,
        memory_mib: int | None = None,
        progress: Progress = silent,
    ) -> list[LabStatus]:
        """Bring `wanted` up and return them when every one is ready; those that are up already stay as they are.

        The first time builds the images and boots the hosts, which takes minutes in emulation; later ones restore them from
        where `down` saved them. Raises AlreadyExists for a host that is there with other settings, or elsewhere under this
        name, CannotStart for one that boots but can run no VMs, and whatever building and starting raise.
        """
        async with self._alone(progress):
            return await self._up(wanted, _Settings(suite=suite, vcpus=vcpus, memory_mib=memory_mib), progress)

    async def _up(self, wanted: Sequence[LabHost], settings: _Settings, progress: Progress) -> list[LabStatus]:
        new = [host for host in wanted if not self._is_there(host, settings)]
        for host in new:
            await self._image(host.kind, settings.suite or SUITES[0], progress)
        if new:
            await self.host.images.ensure(GUEST_IMAGE, progress)
        ticker = _Ticker(progress, [host.name for host in wanted])
        await _all(self._bring_up(host, settings, ticker) for host in wanted)
        names = {host.name for host in wanted}
        return [status for status in await self.status() if status.name in names]

    async def down(
        self, wanted: Sequence[LabHost] | None = None, *, shut_down: bool = False, progress: Progress = silent
    ) -> list[LabStatus]:
        """Save every host of the lab that runs, or those `wanted`, or shut them down; their memory is free then."""
        async with self._alone(progress):
            return await self._down(wanted, shut_down, progress)

    async def _down(self, wanted: Sequence[LabHost] | None, shut_down: bool, progress: Progress) -> list[LabStatus]:
        there = [(host, status) for host, status in await self.members() if wanted is None or host in wanted]
        alive = [(host, status) for host, status in there if status.state.alive]
        ticker = _Ticker(progress, [host.name for host, _ in alive])

        async def end(host: LabHost, status: VMStatus) -> None:
            if shut_down:
                await self.host.stop(host.name, progress=ticker.of(host.name))
            else:
                await self._save(host, status, ticker.of(host.name))
            ticker.ready(host.name)

        await _all(end(host, status) for host, status in alive)
        return await self.status()

    async def remove(self, wanted: Sequence[LabHost] | None = None) -> list[str]:
        """Delete the hosts of the lab, or those `wanted`, with everything on them, and return their names; images stay."""
        removed = []
        async with self._alone():
            for host in [host for host, _ in await self.members() if wanted is None or host in wanted]:
                with contextlib.suppress(NotFound):
                    await self.host.remove(host.name, force=True)
                self._forget(host)
                removed.append(host.name)
        return removed

    @contextlib.asynccontextmanager
    async def _alone(self, progress: Progress = silent) -> AsyncIterator[None]:
        """Have the lab to oneself: whoever saves hosts while somebody else brings them up would leave neither content."""
        self.host.home.prepare()
        with storage_errors("locking the lab"):
            make_directory(self._directory, 0o700)
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await take_flock(fd, lambda: progress(Step("waiting for another command on the lab")))
            yield
        finally:
            os.close(fd)

    def _forget(self, host: LabHost) -> None:
        """Let `host` be one that has yet to be made ready."""
        if (entry := self.hosts.find(host.name)) and self._ours(entry):
            self.hosts.remove(host.name)
        self._known_hosts(host).unlink(missing_ok=True)

    async def _vcpus(self, kind: Kind) -> int:
        drivers = await self.host.capabilities()
        accelerator = choose_accelerator(VMSpec(name="lab", image=f"lab-{kind}", cpu=NESTED), *drivers)
        qemu = next(each for each in drivers if each.driver == "qemu")
        return default_vcpus(kind, accelerator.name, version_numbers(qemu.version or "0"))

    async def _image(self, kind: Kind, suite: str, progress: Progress) -> None:
        name = image_name(kind, suite)
        if (image := self.host.images.store.find(name)) is None or self._made_otherwise(image, kind):
            await self.host.image_build(f"lab-{kind}", progress, suite=suite, name=name)

    def _made_otherwise(self, image: Image, kind: Kind) -> bool:
        """Whether the present recipes would make another image of it."""
        return image.recipe not in [recipe(FLAVOURS[f"lab-{kind}"], suite) for suite in SUITES]

    def _is_there(self, host: LabHost, settings: _Settings) -> bool:
        """Whether the VM of `host` is there; raises AlreadyExists where it has other settings, or the name is taken."""
        entry = self.hosts.find(host.name)
        if entry is not None and not self._ours(entry):
            hint = f"polyvisor host rm {host.name}, or give that one another name"
            raise AlreadyExists(f"there is a host '{host.name}' already, at {entry.url}", hint=hint)
        try:
            spec = self.host.store.get(host.name).record.spec
        except NotFound:
            return False
        if spec.labels.get(LABEL) != host.kind or settings.applied_to(spec, host) != spec:
            hint = f"polyvisor rm --force {host.name}, then polyvisor lab up makes it anew"
            raise AlreadyExists(f"there is a VM '{host.name}' already, with other settings", hint=hint)
        return True

    async def _bring_up(self, host: LabHost, settings: _Settings, ticker: _Ticker) -> None:
        progress = ticker.of(host.name)
        if self._is_there(host, settings):
            if (await self.host.start(host.name, progress)).state is VMState.PAUSED:
                await self.host.resume(host.name)  # by somebody, or by a save that was cut off
        else:
            self._forget(host)  # its VM was removed by other means
            vcpus = settings.vcpus or await self._vcpus(host.kind)
            await self.host.run(lab_spec(host, settings.suite, vcpus, settings.memory_mib), progress)
        target = await self.host.wait_for_ssh(host.name, timeout_s=BOOT_S, progress=progress)
        progress(Step("setting its clock"))
        await self._shell(host, thaw_script(host.kind, time.time()))
        entry = self._entry(host, target)
        if self.hosts.find(host.name) is None:
            await self._make_ready(host, entry, progress)
        self.hosts.add(entry)
        ticker.ready(host.name)

    async def _save(self, host: LabHost, status: VMStatus, progress: Progress) -> None:
        """Save a host with its guests standing still; they go on where that fails."""
        if (
            not status.running or host.name not in self.hosts.names()
        ):  # paused itself, or nobody has had guests there yet
            await self.host.save(host.name, progress)
            return
        progress(Step("stopping its guests"))
        await self._shell(host, freeze_script(host.kind))
        try:
            await self.host.save(host.name, progress)
        except BaseException:
            await asyncio.shield(self._shell(host, thaw_script(host.kind, time.time())))
            raise

    async def _make_ready(self, host: LabHost, entry: Entry, progress: Progress) -> None:
        """Wait until everything on a new host runs, prove that it runs VMs, and give it what first guests need."""
        progress(Step("waiting for its services"))
        await self._shell(host, "systemctl is-system-running --wait || true", _SETTLE_S)
        remote = RemoteHost(entry, self.host.home)
        try:
            progress(Step("looking at its hypervisor"))
            status = await remote.status()
            offered = {each.name: each for driver in status.capabilities for each in driver.accelerators}
            if (found := offered.get(host.kind)) is None or not found.available:
                reason = found.reason if found else "there is none"
                raise CannotStart(
                    f"host '{host.name}' of the lab came up, but {host.kind} does not work there: {reason}",
                    hint=f"polyvisor logs {host.name}; polyvisor ssh {host.name}",
                )
            await copy_image(self.host, GUEST_IMAGE, remote, progress)
        finally:
            await remote.close()

    async def _shell(self, host: LabHost, script: str, timeout_s: float = _ANSWER_S) -> None:
        """Run `script` as root of a host; raises ProcessFailed, TimedOut."""
        argv = ["sh", "-c", script]
        completed = await execute(self.host, host.name, argv, timeout_s=timeout_s)
        if completed.status:
            raise ProcessFailed([host.name, *argv], completed.status, completed.stderr)

    def _entry(self, host: LabHost, target: SSHTarget) -> Entry:
        """How SSH reaches the host; ports may change from one start to the next, so it is written anew each time."""
        known_hosts = self._known_hosts(host)
        key = read_host_key(self.host.store.get(host.name).path).public
        with storage_errors(f"noting the key of '{host.name}'"):
            write_atomic(known_hosts, f"[{target.address}]:{target.port} {key}\n")
        return Entry(
            name=host.name,
            url=f"ssh://{target.user}@{target.address}:{target.port}",
            added_at=time.time(),
            identity=str(target.identity),
            known_hosts=str(known_hosts),
        )

    def _known_hosts(self, host: LabHost) -> Path:
        return self._directory / f"{host.name}.known_hosts"

    def _ours(self, entry: Entry) -> bool:
        return entry.known_hosts is not None and Path(entry.known_hosts).parent == self._directory

    def _status(self, host: LabHost, status: VMStatus) -> LabStatus:
        entry = self.hosts.find(host.name) if status.running else None
        return LabStatus(
            name=host.name,
            kind=host.kind,
            state=status.state,
            address=host.address,
            url=entry.url if entry and self._ours(entry) else None,
            reason=status.reason or (_OUTDATED.format(host.name) if self.outdated(host) else None),
            memory_mib=status.memory_mib,
            vcpus=status.vcpus,
        )


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What the user asks of new hosts; None where it was left to the lab."""

    suite: str | None
    vcpus: int | None
    memory_mib: int | None

    def applied_to(self, spec: VMSpec, host: LabHost) -> VMSpec:
        """`spec` as it would be with these settings."""
        return replace(
            spec,
            image=image_name(host.kind, self.suite) if self.suite else spec.image,
            vcpus=self.vcpus or spec.vcpus,
            memory_mib=self.memory_mib or spec.memory_mib,
        )


class _Ticker:
    """Progress of several hosts at once, as one: how many are ready, and what each of the others is at."""

    def __init__(self, progress: Progress, names: Iterable[str]) -> None:
        self._progress = progress
        self._phases = dict.fromkeys(names, "")
        self._count = len(self._phases)

    def of(self, name: str) -> Progress:
        def report(step: Step) -> None:
            self._phases[name] = step.phase
            self._report()

        return report

    def ready(self, name: str) -> None:
        self._phases.pop(name, None)
        self._report()

    def _report(self) -> None:
        phase = ", ".join(f"{name}: {phase}" for name, phase in self._phases.items() if phase)
        if phase:
            self._progress(Step(phase, self._count - len(self._phases), self._count, "hosts"))


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Do all of `work` at once, each to its end; then raise the first error."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
