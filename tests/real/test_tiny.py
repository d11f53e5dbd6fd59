"""The image `tiny`, built from a Debian mirror and booted in QEMU: what a user of it does, done to it.

QEMU is driven directly here, without Polyvisor's driver: a fault of the image must not look like one of the driver.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polyvisor.images.hostkey import HostKey
from polyvisor.images.image import Image, Seed
from polyvisor.images.inspection.findings import Driver
from polyvisor.images.inspection.inspector import inspect_stored
from polyvisor.images.seed import SeedData, write_seeded
from polyvisor.images.store import ImageStore
from polyvisor.images.tiny import build_tiny
from polyvisor.operation import Step
from polyvisor.process import Completed, run

pytestmark = [pytest.mark.qemu, pytest.mark.network, pytest.mark.timeout(300)]

READY_S = 60.0  # generous: the machine may be busy


@dataclass
class Built:
    store: ImageStore
    image: Image
    key: Path


@pytest.fixture(scope="module")
def built(tiny: Image, image_store: ImageStore, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The image, and an SSH key."""
    key = tmp_path_factory.mktemp("tiny") / "key"
    asyncio.run(run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]))
    return Built(image_store, tiny, key)


class Guest:
    """A running QEMU with the image, its console and its QMP socket."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, key: Path, directory: Path) -> None:
        self.process = process
        self.console = b""
        self._port, self._key, self._directory = port, key, directory
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout
        while data := await self.process.stdout.read(4096):
            self.console += data

    async def says(self, text: str, *, times: int = 1, timeout_s: float = READY_S) -> None:
        """Wait until the console has shown `text` that often."""
        until = time.monotonic() + timeout_s
        while self.console.count(text.encode()) < times:
            assert time.monotonic() < until, f"no {text!r} x {times} on the console:\n{self.console.decode()}"
            assert self.process.returncode is None, f"QEMU ended:\n{self.console.decode()}"
            await asyncio.sleep(0.05)

    def type(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(text.encode())

    def _options(self) -> list[str]:
        settings = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes")
        return [word for setting in settings for word in ("-o", setting)]

    async def scanned(self) -> str:
        """The host key that the guest shows, as "algorithm base64"."""
        scan = await run(["ssh-keyscan", "-t", "ed25519", "-p", str(self._port), "127.0.0.1"], timeout_s=60)
        return " ".join(line for line in scan.stdout.splitlines() if not line.startswith("#")).partition(" ")[2]

    async def ssh(self, command: str, *, key: bool = True, check: bool = True) -> Completed:
        identity = ["-i", str(self._key)] if key else ["-o", "IdentityAgent=none", "-o", "IdentityFile=/dev/null"]
        argv = ["ssh", *self._options(), *identity, "-p", str(self._port), "root@127.0.0.1", command]
        return await run(argv, timeout_s=60, check=check)

    async def scp(self, *words: str) -> None:
        await run(["scp", *self._options(), "-i", str(self._key), "-P", str(self._port), *words], timeout_s=60)

    async def qmp(self, command: str) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self._directory / "qmp"))
        await reader.readline()
        for execute in ("qmp_capabilities", command):
            writer.write(json.dumps({"execute": execute}).encode() + b"\n")
            answer: dict[str, Any] = {}
            while "return" not in answer:
                answer = json.loads(await reader.readline())
                assert "error" not in answer
        writer.close()

    async def ends(self, timeout_s: float = 30.0) -> float:
        """Wait for QEMU to end; returns the seconds that it took."""
        begin = time.monotonic()
        async with asyncio.timeout(timeout_s):
            await self.process.wait()
        return time.monotonic() - begin


@asynccontextmanager
async def booted(
    built: Built,
    directory: Path,
    *devices: str,
    user_data: str | None = None,
    host_key: HostKey | None = None,
    memory_mib: int = 128,
    machine: str = "pc",
) -> AsyncIterator[Guest]:
    """A guest that has said that it is ready; killed at the end."""
    image = built.image
    assert image.kernel and image.initrd
    data = SeedData(
        instance_id="i-1",
        hostname="web-1",
        ssh_keys=(built.key.with_suffix(".pub").read_text(),),
        user_data=user_data,
        host_key=host_key,
    )
    seeded = directory / "initrd"
    write_seeded(built.store.file(image, image.initrd), data, seeded)
    port = free_port()
    argv = [
        *("qemu-system-x86_64", "-M", machine, "-accel", "tcg,tb-size=32", "-nodefaults", "-display", "none"),
        *("-m", str(memory_mib), "-kernel", str(built.store.file(image, image.kernel)), "-initrd", str(seeded)),
        *("-append", image.cmdline, "-serial", "stdio", "-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
        *("-netdev", f"user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *(devices or ("-device", "virtio-net-pci,netdev=n0", "-device", "virtio-rng-pci")),
    ]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.STDOUT)
    guest = Guest(process, port, built.key, directory)
    try:
        await guest.says("polyvisor: ready")
        yield guest
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_manifest_says_how_to_boot_it(built: Built) -> None:
    image = built.image
    assert image.seed is Seed.INITRD
    assert (image.user, image.memory_mib, image.disk) == ("root", 128, None)
    assert "console=ttyS0" in image.cmdline
    assert "no_timer_check" in image.cmdline, "it panics where the host is busy (docs/design/tiny-image.md)"
    assert image.size < 40 << 20


async def test_building_again_gives_the_same_image(built: Built, cache: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    again = await build_tiny(ImageStore(tmp_path / "images"), cache / "home" / "cache", progress=steps.append)
    assert again.id == built.image.id
    assert {"index", "unpack", "pack"} <= {step.phase for step in steps}


async def test_a_guest_from_its_first_word_to_its_power_button(built: Built, tmp_path: Path) -> None:
    """One guest, since each takes a while to boot: its identity, its ways in, files in both directions, its end."""
    script = "#!/bin/sh\nhostname >/root/made-by-user-data\nexit 3\n"
    key = await _host_key(tmp_path)
    async with booted(built, tmp_path, user_data=script, host_key=key) as guest:
        assert await guest.scanned() == key.public
        await _who_it_is(guest)
        await guest.says("polyvisor: user-data ended with status 3")
        assert (await guest.ssh("cat /root/made-by-user-data")).stdout == "web-1\n"
        await _files_both_ways(guest, tmp_path)
        await _login_on_the_console(guest)
        await guest.qmp("system_powerdown")
        assert await guest.ends() < 20


async def _host_key(directory: Path) -> HostKey:
    path = directory / "host_key"
    await run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)])
    return HostKey(private=path.read_text(), public=path.with_suffix(".pub").read_text().strip())


async def _who_it_is(guest: Guest) -> None:
    shown = (await guest.ssh("hostname; id -un; . /etc/os-release; echo $NAME; uname -s; nproc")).stdout
    assert shown.split("\n")[:5] == ["web-1", "root", "Polyvisor tiny", "Linux", "1"]
    network = (await guest.ssh("ip -4 -o addr show eth0; ip route; cat /etc/resolv.conf")).stdout
    assert "10.0.2.15/24" in network
    assert "default via 10.0.2.2" in network
    assert "nameserver 10.0.2.3" in network
    stranger = await guest.ssh("true", key=False, check=False)
    assert "Permission denied (publickey)" in stranger.stderr


async def _files_both_ways(guest: Guest, directory: Path) -> None:
    """By SFTP and by the old protocol."""
    source = directory / "source"
    source.write_bytes(os.urandom(300_000))
    for mode in ("-s", "-O"):
        back = directory / f"back{mode}"
        await guest.scp(mode, str(source), "root@127.0.0.1:/tmp/copy")
        await guest.scp(mode, "root@127.0.0.1:/tmp/copy", str(back))
        assert back.read_bytes() == source.read_bytes()
        await guest.ssh("rm /tmp/copy")


async def _login_on_the_console(guest: Guest) -> None:
    """Without a password."""
    await guest.says("web-1 login:")
    guest.type("root\n")
    await guest.says("root@web-1:~#")
    guest.type("echo $((6*7)) is the answer\n")
    await guest.says("42 is the answer")


@pytest.mark.parametrize(("machine", "nic"), [("q35", "virtio-net-pci"), ("pc", "vmxnet3")])
async def test_other_machines(built: Built, tmp_path: Path, machine: str, nic: str) -> None:
    async with booted(built, tmp_path, "-device", f"{nic},netdev=n0", machine=machine) as guest:
        assert (await guest.ssh("hostname")).stdout == "web-1\n"


async def test_what_it_has_not_been_given(built: Built, tmp_path: Path) -> None:
    """Without a host key it makes its own, less memory is enough, and what it is told to do and can't it ignores aloud."""
    async with booted(built, tmp_path, user_data="#cloud-config\npackages: [vim]\n", memory_mib=112) as guest:
        await guest.says("user-data is not a script (#!): ignored")
        assert (await guest.scanned()).startswith("ssh-ed25519 ")
        assert (await guest.ssh("hostname")).stdout == "web-1\n"


