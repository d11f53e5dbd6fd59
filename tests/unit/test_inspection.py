"""`image inspect` on whole disks, which mke2fs and sfdisk made: in all formats, in the store, on the command line."""

from __future__ import annotations

import asyncio
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyvisor.cli.main import run
from polyvisor.errors import ImageRefused, NotFound
from polyvisor.host.host import Host
from polyvisor.images.image import Image, ImageFile
from polyvisor.images.inspection.budget import Budget
from polyvisor.images.inspection.examine import Direct, examine
from polyvisor.images.inspection.findings import Boots, Driver, Findings, Inspection, Target
from polyvisor.images.inspection.inspector import inspect_file
from polyvisor.images.portable import exported
from polyvisor.images.store import ImageStore
from polyvisor.images.worker import Stopped
from tests.unit.bootable import (
    CMDLINE,
    LOADERS,
    MIB,
    VERSION,
    area,
    bzimage,
    disk,
    ext,
    initramfs,
    kernel,
    sfdisk,
    system,
)
from tests.unit.disks import converted, patched, qemu_img

EVERYWHERE = {"qemu-hvm-bios", "qemu-hvm-uefi", "xen-pv", "xen-pvh", "xen-hvm"}


@pytest.fixture(scope="module")
def booting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk with all that it takes to boot everywhere."""
    return disk(tmp_path_factory.mktemp("disk") / "disk.raw", system())


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def inspected(store: ImageStore, path: Path, **options: str) -> Inspection:
    return asyncio.run(inspect_file(store, str(path), **options))  # type: ignore[arg-type]


def booted(found: Inspection) -> set[str]:
    return {verdict.target.value for verdict in found.verdicts if verdict.boots is Boots.YES}


def reason(found: Inspection, target: str) -> str:
    return next(verdict.reason for verdict in found.verdicts if verdict.target == target)


def of(path: Path) -> Findings:
    """The findings on a raw disk."""
    data = path.read_bytes()
    return examine("test", area(data).at, len(data), None)


def test_a_disk_that_boots_everywhere(store: ImageStore, booting: Path) -> None:
    found = inspected(store, booting)
    assert booted(found) == EVERYWHERE
    findings = found.findings
    assert findings.firmware is not None and findings.system is not None
    assert (findings.firmware.boot_code, findings.firmware.removable, findings.firmware.loaders) == ("GRUB", True, ())
    assert [(part.number, part.filesystem) for part in findings.partitions] == [(1, None), (2, "vfat"), (3, "ext4")]
    (only,) = findings.kernels
    assert (only.path, only.version, only.packing) == (f"/boot/vmlinuz-{VERSION}", VERSION, "xz")
    assert (only.initrd, only.initrd_packing) == (f"/boot/initrd.img-{VERSION}", "gzip")
    assert set(only.drivers.values()) == {Driver.INITRAMFS}
    assert (findings.system.name, findings.system.cmdline, findings.system.cloud_init) == ("Test OS 1", CMDLINE, True)
    assert list((store.path / "store").iterdir()) == []


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("qcow2", ()),
        ("qcow2", ("cluster_size=512",)),
        ("qcow2", ("compression_type=zstd",)),
        ("qcow2", ("extended_l2=on", "cluster_size=128k")),
        ("vmdk", ()),
        ("vdi", ()),
        ("vpc", ("force_size=on",)),
        ("vhdx", ()),
    ],
)
def test_every_format_is_read_alike(
    store: ImageStore, booting: Path, tmp_path: Path, driver: str, options: tuple[str, ...]
) -> None:
    found = inspected(store, converted(booting, tmp_path / "disk", driver, *options))
    assert booted(found) == EVERYWHERE
    assert list((store.path / "store").iterdir()) == [], "what was converted is gone"


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_clusters_are_read(store: ImageStore, booting: Path, tmp_path: Path, kind: str) -> None:
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", "-f", "raw", booting, tmp_path / "disk")
    assert booted(inspected(store, tmp_path / "disk")) == EVERYWHERE


def test_a_disk_that_others_may_change_or_that_is_packed(store: ImageStore, booting: Path, tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "disk.raw.gz"
    path.write_bytes(gzip.compress(booting.read_bytes(), 1))
    path.chmod(0o666)
    assert booted(inspected(store, path)) == EVERYWHERE


def test_an_initramfs_that_python_can_not_unpack(tmp_path: Path) -> None:
    """The kernel's configuration and that of initramfs-tools say what they can."""
    import sys

    if sys.version_info >= (3, 14):
        pytest.skip("this Python unpacks zstd")
    files = system("zstd")
    files[f"boot/initrd.img-{VERSION}"] = b"\x28\xb5\x2f\xfd" + bytes(100)
    (found,) = of(disk(tmp_path / "a", files)).kernels
    assert (found.xen_pv, found.drivers["virtio_blk"]) == (None, Driver.UNKNOWN)
    assert "zstd" in str(found.initrd_problem)
    files[f"boot/config-{VERSION}"] = "CONFIG_XEN_PV=y\nCONFIG_VIRTIO_BLK=m\nCONFIG_VIRTIO_PCI=y\nCONFIG_BLK_DEV_SD=m\n"
    files["etc/initramfs-tools/initramfs.conf"] = "MODULES=dep\n"
    (found,) = of(disk(tmp_path / "b", files)).kernels
    assert (found.xen_pv, found.xen_pvh, found.known_by) == (True, False, "its configuration")
    assert (found.drivers["virtio_blk"], found.drivers["virtio_pci"]) == (Driver.UNKNOWN, Driver.BUILT_IN)
    files["etc/initramfs-tools/conf.d/more"] = "MODULES=most\n"
    (found,) = of(disk(tmp_path / "c", files)).kernels
    assert (found.drivers["virtio_blk"], found.drivers["e1000"]) == (Driver.INITRAMFS, Driver.MISSING)
    assert "MODULES=most" in found.initrd_known_by


