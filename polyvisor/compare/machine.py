"""The machines that workloads are measured on: a guest, made for the purpose by `HostApi`, or the host itself.

A guest is in one of four states (not there, up, saved, gone); workloads ask for the one that they need, and get there by the
shortest way. What is timed on the way is kept for the workloads that are about just that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Protocol

from polyvisor.compare.cap import CpuCap
from polyvisor.compare.target import Target
from polyvisor.errors import NotFound, PolyvisorError, ProcessFailed, TimedOut, Unsupported, WrongState
from polyvisor.host.api import HostApi
from polyvisor.process import Completed
from polyvisor.spec.resources import Changes
from polyvisor.spec.vm import VMSpec
from polyvisor.ssh import execute

# Runs a script in the shell of a host, for at most so many seconds.
Shell = Callable[[str, float], Awaitable[Completed]]
BOOT_S = 900.0  # until it offers a login
ANSWER_S = 300.0  # from then on, until its SSH server answers
_MARKS = (b"login:", b"polyvisor: ready")
_QUESTION_S = 60.0


class Machine(Protocol):
    """What a workload may do; all of it raises errors of Polyvisor."""

    @property
    def target(self) -> Target:
        """Which target it stands for."""

    async def run(self, script: str, *, timeout_s: float) -> str:
        """What a script for a POSIX shell prints, run as root where the image allows it."""

    async def prepared(self, name: str, script: str) -> None:
        """Run `script` unless it was run here already under this name."""

    async def prepared_peer(self, name: str, script: str) -> None:
        """The same in a second guest of this kind, on the network of the second card; it is made where there is none."""

    async def lacking(self, programs: list[str]) -> list[str]:
        """Which of `programs` are not there."""

    async def time_of(self, event: str) -> float:
        """How many seconds `create`, `start`, `boot`, `save`, `restore` or `fork` took; `answer` and `fork-pause` with them."""

    async def memory_mib(self) -> float:
        """How much of its host's memory it takes, in MiB."""

    async def alive(self) -> bool:
        """Whether it can go on being measured."""

    async def discard(self) -> None:
        """Remove it; the next measurement makes a new one."""

    async def close(self) -> None:
        """Remove it for good, with all that belongs to it."""


class _Base:
    """What both kinds share."""

    def __init__(self, target: Target, cap_name: str) -> None:
        self.target = target
        self._cap = None if target.cpu_cap is None else CpuCap(cap_name, target.cpu_cap)
        self._prepared: set[str] = set()

    @contextlib.contextmanager
    def _capped(self) -> Iterator[None]:
        with self._cap.inside() if self._cap else contextlib.nullcontext():
            yield

    async def run(self, script: str, *, timeout_s: float) -> str:
        raise NotImplementedError

    async def prepared(self, name: str, script: str) -> None:
        if name not in self._prepared:
            await self.run(script, timeout_s=BOOT_S)
            self._prepared.add(name)

    async def lacking(self, programs: list[str]) -> list[str]:
        if not programs:
            return []
        # Debian's sbin directories are not in everybody's PATH.
        look = (
            f"PATH=$PATH:/usr/sbin:/sbin; for p in {' '.join(programs)}; do command -v $p >/dev/null || echo $p; done"
        )
        return (await self.run(look, timeout_s=BOOT_S)).split()


def _checked(completed: Completed, script: str) -> str:
    if completed.status:
        raise ProcessFailed(["sh", "-c", script], completed.status, completed.stderr or completed.stdout)
    return completed.stdout


class Native(_Base):
    """A host itself, by its shell."""

    def __init__(self, target: Target, shell: Shell, cap_name: str) -> None:
        super().__init__(target, cap_name)
        self._shell = shell

    async def run(self, script: str, *, timeout_s: float) -> str:
        with self._capped():
            return _checked(await self._shell(script, timeout_s), script)

    async def prepared_peer(self, name: str, script: str) -> None:
        raise Unsupported("the host itself has no second guest beside it")

    async def time_of(self, event: str) -> float:
        raise Unsupported(f"'{event}' is of guests: the host itself has none")

    async def memory_mib(self) -> float:
        raise Unsupported("the host itself is not a guest, whose memory could be told")

    async def alive(self) -> bool:
        return True

    async def discard(self) -> None:
        self._prepared.clear()

    async def close(self) -> None:
        if self._cap:
            self._cap.close()


