"""The builder of `tiny`, on handmade packages: what goes into the image, and where."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import subprocess
from importlib import resources
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import ImageRefused, NotFound
from polyvisor.images import kmod, libraries, tiny, tiny_root
from polyvisor.images.elf import modinfo, needed_libraries
from polyvisor.images.image import Seed
from polyvisor.images.mirror import Archive, Package
from polyvisor.images.store import ImageStore
from polyvisor.operation import Progress, silent
from tests.unit import elves
from tests.unit.debs import deb, link, tar
from tests.unit.newc import unpack

BUSYBOX = elves.program() + b"\0[\0[[\0ash\0getty\0init\0ip\0modprobe\0sh\0udhcpc\0\0rest"
VERSION = "6.1.0-9-cloud-amd64"
DRIVERS = f"lib/modules/{VERSION}/kernel/drivers"
LIB = "lib/x86_64-linux-gnu"


def module_files() -> dict[str, bytes]:
    """As in a kernel package, with dashes in file names, one module compressed, and more than is wanted."""
    return {
        f"{DRIVERS}/virtio/virtio.ko": elves.module("virtio"),
        f"{DRIVERS}/virtio/virtio_ring.ko": elves.module("virtio_ring"),
        f"{DRIVERS}/virtio/virtio_pci.ko": elves.module("virtio_pci", ["virtio_ring", "virtio"], ["pci:v00001AF4d*"]),
        f"{DRIVERS}/net/net-failover.ko": elves.module("net_failover", ["failover"]),
        f"{DRIVERS}/net/failover.ko.xz": lzma.compress(elves.module("failover")),
        f"{DRIVERS}/net/virtio_net.ko": elves.module("virtio_net", ["net-failover", "virtio"], ["virtio:d00000001v*"]),
        f"{DRIVERS}/net/xen-netfront.ko": elves.module("xen_netfront", [], ["xen:vif"]),
        f"{DRIVERS}/block/xen-blkfront.ko": elves.module("xen_blkfront", [], ["xen:vbd"]),
        f"{DRIVERS}/other/other.ko": b"not even a module",
    }


DEBS = {
    "linux-image-6.1.0-9-cloud-amd64": deb(
        tar(
            (f"./boot/vmlinuz-{VERSION}", b"the kernel"),
            (
                f"./lib/modules/{VERSION}/modules.builtin",
                b"kernel/drivers/block/virtio_blk.ko\nkernel/fs/ext4/ext4.ko\n",
            ),
            *((f"./{path}", data) for path, data in module_files().items()),
        )
    ),
    "busybox-static": deb(tar(("./bin/busybox", BUSYBOX, 0o755))),
    "dropbear-bin": deb(
        tar(
            ("./usr/sbin/dropbear", elves.program("libz.so.1", "libc.so.6"), 0o755),
            ("./usr/bin/dbclient", elves.program("libc.so.6"), 0o755),
            ("./usr/bin/dropbearkey", elves.program("libc.so.6"), 0o755),
        )
    ),
    "openssh-sftp-server": deb(tar(("./usr/lib/openssh/sftp-server", elves.program("libc.so.6"), 0o755))),
    "openssh-client": deb(tar(("./usr/bin/scp", elves.program("libc.so.6"), 0o755))),
    "zlib1g": deb(
        tar(link(f"./{LIB}/libz.so.1", "libz.so.1.2"), (f"./{LIB}/libz.so.1.2", elves.program("libdeep.so.3")))
    ),
    "libdeep3": deb(tar(("./usr/lib/x86_64-linux-gnu/libdeep.so.3", elves.program("libc.so.6")))),
    "libc6": deb(
        tar(
            (f"./{LIB}/libc.so.6", elves.program("ld-linux-x86-64.so.2")),
            (f"./{LIB}/ld-linux-x86-64.so.2", elves.program()),
            link("./lib64/ld-linux-x86-64.so.2", f"/{LIB}/ld-linux-x86-64.so.2"),
        )
    ),
}
DEPENDS = {
    "linux-image-cloud-amd64": ("linux-image-6.1.0-9-cloud-amd64",),
    "dropbear-bin": ("libc6", "virtual", "zlib1g"),
    "openssh-client": ("libc6",),
    "zlib1g": ("libc6", "libdeep3"),
}


class FakeArchive:
    """The archive's index and packages, without a network."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    class release:  # noqa: N801
        codename = "bookworm"

    def package(self, name: str) -> Package:
        if name not in DEBS and name not in DEPENDS:
            raise NotFound(name)
        return Package(name=name, version="1", path="", size=0, sha256="", depends=DEPENDS.get(name, ()))

    async def fetch(self, packages: list[Package], progress: Progress = silent) -> dict[str, bytes]:
        self.fetched += [package.name for package in packages]
        return {package.name: DEBS[package.name] for package in packages}


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> FakeArchive:
    fake = FakeArchive()

    async def opened(*_: object, **__: object) -> Archive:
        return cast("Archive", fake)

    monkeypatch.setattr(tiny, "open_archive", opened)
    return fake