def test_modules_that_the_kernel_has_built_in_or_elsewhere(tmp_path: Path) -> None:
    files = system(modules=("sd_mod",))
    files[f"usr/lib/modules/{VERSION}/modules.builtin"] = "kernel/drivers/block/virtio_blk.ko\n"
    files[f"usr/lib/modules/{VERSION}/modules.dep"] = "kernel/net/e1000.ko.xz: kernel/x.ko\n"
    (found,) = of(disk(tmp_path / "disk", files)).kernels
    wanted = {"virtio_blk": Driver.BUILT_IN, "e1000": Driver.LATER, "ahci": Driver.MISSING, "sd_mod": Driver.INITRAMFS}
    assert {name: found.drivers[name] for name in wanted} == wanted


def test_a_boot_partition_and_a_root_that_can_not_be_read(tmp_path: Path) -> None:
    """As Fedora has it: /boot in ext4 with entries of the boot loader specification, the root in btrfs."""
    boot: dict[str, bytes | str | Path] = {
        f"vmlinuz-{VERSION}": kernel("gzip"),
        f"initramfs-{VERSION}.img": initramfs(),
        "vmlinuz-0-rescue-abc": kernel("gzip"),
        "loader/entries/abc-0-rescue.conf": "linux /vmlinuz-0-rescue-abc\n",
        "loader/entries/abc-6.1.conf": f"linux /vmlinuz-{VERSION}\ninitrd /initramfs-{VERSION}.img\noptions root=UUID=9 ro\n",
        "grub2/grub.cfg": "blscfg\n",
    }
    path = sfdisk(
        tmp_path / "disk", "label: gpt\n1: start=2048, size=32768, type=L\n2: start=36864, size=40960, type=L\n"
    )
    data = patched(path.read_bytes(), 2048 * 512, ext(tmp_path / "boot", boot).read_bytes())
    path.write_bytes(patched(data, 36864 * 512 + 0x10040, b"_BHRfS_M"))
    found = of(path)
    assert found.system is not None
    assert "partition 2: btrfs can't be read here" in str(found.system.problem)
    assert (found.system.root, found.system.grub_config) == ("UUID=9", "/grub2/grub.cfg")
    assert [each.path for each in found.kernels] == [f"/vmlinuz-{VERSION}"]
    assert found.kernels[0].initrd == f"/initramfs-{VERSION}.img"


