"""From command to guest: `polyvisor run tiny`, the bare QEMU command line doing the same, and virsh.

Every case starts the same guest: kernel, initrd, machine type, devices, memory. The bare command line is the one in
Polyvisor's launch record, word for word. All three start QEMU through a three-line shell script that writes down the time
and becomes QEMU, so that what comes before QEMU can be told from what QEMU and the guest need.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from bench.harness import Failed, Finding, Report, difference, ratio, take_turns, tell, typical
from bench.libvirt import PREFIX, Libvirt, domain
from bench.product import READY, Polyvisor

TITLE = "From command to guest (image tiny)"
OURS, BARE = "polyvisor run", "bare QEMU"
PEER, PEER_TWICE = "virsh 'define; start'", "virsh define && virsh start"
QEMU_STARTS, RETURNS, FIRST, FINISHED = "QEMU starts", "returns", "first output", "boot finished"
TIMEOUT_S = 60.0


class Stamps:
    """A stand-in for QEMU that notes when it is started; VMs alone (`guest=`) count, not questions for the version."""

    def __init__(self, directory: Path, qemu: str) -> None:
        self.script = directory / "qemu-system-x86_64"
        self._notes = directory / "notes"
        self._notes.mkdir()
        self._notes.chmod(0o1777)  # each QEMU runs as a user of its own
        note = f'case "$*" in *guest=*) date +%s%N >{self._notes}/$$ ;; esac'
        self.script.write_text(f'#!/bin/sh\n{note}\nexec {qemu} "$@"\n')
        self.script.chmod(0o755)

    def take(self) -> float:
        """The time (seconds since the epoch) noted since the last call; raises Failed unless there is one."""
        notes = list(self._notes.iterdir())
        if len(notes) != 1:
            raise Failed(f"QEMU was started {len(notes)} times instead of once")
        nanoseconds = int(notes[0].read_text())
        notes[0].unlink()
        return nanoseconds / 1e9


class Starts:
    """The cases; `polyvisor` uses the QEMU of `stamps`. Makes a reference VM whose launch record the others follow."""

    def __init__(self, polyvisor: Polyvisor, stamps: Stamps, scratch: Path) -> None:
        self.polyvisor = polyvisor
        self.stamps = stamps
        self.bare_directory = scratch / "bare"
        self.scratch = scratch
        polyvisor("run", "tiny", "--name", "reference", "--wait")
        polyvisor("kill", "reference")
        stamps.take()
        self.argv = polyvisor.launch_argv("reference")
        shutil.copytree(polyvisor.directory("reference"), self.bare_directory, ignore=_special)
        polyvisor("rm", "--force", "reference")

    def ours(self) -> Mapping[str, float]:
        start = time.time()
        process = _popen(self.polyvisor.argv("run", "tiny", "--name", "bench"), env=self.polyvisor.environment)
        try:
            return self._watch(start, self.polyvisor.directory("bench") / "run" / "console.log", process)
        finally:
            self.polyvisor("rm", "--force", "bench")

    def bare(self) -> Mapping[str, float]:
        run = self.bare_directory / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(mode=0o700)
        for end in ("in", "out"):
            os.mkfifo(run / f"agent.{end}")
        start = time.time()
        process = _popen(self.argv, cwd=self.bare_directory)
        try:
            return self._watch(start, run / "console.log", None)
        finally:
            process.kill()
            process.wait()

    def peer(self, libvirt: Libvirt) -> Mapping[str, float]:
        """One virsh that defines and starts, the quickest way that there is."""
        return self._peer(libvirt, libvirt.argv(f"define {libvirt.here}/start.xml; start {PREFIX}start"))

    def peer_twice(self, libvirt: Libvirt) -> Mapping[str, float]:
        """The two commands that virsh's manual tells a user to type."""
        define, start = libvirt.argv("define", f"{libvirt.here}/start.xml"), libvirt.argv("start", f"{PREFIX}start")
        return self._peer(libvirt, ["sh", "-c", f"{shlex.join(define)} && exec {shlex.join(start)}"])

    def _peer(self, libvirt: Libvirt, argv: list[str]) -> Mapping[str, float]:
        console, name = libvirt.here / "console.log", f"{PREFIX}start"
        console.unlink(missing_ok=True)
        start = time.time()
        process = _popen(argv, **libvirt.options)
        try:
            return self._watch(start, console, process)
        finally:
            libvirt("destroy", name)
            libvirt("undefine", name)

    def prepare_peer(self, libvirt: Libvirt) -> None:
        """Put kernel, initrd and the domain's XML where the peer's user can read them; start once, for its caches."""
        for option, name in (("-kernel", "vmlinuz"), ("-initrd", "initrd")):
            shutil.copyfile(self.bare_directory / self.option(option), libvirt.here / name)
            (libvirt.here / name).chmod(0o644)
        (libvirt.here / "start.xml").write_text(
            domain(
                f"{PREFIX}start",
                emulator=str(self.stamps.script),
                kernel=libvirt.here / "vmlinuz",
                initrd=libvirt.here / "initrd",
                cmdline=self.option("-append"),
                memory_mib=int(self.option("-m").removeprefix("size=").removesuffix("M")),
                kvm=self.option("-accel").startswith("kvm"),
                console=libvirt.here / "console.log",
            )
        )
        self.peer(libvirt)

    def option(self, name: str) -> str:
        """The value of QEMU's option `name` in the launch record."""
        return self.argv[self.argv.index(name) + 1]

    def _watch(self, start: float, console: Path, process: subprocess.Popen[bytes] | None) -> dict[str, float]:
        """Look every millisecond until the guest is ready and the command, if there is one, has returned."""
        seen: dict[str, float] = {}
        while FINISHED not in seen or (process is not None and RETURNS not in seen):
            now = time.time()
            if now - start > TIMEOUT_S:
                raise Failed(f"the guest was not ready within {TIMEOUT_S:g} s (seen: {', '.join(seen) or 'nothing'})")
            if process is not None and RETURNS not in seen and process.poll() is not None:
                if process.returncode:
                    raise Failed(f"{process.args!r:.100} ended with status {process.returncode}")
                seen[RETURNS] = now
            output = _content(console)
            if output:
                seen.setdefault(FIRST, now)
            if READY in output:
                seen.setdefault(FINISHED, now)
            time.sleep(0.001)
        seen[QEMU_STARTS] = self.stamps.take()
        order = [name for name in (QEMU_STARTS, RETURNS, FIRST, FINISHED) if name in seen]
        return {name: (seen[name] - start) * 1000 for name in order}


