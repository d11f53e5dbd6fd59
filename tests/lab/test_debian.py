"""The image `debian`, built for real and run as VMs by BIOS, by UEFI and directly, under emulation.

Building takes one to two minutes, a first boot about one; they share two cores. By BIOS, whose guest is the same as that by
UEFI from GRUB on, and directly it boots until its kernel speaks. With POLYVISOR_TEST_ALL=1 in the environment those are looked
at like that by UEFI, and there are more boots (twenty minutes): update-grub, emulated devices, Debian 13, a cancelled build.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyvisor.errors import NotFound, TimedOut
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.images.debian import build_debian
from polyvisor.images.image import Image
from polyvisor.images.inspection.findings import Boots, Driver, Target
from polyvisor.images.store import ImageStore
from polyvisor.spec.vm import DeviceModel, Disk, Firmware, Mode, VMSpec
from polyvisor.ssh import execute
from polyvisor.status import VMState
from tests.conftest import temporary_home
from tests.thorough import THOROUGH, exhaustive, usually

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.network,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
]
BOOT_S = 600.0
GROWN_GIB = 6
BOOTS = {
    "bios": {"mode": Mode.HVM, "firmware": Firmware.BIOS},
    "uefi": {"mode": Mode.HVM, "firmware": Firmware.UEFI},
    "direct": {"mode": Mode.PVH},
}
FIRST_BOOTS = [boot for boot in BOOTS if THOROUGH or boot == "uefi"]
# What is asked of a guest, in one go: each connection takes seconds.
FACTS = {
    "first boot": "cloud-init status --wait | tail -n 1",
    "hostname": "hostname",
    "firmware": "test -d /sys/firmware/efi && echo uefi || echo bios",
    "machine id": "cat /etc/machine-id",
    "host key": "sudo cat /etc/ssh/ssh_host_ed25519_key.pub",
    "size": "df --output=size -B1 / | tail -n 1",
    "root": "sudo passwd -S root",
    "failed": "systemctl --failed --no-legend",
    "logins": (
        "for i in $(seq 60); do systemctl is-active -q serial-getty@ttyS0 && break; sleep 1; done;"
        " systemctl list-units --no-legend 'serial-getty@*'"
    ),
    "owners": "stat -c %U:%a /usr/bin/sudo /etc/shadow",
}


def spec_of(boot: str, image: str = "debian-12", devices: DeviceModel = DeviceModel.PARAVIRTUAL) -> VMSpec:
    return VMSpec(
        name=f"by-{boot}",
        image=image,
        disks=(Disk(size_gib=GROWN_GIB),),
        devices=devices,
        **BOOTS[boot],  # type: ignore[arg-type]
    )


async def output(host: Host, boot: str, command: str) -> str:
    """What `command` prints in the guest; fails the test where it fails."""
    done = await execute(host, f"by-{boot}", ["sh", "-c", command], timeout_s=300)
    assert done.status == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


async def forget(host: Host, boot: str) -> None:
    """Remove the VM of an earlier test, if that was run."""
    with contextlib.suppress(NotFound):
        await host.remove(f"by-{boot}", force=True)


async def console(host: Host, boot: str) -> str:
    return b"".join([chunk async for chunk in host.log(f"by-{boot}")]).decode(errors="replace")


async def power_off(host: Host, boot: str) -> None:
    stopped = await host.stop(f"by-{boot}", timeout_s=120)
    assert stopped.state is VMState.STOPPED
    assert "Power down" in await console(host, boot), "it was killed, not shut down"


@pytest.fixture(scope="module")
def debian_home() -> Iterator[Home]:
    """A home for images and disks of a gigabyte or two, which does not outlive the tests."""
    with temporary_home() as home:
        yield home


@pytest.fixture(scope="module")
def host(debian_home: Home) -> Host:
    return Host(debian_home)


@pytest.fixture(scope="module")
def image(debian_home: Home, cache: Path) -> Image:
    """Built by somebody with a strict umask, of which nothing may reach the guest."""
    began = time.monotonic()
    before = os.umask(0o077)
    try:
        built = asyncio.run(build_debian(ImageStore(debian_home.images), cache / "home" / "cache"))
    finally:
        os.umask(before)
    print(f"built in {time.monotonic() - began:.0f} s, {built.size / 1e6:.0f} MB")
    return built


@pytest.fixture(scope="module")
def booted(image: Image, host: Host) -> dict[str, float]:
    """The image booted in several ways at once, until SSH answers: seconds that each took."""

    async def boot_one(boot: str) -> float:
        began = time.monotonic()
        await host.run(spec_of(boot))
        try:
            await host.wait_for_ssh(f"by-{boot}", timeout_s=BOOT_S)
        except TimedOut as error:
            error.add_note(f"load {os.getloadavg()}; its console:\n{(await console(host, boot))[-3000:]}")
            raise
        return time.monotonic() - began

    async def boot_all() -> dict[str, float]:
        return dict(zip(FIRST_BOOTS, await asyncio.gather(*map(boot_one, FIRST_BOOTS)), strict=True))

    took = asyncio.run(boot_all())
    print({boot: f"SSH after {seconds:.0f} s" for boot, seconds in took.items()})
    return took


def test_the_image_is_described(image: Image) -> None:
    assert (image.name, image.user, image.firmware) == ("debian-12", "debian", ("bios", "uefi"))
    assert image.disk_size_mib == 4096
    assert image.size < 600e6


async def test_it_boots_everywhere_by_its_own_account(image: Image, host: Host) -> None:
    """What `image inspect` reads; the tests below, and those of the lab, boot it."""
    found = await host.image_inspect(image.name)
    assert {verdict.target: verdict.boots for verdict in found.verdicts} == dict.fromkeys(Target, Boots.YES)
    (kernel,) = found.findings.kernels
    assert found.findings.direct is not None
    assert (kernel.version, kernel.drivers) == (found.findings.direct.version, found.findings.direct.drivers)
    assert kernel.drivers["virtio_blk"] is kernel.drivers["xen_blkfront"] is Driver.INITRAMFS


def test_the_disk_is_sound(image: Image, host: Host) -> None:
    assert image.disk is not None
    disk = host.images.store.file(image, image.disk)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", disk], check=True)


def test_nothing_is_left_beside_the_image(image: Image, host: Host) -> None:
    assert [entry.name for entry in (host.home.images / "store").iterdir()] == [image.id]


@pytest.mark.parametrize("boot", ["bios", "direct"])
async def test_its_kernel_boots(image: Image, host: Host, boot: str) -> None:
    await host.run(spec_of(boot))
    async with asyncio.timeout(BOOT_S):
        while "Linux version" not in (said := await console(host, boot)):
            await asyncio.sleep(1)
    assert ("GNU GRUB" in said) is (boot == "bios")
    await forget(host, boot)


@pytest.fixture(scope="module")
def facts(booted: dict[str, float], host: Host) -> dict[str, dict[str, str]]:
    """By boot: what FACTS asks for, once the first boot has done all that it has to do."""
    script = "; ".join(f"echo {shlex.quote(name)}=$({command})" for name, command in FACTS.items())

    async def ask(boot: str) -> dict[str, str]:
        said = await output(host, boot, script)
        return dict(line.split("=", 1) for line in said.splitlines())

    async def ask_all() -> dict[str, dict[str, str]]:
        return dict(zip(booted, await asyncio.gather(*map(ask, booted)), strict=True))

    return asyncio.run(ask_all())


@exhaustive
def test_every_guest_is_its_own(facts: dict[str, dict[str, str]]) -> None:
    """The image has neither a machine id nor host keys: each guest has others."""
    for name in ("machine id", "host key"):
        contents = {found[name] for found in facts.values()}
        assert len(contents) == len(facts) > 1
        assert "" not in contents


FORK_FACTS = {
    **{name: FACTS[name] for name in ("hostname", "machine id", "host key")},
    "other host keys": "ls /etc/ssh/ssh_host_*_key | tr '\\n' ' '",
    "random number": "cat /proc/sys/kernel/random/uuid",
    "kept": "cat /run/kept",
    "boot": "cat /proc/sys/kernel/random/boot_id",
    "failed": FACTS["failed"],
}


@pytest.mark.parametrize("boot", usually(["uefi", "direct"], ["uefi"]))
async def test_forks_are_their_own(facts: dict[str, dict[str, str]], host: Host, boot: str) -> None:
    """The same boot and memory; a name, machine id, host key and random numbers of each one's own."""
    await output(host, boot, "echo kept | sudo tee /run/kept")
    forked = await host.fork(f"by-{boot}", ["by-fork1", "by-fork2"])
    assert forked.same_identity is None
    script = "; ".join(f"echo {shlex.quote(name)}=$({command})" for name, command in FORK_FACTS.items())
    found: list[dict[str, str]] = []
    for each in (boot, "fork1", "fork2"):
        await host.wait_for_ssh(f"by-{each}", timeout_s=BOOT_S)
        found.append(dict(line.split("=", 1) for line in (await output(host, each, script)).splitlines()))
    for name in ("hostname", "machine id", "host key", "random number"):
        assert len({one[name] for one in found}) == 3, [one[name] for one in found]
    assert [one["hostname"] for one in found] == [f"by-{boot}", "by-fork1", "by-fork2"]
    assert {one["kept"] for one in found} == {"kept"}
    assert len({one["boot"] for one in found}) == 1
    assert [one["other host keys"] for one in found[1:]] == ["/etc/ssh/ssh_host_ed25519_key"] * 2
    assert {one["failed"] for one in found} == {""}
    for fork in ("fork1", "fork2"):
        await forget(host, fork)