def test_only_other_loaders_no_boot_code_and_devices_by_name(store: ImageStore, tmp_path: Path) -> None:
    files = system(cmdline="root=/dev/sda3")
    made = disk(tmp_path / "disk", files, {"EFI/debian/shimx64.efi": b"MZ"}, bios=False)
    found = inspected(store, made)
    assert booted(found) == set()
    assert "no boot code" in reason(found, "qemu-hvm-bios")
    assert "only \\EFI\\DEBIAN\\SHIMX64.EFI" in reason(found, "qemu-hvm-uefi")
    assert "root=/dev/sda3; the disk would be called /dev/xvda" in reason(found, "xen-pvh")


def test_a_file_system_without_a_partition_table(store: ImageStore, tmp_path: Path) -> None:
    path = ext(tmp_path / "root.raw", system())
    with pytest.raises(ImageRefused, match="format is not known"):
        inspected(store, path)
    found = inspected(store, path, format="raw")
    assert booted(found) == {"xen-pv", "xen-pvh"}
    assert [part.number for part in found.findings.partitions] == [0]


def test_links_that_lead_out_of_the_image_stay_in_it(tmp_path: Path) -> None:
    """/etc/fstab and GRUB's menu as links to files of this machine, which are not in the image."""
    secret = tmp_path / "secret"
    secret.write_text("linux /vmlinuz secret=1\n")
    files = system()
    files["boot/grub/grub.cfg"] = secret
    files["etc/fstab"] = Path("../" * 40 + str(secret))
    found = of(disk(tmp_path / "disk", files))
    assert found.system is not None
    assert (found.system.cmdline, found.system.grub_config, found.system.root) == (None, None, None)


def test_work_is_bounded_and_told_as_a_refusal(booting: Path) -> None:
    data = booting.read_bytes()
    for budget in (Budget(seconds=0), Budget(read=30_000), Budget(unpacked=1000)):
        with pytest.raises(ImageRefused, match="test: "):
            examine("test", area(data).at, len(data), None, budget)


def test_a_disk_that_is_cut_off_or_overwritten_is_never_a_traceback(booting: Path) -> None:
    data = booting.read_bytes()
    for length in (0, 1, 512, 600, 40_000, 3 * MIB, 43 * MIB):
        examine("test", area(data[:length]).at, length, None)
    noise = os.urandom(4096)
    for where in range(86016 * 512, 86016 * 512 + 2 * MIB, 99 * 1024):
        damaged = patched(data, where, noise)
        examine("test", area(damaged).at, len(damaged), None)


def test_work_ends_when_nobody_waits_for_it(booting: Path) -> None:
    calls = 0

    def alive() -> None:
        nonlocal calls
        calls += 1
        raise Stopped

    data = booting.read_bytes()
    with pytest.raises(Stopped):
        examine("test", area(data).at, len(data), None, Budget(alive=alive))
    assert calls == 1


def test_errors_that_nobody_thought_of_are_refusals() -> None:
    def read(offset: int, length: int) -> bytes:
        raise IndexError("odd")

    with pytest.raises(ImageRefused, match="can't be read: IndexError"):
        examine("test", read, 1000, None)


def test_a_kernel_and_an_initramfs_alone() -> None:
    direct = Direct(
        name="vmlinuz", kernel=kernel("lz4"), cmdline="console=hvc0", initrd_name="initrd", initrd=initramfs()
    )
    found = examine("test", None, 0, direct)
    assert found.direct is not None
    assert (found.direct.xen_pv, found.direct_consoles, found.disk) == (True, ("hvc0",), False)
    none = examine("test", None, 0, Direct(name="vmlinuz", kernel=bzimage(b"", bits_64=False), cmdline=""))
    assert none.direct is not None
    assert (none.direct.architecture, none.direct.initrd) == ("i386", None)