# -- the whole ---------------------------------------------------------------------------------------------------------


async def test_building(archive: FakeArchive, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    image = await tiny.build_tiny(store, tmp_path)
    assert (image.name, image.seed, image.user, image.memory_mib) == ("tiny", Seed.INITRD, "root", 128)
    assert image.os == "Polyvisor tiny (Debian bookworm kernel)"
    assert "busybox-static 1" in image.source
    assert image.kernel
    assert store.file(image, image.kernel).read_bytes() == b"the kernel"
    assert image.initrd
    initrd = store.file(image, image.initrd).read_bytes()
    assert unpack(initrd)
    assert len(initrd) % 4 == 0
    again = await tiny.build_tiny(ImageStore(tmp_path / "again"), tmp_path)
    assert again.id == image.id
    assert len(archive.fetched) == 2 * len(set(archive.fetched))


async def test_what_lies_where(archive: FakeArchive, tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    image = await tiny.build_tiny(store, tmp_path)
    assert image.initrd
    members = unpack(store.file(image, image.initrd).read_bytes())
    modes = {path: mode for path, (mode, _, _) in members.items()}
    data = {path: content for path, (_, content, _) in members.items()}
    assert modes["init"] == 0o100755
    assert (modes["root/.ssh"], modes["tmp"], modes["etc/shadow"]) == (0o40700, 0o41777, 0o100600)
    assert members["dev/console"] == (0o20600, b"", (5, 1))
    assert (data["bin/sh"], data["sbin"], data["usr/sbin"]) == (b"busybox", b"bin", b"../bin")
    assert data["usr/lib/sftp-server"] == b"openssh/sftp-server"
    assert {"bin/dropbear", "bin/scp", "usr/lib/openssh/sftp-server"} <= {*data}
    assert data["etc/os-release"].startswith(b'NAME="Polyvisor tiny"\n')
    assert b"@" not in data["etc/os-release"]
    assert f"{LIB}/libz.so.1" in data
    assert f"{LIB}/libdeep.so.3" in data
    assert modes["lib64/ld-linux-x86-64.so.2"] == 0o100755
    assert f"lib/modules/{VERSION}/virtio_net.ko" in data
    assert f"lib/modules/{VERSION}/other.ko" not in data
    for path in members:  # the kernel makes no directories of itself
        parents = [str(parent) for parent in Path(path).parents][:-1]
        assert all(parent in members for parent in parents), path
        assert list(members).index(path) > max((list(members).index(parent) for parent in parents), default=-1)


async def test_names_are_checked_before_anything_is_fetched(archive: FakeArchive, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="is not an image name"):
        await tiny.build_tiny(ImageStore(tmp_path), tmp_path, name="../x")
    assert archive.fetched == []


@pytest.mark.parametrize("script", sorted({*tiny_root.SCRIPTS.values()}))
def test_the_guests_scripts_are_scripts(script: str) -> None:
    """Shipped in the package, for a POSIX shell (busybox's), and free of errors that a shell finds by reading."""
    path = resources.files("polyvisor.images") / "data" / "tiny" / script
    text = path.read_text()
    assert text.startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)


# -- the kernel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "problem"),
    [((), "0 kernels"), ((("boot/vmlinuz-1", b""), ("boot/vmlinuz-2", b"")), "2 kernels")],
)
def test_a_package_without_one_kernel(files: tuple[tuple[str, bytes], ...], problem: str) -> None:
    with pytest.raises(ImageRefused, match=problem):
        tiny.read_kernel(deb(tar(*files)), "linux-image")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("lib/modules/1/a/xen-netfront.ko", "xen_netfront"),
        ("8139cp.ko.xz", "8139cp"),
        ("x.ko.gz", "x"),
        ("x.ko.zst", None),
        ("x.c", None),
        (".ko", ""),
    ],
)
def test_names_of_modules(path: str, name: str | None) -> None:
    assert kmod.module_name(path) == name


def test_modules_come_after_what_they_depend_on() -> None:
    chosen = kmod.choose(module_files(), ["virtio_net", "virtio-pci", "ext4"], frozenset({"ext4"}))
    names = [module.name for module in chosen]
    assert names == ["failover", "net_failover", "virtio", "virtio_net", "virtio_ring", "virtio_pci"]
    assert all(module.data.startswith(b"\x7fELF") for module in chosen)