@pytest.mark.parametrize("boot", FIRST_BOOTS)
async def test_first_boot(facts: dict[str, dict[str, str]], host: Host, boot: str) -> None:
    """Look at all that a first boot has to do; switch off."""
    found = facts[boot]
    assert found["first boot"].endswith("status: done")
    assert found["hostname"] == f"by-{boot}"
    assert found["firmware"] == boot.replace("direct", "bios")
    assert len(found["machine id"]) == 32
    assert int(found["size"]) > (GROWN_GIB - 0.5) * 2**30, "the file system has not grown"
    assert found["root"].split()[1] == "L"
    assert found["failed"] == ""
    assert "serial-getty@ttyS0" in found["logins"]
    assert found["owners"].split() == ["root:4755", "root:640"]
    await power_off(host, boot)
    said = await console(host, boot)
    assert "Linux version" in said
    assert "login:" in said
    assert ("GNU GRUB" in said) is (boot != "direct")


@exhaustive
@pytest.mark.parametrize("boot", ["bios", "uefi"])
async def test_update_grub_keeps_the_guest_bootable(
    booted: dict[str, float], host: Host, image: Image, boot: str
) -> None:
    await host.start(f"by-{boot}")
    await output(host, boot, "sudo update-grub")
    config = await output(host, boot, "sudo cat /boot/grub/grub.cfg")
    assert "automatically generated" in config
    assert image.cmdline.split()[0] in config
    await host.reboot(f"by-{boot}", timeout_s=120)
    await host.wait_for_ssh(f"by-{boot}", timeout_s=BOOT_S)
    assert "BOOT_IMAGE=/boot/vmlinuz-" in await output(host, boot, "cat /proc/cmdline")
    await power_off(host, boot)