def bench_start(polyvisor: Polyvisor, stamps: Stamps, scratch: Path, libvirt: Libvirt | str, rounds: int) -> Report:
    """Run the cases; `libvirt` is the peer, or why there is none."""
    tell(f"{TITLE}: preparing")
    starts = Starts(polyvisor, stamps, scratch)
    cases = {OURS: starts.ours, BARE: starts.bare}
    report = Report(TITLE)
    if isinstance(libvirt, Libvirt):
        starts.prepare_peer(libvirt)
        cases |= {PEER: lambda: starts.peer(libvirt), PEER_TWICE: lambda: starts.peer_twice(libvirt)}
    else:
        report.missing.append(f"{PEER}: {libvirt}")
    report.measures = take_turns(cases, rounds, TITLE)
    report.findings = _findings(report)
    return report


def _findings(report: Report) -> list[Finding]:
    found = report.measures
    findings = [
        Finding("Polyvisor's own share, to the guest's first output", difference(found, FIRST, OURS, BARE), "ms", 100),
        Finding("the same, to QEMU's start", difference(found, QEMU_STARTS, OURS, BARE), "ms", 100),
        Finding("the same, to the finished boot", difference(found, FINISHED, OURS, BARE), "ms"),
        Finding("polyvisor run returns after", typical(found, OURS, RETURNS), "ms"),
    ]
    if PEER in found:
        findings += [
            Finding(f"{name} takes as many times as long", ratio(found, RETURNS, name, OURS), "×", 3, at_most=False)
            for name in (PEER, PEER_TWICE)
        ]
        findings += [
            Finding("virsh's own share, to the guest's first output", difference(found, FIRST, PEER, BARE), "ms"),
        ]
    return findings


def _popen(argv: list[str], **options: object) -> subprocess.Popen[bytes]:
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(argv, **{**quiet, **options})  # type: ignore[call-overload, no-any-return]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _special(directory: str, names: list[str]) -> list[str]:
    """For `copytree`: what can't be copied, sockets and named pipes."""
    return [name for name in names if not ((here := Path(directory) / name).is_file() or here.is_dir())]