def test_the_indexes_that_modprobe_reads() -> None:
    chosen = kmod.choose(module_files(), ["virtio_net", "virtio_pci"], frozenset())
    assert kmod.dep_index(chosen).splitlines() == [
        "failover.ko:",
        "net_failover.ko: failover.ko",
        "virtio.ko:",
        "virtio_net.ko: virtio.ko net_failover.ko failover.ko",
        "virtio_ring.ko:",
        "virtio_pci.ko: virtio_ring.ko virtio.ko",
    ]
    assert kmod.alias_index(chosen) == "alias virtio:d00000001v* virtio_net\nalias pci:v00001AF4d* virtio_pci\n"


def test_a_module_that_the_kernel_lacks() -> None:
    with pytest.raises(ImageRefused, match="no module 'absent', which the image needs"):
        kmod.choose(module_files(), ["absent"], frozenset())
    broken = {"a.ko": elves.module("a", ["b"])}
    with pytest.raises(ImageRefused, match="no module 'b', which a needs"):
        kmod.choose(broken, ["a"], frozenset())


def test_modules_that_need_each_other_end_all_the_same() -> None:
    circle = {"a.ko": elves.module("a", ["b"]), "b.ko": elves.module("b", ["a"])}
    with pytest.raises(ImageRefused, match="in a circle"):
        kmod.choose(circle, ["a"], frozenset())


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\xfd7zXZ\0rest", b"\x1f\x8b", elves.program()])
def test_what_is_no_module(content: bytes) -> None:
    with pytest.raises(ImageRefused, match="kernel module 'x' can't be read"):
        kmod.load("x", content)


def test_compressed_modules() -> None:
    plain = elves.module("m", ["d"], ["pci:*"])
    for content in (plain, gzip.compress(plain), lzma.compress(plain)):
        assert kmod.load("m", content) == kmod.Module("m", plain, ("d",), ("pci:*",))


# -- programs ----------------------------------------------------------------------------------------------------------


def test_applets_of_busybox() -> None:
    assert tiny_root.applets(BUSYBOX) == ["[", "[[", "ash", "getty", "init", "ip", "modprobe", "sh", "udhcpc"]
    for program in (b"", BUSYBOX.replace(b"udhcpc", b"nothin"), BUSYBOX[: BUSYBOX.index(b"udhcpc")]):
        with pytest.raises(ImageRefused, match="busybox lacks"):
            tiny_root.applets(program)


async def test_only_the_packages_with_needed_libraries_are_fetched(archive: FakeArchive) -> None:
    debs = {name: DEBS[name] for name in ("dropbear-bin", "openssh-client")}
    found = await libraries.complete(cast("Archive", archive), debs, ["usr/bin/scp", "usr/bin/dbclient"])
    assert archive.fetched == ["libc6"]
    assert [package.name for package in found.packages] == ["libc6"]
    assert set(found.files) == {"usr/bin/scp", "usr/bin/dbclient", f"{LIB}/libc.so.6", "lib64/ld-linux-x86-64.so.2"}


async def test_programs_of_a_merged_usr(archive: FakeArchive) -> None:
    merged = deb(tar(("./usr/bin/busybox", BUSYBOX, 0o755)))
    found = await libraries.complete(cast("Archive", archive), {"busybox-static": merged}, ["bin/busybox"])
    assert found.files == {"bin/busybox": BUSYBOX}


async def test_a_program_or_library_that_is_nowhere(archive: FakeArchive) -> None:
    with pytest.raises(ImageRefused, match="has usr/bin/absent"):
        await libraries.complete(cast("Archive", archive), {"dropbear-bin": DEBS["dropbear-bin"]}, ["usr/bin/absent"])
    needy = deb(tar(("./usr/bin/x", elves.program("libabsent.so.1"))))
    with pytest.raises(ImageRefused, match=r"depends on has the library libabsent\.so\.1"):
        await libraries.complete(cast("Archive", archive), {"dropbear-bin": needy}, ["usr/bin/x"])
    script = deb(tar(("./usr/bin/x", b"#!/bin/sh")))
    with pytest.raises(ImageRefused, match="of dropbear-bin can't be read"):
        await libraries.complete(cast("Archive", archive), {"dropbear-bin": script}, ["usr/bin/x"])


def test_what_elf_files_say() -> None:
    assert needed_libraries(elves.program("liba.so.1", "libb.so.2")) == ["liba.so.1", "libb.so.2"]
    assert needed_libraries(elves.program()) == []
    assert modinfo(elves.module("m", ["a", "b"])) == [("name", "m"), ("depends", "a,b")]


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_damaged_elf_files_raise_nothing_but_value_errors(noise: bytes, at: int, byte: int) -> None:
    whole = elves.program("liba.so.1")
    damaged = whole[:at] + bytes([byte]) + whole[at + 1 :]
    for data in (noise, b"\x7fELF\x02\x01" + noise, damaged, whole[:at]):
        for read in (needed_libraries, modinfo):
            with contextlib.suppress(ValueError):
                read(data)
