"""The image `debian`, built for real and booted by BIOS, by UEFI and directly, under emulation.

Building takes one to two minutes, a first boot about one; the three of them share two cores. With POLYVISOR_TEST_ALL=1
in the environment there are more boots (twenty minutes): update-grub, emulated devices, Debian 13, a cancelled build.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from polyvisor.images.debian import build_debian
from polyvisor.images.image import Image
from polyvisor.images.seed import SeedData, nocloud_iso
from polyvisor.images.store import ImageStore

pytestmark = [pytest.mark.qemu, pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(1500)]
exhaustive = pytest.mark.skipif(
    not os.environ.get("POLYVISOR_TEST_ALL"), reason="boots for many minutes: set POLYVISOR_TEST_ALL=1"
)

BOOT_TIMEOUT_S = 420
GROWN_GIB = 6
OVMF = Path("/usr/share/OVMF")
BOOTS = ("bios", "uefi", "direct")


@dataclass
class Machine:
    """A QEMU with a guest of ours in it; everything it needs is in `directory`."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes]
    started: float
    login_s: float = 0.0

    @property
    def console(self) -> str:
        return (self.directory / "console").read_text(errors="replace")

    def ssh(self, command: str, *, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=10"]
        argv = ["ssh", "-p", str(self.port), "-i", str(self.directory / "key")]
        argv += [word for option in options for word in ("-o", option)]
        return subprocess.run(
            [*argv, "debian@127.0.0.1", command], capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def output(self, command: str) -> str:
        """What `command` prints in the guest; fails the test where it fails."""
        done = self.ssh(command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def wait_for_login(self, *, unlike: str = "") -> str:
        """Wait until SSH answers, and return the boot's id; `unlike` is the id of the boot before."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            done = self.ssh("cat /proc/sys/kernel/random/boot_id", timeout_s=60)
            if done.returncode == 0 and done.stdout != unlike:
                self.login_s = self.login_s or time.monotonic() - self.started
                return done.stdout
            time.sleep(1)
        raise AssertionError(f"no login; the console's end:\n{self.console[-3000:]}")

    def reboot(self) -> None:
        before = self.wait_for_login()
        self.ssh("sudo systemctl reboot")
        self.wait_for_login(unlike=before)

    def power_off(self) -> None:
        """Let the guest switch itself off; fails where QEMU does not end."""
        self.ssh("sudo systemctl poweroff")
        assert self.process.wait(90) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def firmware_argv(boot: str, image: Image, store: ImageStore, directory: Path) -> list[str]:
    """UEFI begins with an empty NVRAM: nothing there names our loader."""
    if boot == "bios":
        return ["-M", "pc"]
    if boot == "uefi":
        shutil.copy(OVMF / "OVMF_VARS_4M.fd", directory / "vars")
        code = f"if=pflash,format=raw,readonly=on,file={OVMF / 'OVMF_CODE_4M.fd'}"
        return ["-M", "q35", "-drive", code, "-drive", f"if=pflash,format=raw,file={directory / 'vars'}"]
    assert image.kernel is not None
    assert image.initrd is not None
    kernel, initrd = store.file(image, image.kernel), store.file(image, image.initrd)
    return ["-M", "pc", "-kernel", str(kernel), "-initrd", str(initrd), "-append", image.cmdline]


def device_argv(devices: str, directory: Path, port: int) -> list[str]:
    disk = ["-drive", f"if=none,id=disk,format=qcow2,file={directory / 'disk'}"]
    seed = ["-drive", f"if=none,id=seed,format=raw,readonly=on,file={directory / 'seed'}"]
    net = ["-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22"]
    if devices == "paravirtual":
        models = ["virtio-blk-pci,drive=disk", "virtio-blk-pci,drive=seed", "virtio-net-pci,netdev=net"]
    else:
        models = ["ahci,id=sata", "ide-hd,drive=disk,bus=sata.0", "ide-cd,drive=seed,bus=sata.1", "e1000,netdev=net"]
    return [*disk, *seed, *net, *(word for model in models for word in ("-device", model))]


def start(image: Image, store: ImageStore, directory: Path, boot: str, devices: str = "paravirtual") -> Machine:
    directory.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "key"], check=True)
    key = (directory / "key.pub").read_text()
    nocloud_iso(SeedData(instance_id=f"i-{boot}", hostname=f"by-{boot}", ssh_keys=(key,)), directory / "seed")
    assert image.disk is not None
    backing = ["-b", str(store.file(image, image.disk)), "-F", "qcow2"]
    create = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(directory / "disk"), f"{GROWN_GIB}G"]
    subprocess.run(create, check=True)
    port = free_port()
    argv = ["setpriv", "--pdeathsig", "KILL"]  # no guest outlives killed tests
    argv += ["qemu-system-x86_64", "-accel", "tcg,tb-size=64", "-m", str(image.memory_mib), "-nodefaults"]
    argv += ["-no-user-config", "-display", "none", "-serial", f"file:{directory / 'console'}"]
    argv += [*firmware_argv(boot, image, store, directory), *device_argv(devices, directory, port)]
    return Machine(directory, port, subprocess.Popen(argv), time.monotonic())


def end(machine: Machine) -> None:
    machine.process.kill()
    machine.process.wait()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for images and disks; a gigabyte or two, so it does not outlive the tests."""
    path = tmp_path_factory.mktemp("debian")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def store(work: Path) -> ImageStore:
    return ImageStore(work / "images")


@pytest.fixture(scope="module")
def image(store: ImageStore, cache: Path) -> Image:
    began = time.monotonic()
    built = asyncio.run(build_debian(store, cache / "home" / "cache"))
    print(f"built in {time.monotonic() - began:.0f} s, {built.size / 1e6:.0f} MB")
    return built


@pytest.fixture(scope="module")
def machines(image: Image, store: ImageStore, work: Path) -> Iterator[dict[str, Machine]]:
    """The image booted in all three ways at once, each on a disk of its own, until SSH answers."""
    started = {boot: start(image, store, work / boot, boot) for boot in BOOTS}
    with ThreadPoolExecutor() as pool:
        waits = [pool.submit(machine.wait_for_login) for machine in started.values()]
    failed = [wait.exception() for wait in waits if wait.exception()]
    print({boot: f"SSH after {machine.login_s:.0f} s" for boot, machine in started.items()}, failed)
    yield started
    for machine in started.values():
        end(machine)


def test_the_image_is_described(image: Image) -> None:
    assert (image.name, image.user, image.firmware) == ("debian-12", "debian", ("bios", "uefi"))
    assert image.disk_size_mib == 4096
    assert image.size < 600e6


def test_the_disk_is_sound(image: Image, store: ImageStore) -> None:
    assert image.disk is not None
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", store.file(image, image.disk)], check=True)


def test_nothing_is_left_beside_the_image(image: Image, store: ImageStore) -> None:
    assert [entry.name for entry in (store.path / "store").iterdir()] == [image.id]


def test_every_guest_is_its_own(machines: dict[str, Machine]) -> None:
    """The image has neither a machine id nor host keys: each guest made others."""
    for file in ("/etc/machine-id", "/etc/ssh/ssh_host_ed25519_key.pub"):
        contents = {machine.output(f"cloud-init status --wait >&2; cat {file}") for machine in machines.values()}
        assert len(contents) == len(machines)
        assert "" not in contents


@pytest.mark.parametrize("boot", BOOTS)
def test_first_boot(machines: dict[str, Machine], boot: str) -> None:
    """Log in as cloud-init's user; look at all that a first boot has to do; switch off."""
    machine = machines[boot]
    machine.wait_for_login()
    assert machine.output("cloud-init status --wait").endswith("status: done")
    print(f"{boot}: {machine.output('systemd-analyze')}")
    assert machine.output("hostname") == f"by-{boot}"
    assert machine.output("test -d /sys/firmware/efi && echo uefi || echo bios") == boot.replace("direct", "bios")
    assert len(machine.output("cat /etc/machine-id")) == 32
    assert "ssh_host_ed25519_key" in machine.output("ls /etc/ssh")
    size = int(machine.output("df --output=size -B1 / | tail -1"))
    assert size > (GROWN_GIB - 0.5) * 2**30, "the file system has not grown"
    assert machine.output("sudo passwd -S root").split()[1] == "L"
    assert machine.output("systemctl --failed --no-legend") == ""
    assert "serial-getty@ttyS0" in machine.output("systemctl list-units --no-legend 'serial-getty@*'")
    assert machine.output("stat -c %U:%a /usr/bin/sudo /etc/shadow").split() == ["root:4755", "root:640"]
    machine.power_off()
    assert "Linux version" in machine.console
    assert "login:" in machine.console
    if boot != "direct":
        assert "GNU GRUB" in machine.console


@exhaustive
@pytest.mark.parametrize("boot", ["bios", "uefi"])
def test_update_grub_keeps_the_guest_bootable(image: Image, store: ImageStore, tmp_path: Path, boot: str) -> None:
    machine = start(image, store, tmp_path / boot, boot)
    try:
        machine.wait_for_login()
        machine.output("cloud-init status --wait")
        machine.output("sudo update-grub")
        config = machine.output("cat /boot/grub/grub.cfg")
        assert "generated by grub-mkconfig" in config or "automatically generated" in config
        assert image.cmdline.split()[0] in config
        machine.reboot()
        assert "BOOT_IMAGE=/boot/vmlinuz-" in machine.output("cat /proc/cmdline")
        machine.power_off()
    finally:
        end(machine)


@exhaustive
@pytest.mark.parametrize("boot", ["bios", "uefi"])
def test_emulated_devices(image: Image, store: ImageStore, tmp_path: Path, boot: str) -> None:
    machine = start(image, store, tmp_path / boot, boot, "emulated")
    try:
        machine.wait_for_login()
        assert machine.output("cloud-init status --wait").endswith("status: done")
        modules = machine.output("lsmod")
        assert "ahci" in modules
        assert "e1000" in modules
        machine.power_off()
    finally:
        end(machine)


@exhaustive
def test_trixie_boots(store: ImageStore, cache: Path, tmp_path: Path) -> None:
    image = asyncio.run(build_debian(store, cache / "home" / "cache", suite="trixie"))
    assert image.name == "debian-13"
    machine = start(image, store, tmp_path / "vm", "uefi")
    try:
        machine.wait_for_login()
        assert 'VERSION_ID="13"' in machine.output("cat /etc/os-release")
        machine.power_off()
    finally:
        end(machine)


@exhaustive
def test_a_cancelled_build_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    """Cancelled while packages are being set up, when the tree has files of many owners."""
    store = ImageStore(tmp_path / "images")

    async def cancel_in_the_middle() -> None:
        reached = asyncio.Event()

        def watch(step: object) -> None:
            if "installing" in str(step):
                reached.set()

        task = asyncio.create_task(build_debian(store, cache / "home" / "cache", progress=watch))
        await asyncio.wait_for(reached.wait(), 600)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_in_the_middle())
    assert list((tmp_path / "images" / "store").iterdir()) == []
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
