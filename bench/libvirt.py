"""The peer: libvirt, with a daemon of our own for as long as the benchmark runs.

It is the session daemon (`qemu:///session`), with all its directories inside one of ours, so that nothing of this machine's
own libvirt is touched. That also favours the peer: the system daemon does more for each VM (control groups, changes of
owner, namespaces). Where root runs the benchmark, the daemon, virsh and their QEMUs run as `nobody`: Polyvisor's QEMU
has no rights of root either.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench.harness import Failed, call, wait_until

PREFIX = "polyvisor-bench-"


class Libvirt:
    """virsh on the daemon whose directories are in `here`; `options` are how its processes are to be started."""

    def __init__(self, here: Path) -> None:
        self.here = here
        names = ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "HOME")
        self.options: dict[str, Any] = {"env": {**os.environ, **{name: str(here) for name in names}}, "cwd": here}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(here, nobody.pw_uid, nobody.pw_gid)
            kvm = Path("/dev/kvm")
            groups = [kvm.stat().st_gid] if kvm.exists() and kvm.group() != "root" else []
            self.options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": groups}

    def argv(self, *words: str) -> list[str]:
        return ["virsh", "--quiet", "--connect", "qemu:///session", *words]

    def __call__(self, *words: str, timeout_s: float = 120) -> str:
        return call(self.argv(*words), timeout_s=timeout_s, **self.options)

    def version(self) -> str:
        return call(["virsh", "--version"]).strip()

    def batch(self, commands: list[str]) -> None:
        """Run many virsh commands in few processes."""
        for start in range(0, len(commands), 200):
            self("; ".join(commands[start : start + 200]))

    def remove_all(self) -> None:
        """Undefine all domains of benchmarks, also those that an interrupted run left."""
        names = [name for name in self("list", "--all", "--name").split() if name.startswith(PREFIX)]
        for name in self("list", "--name").split():
            if name in names:
                self("destroy", name)
        self.batch([f"undefine {name}" for name in names])


@contextmanager
def libvirt() -> Iterator[Libvirt]:
    """A libvirt daemon, ended at the end. Raises Failed where there is none to start."""
    if shutil.which("virsh") is None:
        raise Failed("libvirt is not installed: sh scripts/setup.sh bench")
    with tempfile.TemporaryDirectory(prefix="pv-bench-", dir="/tmp") as directory, ExitStack() as daemons:
        peer = Libvirt(Path(directory))
        sockets = peer.here / "libvirt"
        daemons.enter_context(_daemon("virtlogd", sockets / "virtlogd-sock", peer))  # writes the logs of its QEMUs
        daemons.enter_context(_daemon("libvirtd", sockets / "libvirt-sock", peer))
        daemons.callback(peer.remove_all)
        yield peer


@contextmanager
def _daemon(name: str, socket: Path, peer: Libvirt) -> Iterator[None]:
    """Run daemon `name` in the foreground, once its `socket` is there; end it by its process id. Raises Failed."""
    binary = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if binary is None:
        raise Failed(f"{name} is not installed: sh scripts/setup.sh bench")
    log = peer.here / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen([binary], stdin=subprocess.DEVNULL, stdout=out, stderr=out, **peer.options)
    try:
        wait_until(lambda: socket.is_socket() or process.poll() is not None, f"{name}'s socket", 30)
        if process.poll() is not None:
            raise Failed(f"{name} ended: {' '.join(log.read_text(errors='replace').splitlines()[-3:]) or 'silently'}")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def domain(
    name: str, *, emulator: str, kernel: Path, initrd: Path, cmdline: str, memory_mib: int, kvm: bool, console: Path
) -> str:
    """The XML of a guest like Polyvisor's: the same kernel, machine type, devices and translation buffer."""
    tcg = "" if kvm else "<tcg><tb-cache unit='MiB'>32</tb-cache></tcg>"
    return f"""<domain type='{"kvm" if kvm else "qemu"}'>
  <name>{escape(name)}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{escape(str(kernel))}</kernel><initrd>{escape(str(initrd))}</initrd><cmdline>{escape(cmdline)}</cmdline>
  </os>
  <features><acpi/><apic/><vmport state='off'/>{tcg}</features>
  <cpu mode='{"host-passthrough" if kvm else "maximum"}'/>
  <devices>
    <emulator>{escape(emulator)}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='virtio'/>
    <serial type='file'><source path='{escape(str(console))}'/></serial>
    <interface type='user'><model type='virtio'/></interface>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
  </devices>
</domain>
"""