@exhaustive
@pytest.mark.parametrize("boot", ["bios", "uefi"])
async def test_emulated_devices(image: Image, host: Host, boot: str) -> None:
    await forget(host, boot)
    await host.run(spec_of(boot, devices=DeviceModel.EMULATED))
    await host.wait_for_ssh(f"by-{boot}", timeout_s=BOOT_S)
    assert (await output(host, boot, "cloud-init status --wait")).endswith("status: done")
    modules = await output(host, boot, "lsmod")
    assert ("ahci" if boot == "uefi" else "ata_piix") in modules
    assert "e1000" in modules
    await power_off(host, boot)


@exhaustive
async def test_trixie_boots(host: Host, cache: Path) -> None:
    image = await build_debian(host.images.store, cache / "home" / "cache", suite="trixie")
    assert image.name == "debian-13"
    await forget(host, "uefi")
    await host.run(spec_of("uefi", image="debian-13"))
    await host.wait_for_ssh("by-uefi", timeout_s=BOOT_S)
    assert 'VERSION_ID="13"' in await output(host, "uefi", "cat /etc/os-release")
    await power_off(host, "uefi")


@exhaustive
async def test_a_cancelled_build_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    """Cancelled while packages are being set up, when the tree has files of many owners."""
    store = ImageStore(tmp_path / "images")
    reached = asyncio.Event()

    def watch(step: object) -> None:
        if "installing" in str(step):
            reached.set()

    task = asyncio.create_task(build_debian(store, cache / "home" / "cache", progress=watch))
    await asyncio.wait_for(reached.wait(), 600)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((tmp_path / "images" / "store").iterdir()) == []
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