async def test_the_power_button_powers_it_off_from_its_first_moment(built: Built, tmp_path: Path) -> None:
    """Pressed as it says that it is ready."""
    async with booted(built, tmp_path) as guest:
        await guest.qmp("system_powerdown")
        assert await guest.ends() < 20


async def test_reboot_comes_back_and_poweroff_ends_it(built: Built, tmp_path: Path) -> None:
    async with booted(built, tmp_path) as guest:
        await guest.ssh("reboot")
        await guest.says("polyvisor: ready", times=2)
        assert (await guest.ssh("hostname")).stdout == "web-1\n"
        await guest.ssh("poweroff")
        await guest.ends()


@pytest.mark.parametrize(
    ("device", "node"),
    [("virtio-blk-pci,drive=d0", "vda"), ("ide-hd,drive=d0,bus=ide.0", "sda"), ("scsi-hd,drive=d0", "sda")],
)
async def test_disks(built: Built, tmp_path: Path, device: str, node: str) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.write(b"on the disk\n")
        file.truncate(8 << 20)
    controller = ("-device", "virtio-scsi-pci") if device.startswith("scsi") else ()
    drive = ("-drive", f"if=none,id=d0,format=raw,file={disk}", *controller, "-device", device)
    async with booted(built, tmp_path, "-device", "virtio-net-pci,netdev=n0", *drive) as guest:
        await guest.ssh(f"for i in $(seq 50); do [ -b /dev/{node} ] && break; sleep 0.2; done")
        assert (await guest.ssh(f"head -n 1 /dev/{node}")).stdout == "on the disk\n"


async def test_its_kernel_and_initramfs_can_be_inspected(built: Built) -> None:
    """Xen's entries are read through the kernel's LZ4, as Debian packs it; the drivers of QEMU and Xen are there."""
    kernel = (await inspect_stored(built.store, built.image)).findings.direct
    assert kernel is not None
    assert (kernel.architecture, kernel.xen_pv, kernel.xen_pvh, kernel.known_by) == (
        "x86_64",
        True,
        True,
        "its ELF notes",
    )
    needed = ("virtio_pci", "virtio_blk", "virtio_net", "xen_blkfront", "xen_netfront", "ata_piix", "sd_mod")
    assert {kernel.drivers[name] for name in needed} == {Driver.INITRAMFS}


async def test_without_a_network_it_is_ready_all_the_same(built: Built, tmp_path: Path) -> None:
    async with booted(built, tmp_path, "-device", "virtio-rng-pci") as guest:
        await guest.says("web-1 login:")


def test_the_tools_of_these_tests_are_there() -> None:
    """Rather than failing in the middle of each."""
    assert all(map(shutil.which, ("qemu-system-x86_64", "ssh", "scp", "ssh-keygen", "gpgv")))