# In the store, and on the command line


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYVISOR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("POLYVISOR_HOST", raising=False)
    return tmp_path / "home"


@pytest.fixture
def host(home: Path, booting: Path) -> Iterator[Host]:
    """A host whose store has the image `both`: a disk, and the kernel on it beside it."""
    host = Host(home)
    host.home.prepare()
    with host.images.store.staging() as staging:
        converted(booting, staging / "disk.qcow2", "qcow2")
        (staging / "vmlinuz").write_bytes(kernel("lz4"))
        (staging / "initrd").write_bytes(initramfs())
        image = Image(
            id="",
            name="both",
            created_at=0.0,
            source="test",
            disk=ImageFile(name="disk.qcow2", sha256="", size=0),
            disk_size_mib=64,
            kernel=ImageFile(name="vmlinuz", sha256="", size=0),
            initrd=ImageFile(name="initrd", sha256="", size=0),
            cmdline=CMDLINE,
            firmware=("bios",),
        )
        host.images.store.add(staging, image)
    yield host


async def test_an_image_of_the_store_boots_everywhere(host: Host) -> None:
    found = await host.image_inspect("both")
    assert booted(found) == {target.value for target in Target}
    with pytest.raises(NotFound):
        await host.image_inspect("nothing")


def test_an_exported_image_is_read_as_it_is(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "both.polyvisor.tar"
    path.write_bytes(b"".join(exported(host.images.store, host.images.store.get("both"))))
    assert booted(inspected(ImageStore(tmp_path / "other"), path)) == {target.value for target in Target}
    assert list((tmp_path / "other" / "store").iterdir()) == []


def test_the_command_line_shows_a_table_and_findings(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["image", "inspect", "both"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert rows[0] == ["TARGET", "BOOTS", "WHY"]
    assert [row[:3] for row in rows[1:3]] == [["QEMU", "pvh", "yes"], ["QEMU", "hvm,", "BIOS"]]
    assert "FINDINGS" in shown
    assert f"/boot/vmlinuz-{VERSION}" in shown


def test_the_command_line_takes_paths_and_says_no_with_success(
    home: Path, booting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["image", "inspect", str(booting), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdicts"][0]["boots"] == "no"
    assert found["findings"]["kernels"][0]["drivers"]["virtio_blk"] == "in the initramfs"
    monkeypatch.chdir(booting.parent)
    assert run(["image", "inspect", booting.name]) == 0
    assert run(["image", "inspect", "nothing"]) == 3
    assert "there is no image 'nothing'" in capsys.readouterr().err
    assert run(["image", "inspect", "./nothing"]) == 3
    (tmp_path / "text").write_text("hello\n")
    assert run(["image", "inspect", str(tmp_path / "text")]) == 2
    assert "text file" in capsys.readouterr().err


def test_a_path_is_read_here_also_where_another_host_is_meant(
    home: Path, booting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--host", "user@nowhere.invalid", "image", "inspect", str(booting)]) == 0
    told = capsys.readouterr()
    assert "TARGET" in told.out
    assert "is a file of this machine, and is read here" in told.err


def test_what_an_image_says_does_not_steer_a_terminal(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = system(cmdline="root=\x1b[31mred console=\x9b2J")
    files["etc/os-release"] = 'PRETTY_NAME="\x1b]0;title\x07"\n'
    path = disk(tmp_path / "disk", files, LOADERS)
    for words in ([], ["--json"]):
        assert run(["image", "inspect", str(path), *words]) == 0
        shown = capsys.readouterr().out
        assert not set(shown) & {"\x1b", "\x07", "\x9b"}


def test_a_hostile_qcow2_is_refused(
    home: Path, booting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = converted(booting, tmp_path / "disk", "qcow2")
    data = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", data, 40)
    path.write_bytes(patched(data, l1, struct.pack(">Q", 1 << 50)))
    assert run(["image", "inspect", str(path)]) == 2
    path.write_bytes(patched(data, 8, struct.pack(">QI", 200, 11)))
    assert run(["image", "inspect", str(path)]) == 2
    assert "backing file" in capsys.readouterr().err