class Guest(_Base):
    """A guest on the host `api`, whose shell is `shell`; `spec` says what it is."""

    def __init__(self, target: Target, api: HostApi, shell: Shell, spec: VMSpec) -> None:
        super().__init__(target, spec.name)
        self._api, self._shell, self.spec = api, shell, spec
        self._times: dict[str, float] = {}
        self._free_mib = 0
        self._up = self._saved = False
        self._peer: Guest | None = None

    async def up(self) -> None:
        """Have the guest run, and answer."""
        if self._up:
            return
        if self._saved:
            await self._restore()
            return
        await self.login()
        await self._api.wait_for_ssh(self.spec.name, timeout_s=ANSWER_S)
        self._up = True

    async def login(self) -> None:
        """Make and start the guest, and wait until its console offers a login; whether it can be reached is left open."""
        await self.discard()  # one of a comparison that was killed
        if self.target.kind.on_xen:
            self._free_mib = (await self._api.status()).memory_free_mib
        name, began = self.spec.name, time.monotonic()
        with self._capped():
            await self._api.create(self.spec, new=True)
            created = time.monotonic()
            await self._api.start(name)
        self._times |= {"create": created - began, "start": time.monotonic() - created}
        await self._until_login()
        self._times["boot"] = time.monotonic() - created

    async def set_at_rest(self, changes: Changes) -> None:
        """Stop the guest, change its settings, and start it again."""
        await self.up()
        name = self.spec.name
        await self._api.stop(name)
        self._up = False
        await self._api.set(name, changes)
        with self._capped():
            await self._api.start(name)
        await self._api.wait_for_ssh(name, timeout_s=ANSWER_S)
        self._up = True

    async def _until_login(self) -> None:
        """Wait until the guest's console offers a login; raises TimedOut, WrongState where the guest ends before."""
        said = b""
        try:
            async with asyncio.timeout(BOOT_S):
                async with contextlib.aclosing(self._api.log(self.spec.name, follow=True)) as log:  # type: ignore[type-var]
                    async for chunk in log:
                        said = said[-64:] + chunk
                        if any(mark in said for mark in _MARKS):
                            return
        except TimeoutError as error:
            raise TimedOut(f"the guest of target '{self.target.label}' offered no login in {BOOT_S:.0f} s") from error
        raise WrongState(f"the guest of target '{self.target.label}' ended while it booted")

    async def run(self, script: str, *, timeout_s: float) -> str:
        await self.up()
        completed = await execute(self._api, self.spec.name, ["sh", "-c", script], timeout_s=timeout_s)
        return _checked(completed, script)

    async def prepared_peer(self, name: str, script: str) -> None:
        if self._peer is None:
            spec = replace(self.spec, name=f"{self.spec.name[:58]}-peer")
            self._peer = Guest(self.target, self._api, self._shell, spec)
        await self._peer.prepared(name, script)

    async def time_of(self, event: str) -> float:
        if event in ("create", "start", "boot"):
            await self.up()
        elif event == "fork":
            await self._fork()
        elif event == "save":
            await self._save()
        elif event == "restore":
            await self._save()
            await self._restore()
        return self._times[event]

    async def _fork(self) -> None:
        """Copy the guest while it runs: `fork` is until the copy runs, `fork-pause` how long the guest stands still."""
        await self.up()
        name = f"{self.spec.name[:58]}-fork"
        forked = await self._api.fork(self.spec.name, [name])
        await self._api.remove(name, force=True)
        self._times |= {"fork": forked.copy_s + forked.begin_s, "fork-pause": forked.pause_s}

    async def _save(self) -> None:
        if self._saved and not self._up:
            return
        await self.up()
        began = time.monotonic()
        await self._api.save(self.spec.name)
        self._times["save"] = time.monotonic() - began
        self._up, self._saved = False, True

    async def _restore(self) -> None:
        """Let the saved guest go on: `restore` is until its vCPUs do, `answer` until it answers."""
        began = time.monotonic()
        with self._capped():
            await self._api.start(self.spec.name)
        self._times["restore"] = time.monotonic() - began
        await self._api.wait_for_ssh(self.spec.name, timeout_s=ANSWER_S)
        self._times["answer"] = time.monotonic() - began
        self._up, self._saved = True, False

    async def memory_mib(self) -> float:
        """On Xen what Xen has less; on QEMU the process's share (PSS) of the memory that it uses."""
        await self.up()
        if self.target.kind.on_xen:
            return float(self._free_mib - (await self._api.status()).memory_free_mib)
        pid = (await self._api.show(self.spec.name)).status.pid
        look = f"awk '/^Pss:/ {{ print $2 }}' /proc/{pid}/smaps_rollup"
        said = _checked(await self._shell(look, _QUESTION_S), look).strip()
        if not said.isdigit():
            raise PolyvisorError(f"the memory of process {pid} can't be told", hint="it takes the rights of its user")
        return int(said) / 1024

    async def alive(self) -> bool:
        """Whether the guest is there, running or saved."""
        if not (self._up or self._saved):
            return False
        try:
            return (await self._api.show(self.spec.name)).status.state.keeps_devices
        except PolyvisorError:
            return False

    async def discard(self) -> None:
        self._up = self._saved = False
        self._prepared.clear()
        with contextlib.suppress(NotFound):
            await self._api.remove(self.spec.name, force=True)
        if self._peer is not None:
            await self._peer.discard()

    async def close(self) -> None:
        await self.discard()
        if self._peer is not None:
            await self._peer.close()
        if self._cap:
            self._cap.close()
