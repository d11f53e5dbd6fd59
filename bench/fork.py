"""VMs that begin from another one's memory, beside `virsh restore` of a saved VM, the nearest thing that libvirt has.

All of it within one Python process, until the guest's vCPUs run: what a program waits for that needs a hundred test
machines. The call returns when the VMs are durable too, which is given beside. The peer is timed as the command that a user
types. The guest is the image `tiny`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bench.harness import Failed, Finding, Report, ratio, since, take_turns, tell, timed, typical
from bench.libvirt import PREFIX, Libvirt, domain
from bench.product import READY, Polyvisor
from polyvisor.drivers.qemu.programs import find_binary
from polyvisor.errors import PolyvisorError
from polyvisor.host.host import Host
from polyvisor.images.store import ImageStore
from polyvisor.spec.vm import VMSpec

TITLE = "Forks (image tiny)"
SOURCE, TEMPLATE = "fork-source", "fork-template"
ON_DEMAND, WARM, OF_RUNNING, PEER = "from a template", "from a warm one", "fork of a running VM", "virsh restore"
MS = "ms"
CROWD = 100
CROWD_ROUNDS = 3
SETTLE_S = 20.0
T = TypeVar("T")


class Forks:
    """The cases; makes a source and a template of it in the home of `polyvisor`."""

    def __init__(self, polyvisor: Polyvisor) -> None:
        self.host = Host(polyvisor.home)
        self.runner = asyncio.Runner()
        self.number = 0
        self.do(self._prepare())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    async def _prepare(self) -> None:
        await self.host.run(VMSpec(name=SOURCE, image="tiny"))
        await self.host.wait_for_ssh(SOURCE, timeout_s=120)
        await self.host.template_create(TEMPLATE, SOURCE)
        # Somebody has the template's memory, as in any use that matters: the very first one reads it from the disk.
        await self.host.run_from(TEMPLATE, [f"{TEMPLATE}-first"])
        await self.host.pause(f"{TEMPLATE}-first")

    def on_demand(self) -> Mapping[str, float]:
        return self._begun(warm=False)

    def warm(self) -> Mapping[str, float]:
        return self._begun(warm=True)

    def _begun(self, *, warm: bool) -> Mapping[str, float]:
        name = self._name()
        if warm:
            self.do(self.host.template_warm(TEMPLATE, names=[name]))
        start = time.perf_counter()
        forked = self.do(self.host.run_from(TEMPLATE, [name]))
        took = since(start)
        self.do(self.host.remove(name, force=True))
        return {MS: forked.begin_s * 1000, "until the call returns": took}

    def of_running(self) -> Mapping[str, float]:
        name = self._name()
        start = time.perf_counter()
        forked = self.do(self.host.fork(SOURCE, [name]))
        took = since(start)
        self.do(self.host.remove(name, force=True))
        runs = (forked.copy_s + forked.begin_s) * 1000
        pause = forked.pause_s * 1000
        return {MS: runs, "until the call returns": took, "pause of the source": pause, "copying": forked.copy_s * 1000}

    def crowd(self) -> Mapping[str, float]:
        """A hundred at once: how long they take, and, once they idle, whether they answer and what they occupy."""
        names = [f"crowd-{i}" for i in range(CROWD)]
        start = time.perf_counter()
        forked = self.do(self.host.fork(SOURCE, names))
        took = since(start)
        runs = (forked.copy_s + forked.begin_s) * 1000
        time.sleep(SETTLE_S)
        answering = self.do(self._answering(names))
        pids = [status.pid for status in forked.forks if status.pid]
        pss = sum(map(pss_kib, pids)) / 1024
        before = sum(map(cpu_s, pids))
        time.sleep(10.0)
        busy = sum(map(cpu_s, pids)) - before
        self.do(self._remove(names))
        return {
            MS: runs,
            "until the call returns": took,
            "answering by SSH": answering,
            "memory of one (PSS, MiB)": pss / CROWD,
            "CPU of one (% of a core)": busy / 10.0 / CROWD * 100,
        }

    async def _answering(self, names: list[str]) -> float:
        turns = asyncio.Semaphore(8)

        async def one(name: str) -> bool:
            async with turns:
                try:
                    await self.host.wait_for_ssh(name, timeout_s=60)
                except PolyvisorError as error:
                    tell(f"{name} does not answer: {error}")
                    return False
                return True

        return float(sum(await asyncio.gather(*map(one, names))))

    async def _remove(self, names: list[str]) -> None:
        for name in names:
            await self.host.remove(name, force=True)

    def _name(self) -> str:
        self.number += 1
        return f"fork-{self.number}"

    def close(self) -> None:
        self.do(self.host.template_remove(TEMPLATE))
        self.do(self._remove([SOURCE, f"{TEMPLATE}-first"]))
        self.runner.close()


class Restores:
    """The peer: a domain that was saved once its guest was ready, restored again and again."""

    def __init__(self, libvirt: Libvirt, polyvisor: Polyvisor) -> None:
        self.libvirt, self.name, self.file = libvirt, f"{PREFIX}restore", libvirt.here / "saved"
        store = ImageStore(polyvisor.home / "images")
        image = store.get("tiny")
        assert image.kernel is not None and image.initrd is not None
        for name, file in (("vmlinuz", image.kernel), ("initrd", image.initrd)):
            shutil.copyfile(store.file(image, file), libvirt.here / name)
            (libvirt.here / name).chmod(0o644)
        console = libvirt.here / "restore.log"
        xml = libvirt.here / "restore.xml"
        xml.write_text(
            domain(
                self.name,
                emulator=find_binary(),
                kernel=libvirt.here / "vmlinuz",
                initrd=libvirt.here / "initrd",
                cmdline=image.cmdline,
                memory_mib=image.memory_mib,
                kvm=False,
                console=console,
            )
        )
        libvirt(f"define {xml}; start {self.name}")
        deadline = time.monotonic() + 120
        while READY not in (console.read_bytes() if console.exists() else b""):
            if time.monotonic() > deadline:
                raise Failed("libvirt's guest did not boot")
            time.sleep(0.1)
        libvirt("save", self.name, str(self.file))

    def restore(self) -> Mapping[str, float]:
        took = timed(self.libvirt.argv("restore", str(self.file)), **self.libvirt.options)
        self.libvirt("destroy", self.name)
        return {MS: took}


def pss_kib(pid: int) -> int:
    """The memory of a process, of what it shares its share (proc(5), smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def cpu_s(pid: int) -> float:
    """The CPU time that a process has had so far (proc(5), stat: utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bench_fork(polyvisor: Polyvisor, libvirt: Libvirt | str, rounds: int) -> Report:
    """Run the cases; `libvirt` is the peer, or why there is none."""
    tell(f"{TITLE}: preparing")
    report = Report(TITLE)
    forks = Forks(polyvisor)
    try:
        cases = {ON_DEMAND: forks.on_demand, WARM: forks.warm, OF_RUNNING: forks.of_running}
        if isinstance(libvirt, Libvirt):
            cases[PEER] = Restores(libvirt, polyvisor).restore
        else:
            report.missing.append(f"{PEER}: {libvirt}")
        report.measures = take_turns(cases, rounds, TITLE)
        crowd = f"{CROWD} forks"
        report.measures |= take_turns({crowd: forks.crowd}, min(rounds, CROWD_ROUNDS), f"{TITLE}: {crowd}")
    finally:
        forks.close()
    report.findings = _findings(report, crowd)
    return report


def _findings(report: Report, crowd: str) -> list[Finding]:
    found = report.measures
    findings = [
        Finding("a VM that begins from a template runs after", typical(found, ON_DEMAND, MS), MS, 60),
        Finding("one that was made ready before", typical(found, WARM, MS), MS, 15),
        Finding("a fork of a VM that runs, copying it included", typical(found, OF_RUNNING, MS), MS),
        Finding("its source stands still for", typical(found, OF_RUNNING, "pause of the source"), MS, 150),
        Finding(f"{crowd} run after", typical(found, crowd, MS) / 1000, "s", 5),
        Finding("of them answer by SSH", typical(found, crowd, "answering by SSH"), "", CROWD, at_most=False),
        Finding("memory of one that idles (PSS)", typical(found, crowd, "memory of one (PSS, MiB)"), "MiB", 38),
        Finding("CPU of one that idles", typical(found, crowd, "CPU of one (% of a core)"), "% of a core"),
    ]
    if PEER in found:
        findings += [
            Finding(
                "virsh restore takes as many times as long as a VM from a template",
                ratio(found, MS, PEER, ON_DEMAND),
                "×",
                8,
                at_most=False,
            ),
            Finding("and as one that was ready", ratio(found, MS, PEER, WARM), "×", 40, at_most=False),
        ]
    return findings
