"""Bad input of every kind: one line that names what is wrong and what to do, a status that is not 0, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polyvisor.errors import InvalidInput, PolyvisorError
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.images.image import Image
from polyvisor.spec.vm import VMSpec
from tests.faults.command import ROOT, Done, Launcher, Polyvisor, assert_nothing_left, end_all, listing, qemus

pytestmark = pytest.mark.qemu

# Made at first use, and kept: Polyvisor's own keys, and the directories of the image store.
KEPT = {
    *("keys/id_ed25519", "keys/id_ed25519.pub", "keys/reserve", "keys/reserve/host_key", "keys/reserve/host_key.pub"),
    *("images/names", "images/store"),
}


def refused(polyvisor: Polyvisor | Launcher, *words: str, **options: Any) -> str:
    """The error line of a command that must fail and leave the home as it was."""
    before = listing(polyvisor.home)
    done = polyvisor(*words, **options)
    line = done.error_line()
    assert done.out in ("", "[]\n"), done  # with --json, of several VMs those that it worked for: none
    after = listing(polyvisor.home)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= KEPT, changed
    assert qemus(polyvisor.home) == []
    return line


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher(Path())
    yield launcher
    launcher.close()


@pytest.fixture
def quick(launcher: Launcher, home: Home) -> Launcher:
    """The command line without the start of Python, which takes longer than most of what is refused here."""
    launcher.home = home.path
    return launcher


# Flags


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--name", "../../etc"], "name: '../../etc'"),
        (["--name", ".."], "name: '..'"),
        (["--name", "a/b"], "name: 'a/b'"),
        (["--name", "x" * 300], "name: 'xxx"),
        (["--name", ""], "name: ''"),
        (["--name", "bücher"], "name: 'bücher'"),
        (["--name", "a\nb"], "name: 'a\\nb'"),
        (["--name", "-a"], "--name"),
        (["--name=-a"], "name: '-a'"),
        (["--name", "\x1b[31m"], "name: '\\x1b[31m'"),
        (["--vcpus", "-1"], "vcpus: -1"),
        (["--vcpus", "0"], "vcpus: 0"),
        (["--vcpus", "1000000000"], "vcpus: 1000000000"),
        (["--vcpus", "9" * 400], "vcpus: '999"),
        (["--vcpus", "two"], "vcpus: 'two'"),
        (["--memory", "-1"], "memory: '-1'"),
        (["--memory=-512M"], "memory: '-512M'"),
        (["--memory", "0"], "memory_mib: 0"),
        (["--memory", "1K"], "memory: '1K'"),
        (["--memory", "100000000000"], "memory_mib: 100000000000"),
        (["--memory", "1EiB"], "memory: '1EiB'"),
        (["--memory", "16T"], "memory_mib: 16777216"),
        (["--memory", ""], "memory: ''"),
        (["--disk", "0"], "size_gib: 0"),
        (["--disk", "-1"], "'-1'"),
        (["--disk", "1000000000"], "size_gib: 1000000000"),
        (["--disk", "1K"], "'1K'"),
        (["--disk", "1"] * 17, "disks: 17"),
        (["--nic", "none"] * 9, "nics: 9"),
        (["--nic", "bridge0"], "network: 'bridge0'"),
        (["--hypervisor", "vmware"], "hypervisor: 'vmware'"),
        (["--hypervisor", "xen"], "hypervisor: xen"),
        (["--mode", "pv"], "mode: 'pv'"),
        (["--mode", "hvm"], "mode: 'hvm'"),
        (["--firmware", "uefi"], "firmware: 'uefi'"),
        (["--cpu", "a,b=c"], "cpu: 'a,b=c'"),
        (["--cmdline", "a\x00b".replace("\x00", "\x01")], "cmdline: "),
        (["--label", "novalue"], "labels: 'novalue'"),
        (["--label", "bad key=x"], "labels: 'bad key'"),
        (["--ssh-key", "/nonexistent.pub"], "ssh_keys"),
        (["--ssh-key", "~nosuchuser/x"], "ssh_keys"),
        (["--ssh-key", "/etc/passwd"], "ssh_keys"),
        (["--user-data", "/nonexistent"], "/nonexistent"),
        (["--user-data", "/" + "x" * 300], "xxx"),
        (["--publish", "0"], "publish[0]: '0'"),
        (["--publish", "70000:22"], "publish[0]: '70000:22'"),
        (["--publish", "abc"], "publish[0]: 'abc'"),
        (["--publish", "1:2:3:4"], "publish[0]: '1:2:3:4'"),
        (["--publish", "8080:80/sctp"], "publish[0]: '8080:80/sctp'"),
        (["--publish", "::1:80:80"], "publish[0]"),
        (["--publish", "80:80", "--nic", "none"], "forwards"),
        (["--timeout", "soon"], "timeout"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--memory"], "--memory"),
        (["second-image"], "second-image"),
    ],
)
def test_flags_of_run(quick: Launcher, flags: list[str], named: str) -> None:
    name = [] if any(flag.startswith("--name") for flag in flags) else ["--name", "vm"]
    line = refused(quick, "run", "tiny", *name, *flags)
    assert named in line
    assert line.endswith(")"), f"no remedy: {line}"


@pytest.mark.parametrize("image", ["", "..", "a/b", "ÄÖ", "x" * 300, "no-such-image", "http://x/y"])
def test_image_names(quick: Launcher, image: str) -> None:
    line = refused(quick, "run", image)
    assert "image" in line and (image[:20] in line)


def test_remedies_guess_what_was_meant(polyvisor: Polyvisor) -> None:
    assert "did you mean" in refused(polyvisor, "run", "debain-12")
    assert "did you mean 'start'" in refused(polyvisor, "strat", "vm")


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",),
        ("ls", "--frobnicate"),
        ("image", "frobnicate"),
        ("image",),
        ("start",),
        ("start", "nosuch"),
        ("start", ".."),
        ("stop", "vm", "--timeout", "inf"),
        ("stop", "vm", "--timeout", "nan"),
        ("stop", "vm", "--timeout", "-5"),
        ("stop", "vm", "--timeout", "1e400"),
        ("kill", "nosuch"),
        ("rm", "nosuch"),
        ("rm", "../images"),
        ("pause", "vm"),
        ("resume", "vm"),
        ("save", "vm"),
        ("save", "nosuch"),
        ("reboot", "vm"),
        ("console", "vm"),
        ("console", "nosuch"),
        ("logs", "nosuch"),
        ("ssh", "vm", "true"),
        ("exec", "vm"),
        ("cp", "a", "b"),
        ("show", "nosuch"),
        ("ls", "nosuch"),
        ("forward", "add", "vm", "99999:1"),
        ("forward", "rm", "vm", "8080:80"),
        ("image", "rm", "nosuch"),
        ("image", "rm", "../../etc"),
        ("image", "show", "nosuch"),
        ("image", "import", "/nonexistent.img", "--name", "x"),
        ("image", "import", "/etc/passwd", "--name", "../x"),
        ("image", "import", "gopher://x/y", "--name", "x"),
        ("image", "import", "/etc", "--name", "x"),
        ("image", "build", "gentoo"),
        ("image", "build", "tiny", "--suite", "../x"),
        ("events", "nosuch"),
        ("apply", "-f", "/nonexistent.yaml"),
    ],
    ids=" ".join,
)
def test_verbs(quick: Launcher, words: tuple[str, ...]) -> None:
    if "vm" in words:
        quick.good("create", "tiny", "--name", "vm")
    error = json.loads(refused(quick, words[0], "--json", *words[1:]))["error"]
    assert error["message"] and error["code"]
    if words[0] in ("image", "stop"):  # the line for people is made from the same error; some are enough
        assert " ".join(error["message"].split()) in refused(quick, *words)


def test_bytes_that_are_no_text(polyvisor: Polyvisor) -> None:
    assert "name" in refused(polyvisor, "run", "tiny", "--name", os.fsdecode(b"\xff\xfe"))
    assert "\\udcff" in refused(polyvisor, "start", os.fsdecode(b"\xff"))


# Names, by the Python API, where NUL can be given


@pytest.mark.parametrize("name", ["a\0b", "\0", "..", "a/../b", "x" * 300, "", "ß", "a\n"])
async def test_names_by_api(host: Host, name: str) -> None:
    with pytest.raises(InvalidInput, match="name"):
        VMSpec(name=name, image="tiny")
    for verb in (host.start, host.stop, host.kill, host.pause, host.show, host.remove):
        with pytest.raises(InvalidInput, match="name"):
            await verb(name)
    with pytest.raises(InvalidInput, match="image"):
        await host.create(VMSpec(name="vm", image="a\0b".replace("a", name[:1] or "a")))
    assert_nothing_left(host.home)


# Spec files

GOOD = "name: vm\nimage: tiny\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD + "memory: 512\n", "memory: 512: is an unknown key (did you mean 'memory_mib'?"),
        (GOOD + "vcpus: '2'\n", "vcpus: '2': is not a whole number"),
        (GOOD + "vcpus: 2.5\n", "vcpus: 2.5"),
        (GOOD + "vcpus: true\n", "vcpus: True"),
        (GOOD + "vcpus: [1]\n", "vcpus: [1]"),
        (GOOD + "vcpus: .nan\n", "vcpus: nan"),
        (GOOD + "vcpus: 0x" + "f" * 5000 + "\n", "vcpus: "),
        (GOOD + "memory_mib: 1e400\n", "memory_mib: "),
        (GOOD + "disks: 10\n", "disks: 10: is not a list"),
        (GOOD + "disks: [10]\n", "disks[0]: 10"),
        (GOOD + "disks: [{size: 10}]\n", "disks[0].size"),
        (GOOD + "disks: [{size_gib: 0}]\n", "disks[0].size_gib: 0"),
        (GOOD + "nics: [{network: user, forwards: ['x:y']}]\n", "nics[0].forwards[0]: 'x:y'"),
        (GOOD + "labels: {1: x}\n", "1"),
        (GOOD + "labels: [a]\n", "labels"),
        (GOOD + 'user_data: "\\ud800"\n', "user_data"),
        (GOOD + 'ssh_keys: ["ssh-ed25519 AAAA \\ud800"]\n', "ssh_keys[0]"),
        (GOOD + "name: vm2\n", "'name' stands twice"),
        ("name: a\n", "image: None: is missing"),
        ("image: tiny\n", "name: None: is missing"),
        ('name: "a\\0b"\nimage: tiny\n', "name: 'a\\x00b'"),
        ("name: a/b\nimage: tiny\n", "name: 'a/b'"),
        ("name: 007\nimage: tiny\n", "name: 7: is not text"),
        (GOOD + "---\n" + GOOD, "name: 'vm': stands in two documents"),
        (GOOD + "? " + "x" * 100_000 + "\n: 1\n", "is an unknown key"),
        (GOOD + '"\\e[31m": 1\n', "is an unknown key"),
        ("", "holds no spec"),
        ("# nothing\n", "holds no spec"),
        ("just words\n", "is not a mapping"),
        ("- a\n- b\n", "is not a mapping"),
        ("name: [unclosed\n", "is not valid YAML: line"),
        ("\tname: x\n", "is not valid YAML"),
        (BOMB, "aliases"),
        (GOOD + "labels: " + "[" * 100_000, "nesting is deeper"),
        (GOOD + "labels: " + "{a: " * 5000 + "}" * 5000, "nesting is deeper"),
        ("{[1]: 2}\n", "not valid YAML"),
        ("? {a: b}\n: c\n", "not valid YAML"),
        (GOOD + "vcpus: !!int ''\n", "not valid YAML"),
        (GOOD + "vcpus: !!bool maybe\n", "not valid YAML"),
        (GOOD + "vcpus: !!timestamp x\n", "not valid YAML"),
        (GOOD + "vcpus: !!float x\n", "not valid YAML"),
        (GOOD + "vcpus: !!python/object/apply:os.system [id]\n", "not valid YAML"),
        (GOOD + "vcpus: 2001-99-99\n", ""),
        (GOOD + "hypervisor: {}\n", "hypervisor"),
        (GOOD + "on_reboot: true\n", "on_reboot: True"),
    ],
)
def test_spec_files(quick: Launcher, tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    assert named in refused(quick, "apply", "-f", str(path))


def test_odd_files(polyvisor: Polyvisor, tmp_path: Path) -> None:
    """Files that are no spec at all: huge, binary, a directory, a device, missing."""
    large = tmp_path / "large.yaml"
    large.write_bytes(GOOD.encode() + b"# \xc3\xa4" + b"\xc3\xa4" * (25 << 20))
    assert "larger than 1 MiB" in refused(polyvisor, "apply", "-f", str(large))
    assert "larger than 1 MiB" in refused(polyvisor, "apply", "-f", "-", stdin=large.read_bytes()[: 2 << 20])
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(256)) * 100)
    assert "UTF-8" in refused(polyvisor, "apply", "-f", str(binary))
    (tmp_path / "nul").write_bytes(b"\0" * 100)
    assert "YAML" in refused(polyvisor, "apply", "-f", str(tmp_path / "nul"))
    assert "irectory" in refused(polyvisor, "apply", "-f", str(tmp_path))
    assert "no file" in refused(polyvisor, "apply", "-f", str(tmp_path / "missing"))
    assert "larger than 1 MiB" in refused(polyvisor, "apply", "-f", "/dev/zero")
    refused(polyvisor, "apply", "-f", "/" + "x" * 300)
    refused(polyvisor, "apply", "-f", str(large / "below-a-file"))


def test_a_file_of_which_one_vm_is_bad(polyvisor: Polyvisor, tmp_path: Path) -> None:
    """Nothing is made before the whole file is understood."""
    path = tmp_path / "spec.yaml"
    path.write_text(f"{GOOD}---\nname: b\nimage: tiny\nvcpus: 0\n")
    assert "vcpus: 0" in refused(polyvisor, "apply", "-f", str(path))


def test_duplicate_name(polyvisor: Polyvisor) -> None:
    polyvisor.good("create", "tiny", "--name", "vm")
    line = refused(polyvisor, "run", "tiny", "--name", "vm", "--vcpus", "2")
    assert "there is a VM 'vm' already" in line and "rm vm" in line


# Images


@pytest.fixture
def own_images(polyvisor: Polyvisor) -> Path:
    """The home with an image store of its own, which a test may spoil; returns the directory of `tiny` there."""
    images = polyvisor.home / "images"
    source = images.readlink()
    images.unlink()
    shutil.copytree(source, images, symlinks=True)
    directory = (images / "names" / "tiny").resolve()
    directory.chmod(0o755)
    for file in directory.iterdir():
        file.chmod(0o644)
    return directory


@pytest.mark.parametrize(
    "content", [None, b"", b"junk", b"null", b"[]", b"{}", b"[" * 100_000, b'{"format": 99}', b"\xff"]
)
def test_spoiled_manifest(polyvisor: Polyvisor, own_images: Path, content: bytes | None) -> None:
    manifest = own_images / "image.json"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    env = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    if content is not None:
        assert "image.json can't be read" in refused(polyvisor, "run", "tiny", "--name", "vm", env=env)
    done = polyvisor("image", "ls")
    if not done.ok:
        done.error_line()


@pytest.mark.parametrize("file", ["vmlinuz", "initrd"])
@pytest.mark.parametrize("content", [None, b"", b"junk" * 1000])
def test_spoiled_files(polyvisor: Polyvisor, own_images: Path, file: str, content: bytes | None) -> None:
    """What can be noticed before the guest runs is said; a guest that can't boot is the guest's affair."""
    (own_images / file).unlink()
    if content is not None:
        (own_images / file).write_bytes(content)
    done = polyvisor("run", "tiny", "--name", "vm")
    if done.ok:
        assert content is not None
        polyvisor.good("rm", "--force", "vm")
    else:
        done.error_line()
    assert_nothing_left(polyvisor.home)


def imported(polyvisor: Polyvisor, path: Path) -> Done:
    return polyvisor("image", "import", str(path), "--name", "x")


@pytest.mark.parametrize("spoil", ["missing", "empty", "junk", "truncated", "backing"])
def test_spoiled_disk_in_the_store(bare: Polyvisor, tmp_path: Path, spoil: str) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(510) + b"\x55\xaa" + bytes((4 << 20) - 512))
    done = imported(bare, raw)
    assert done.ok, done
    disk = next((bare.home / "images" / "store").glob("*/disk.qcow2"))
    content = disk.read_bytes()
    disk.unlink()
    if spoil == "backing":
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", str(disk), "4M"],
            check=True,
        )
    elif spoil != "missing":
        disk.write_bytes({"empty": b"", "junk": b"junk" * 1000, "truncated": content[:100]}[spoil])
    done = bare("run", "x", "--name", "vm")
    if done.ok:  # QEMU is told not to follow what an image names
        assert spoil == "backing"
        assert "/etc/passwd" not in bare.good("show", "vm", "--json").out
        bare.good("rm", "--force", "vm")
    else:
        assert "disk.qcow2" in done.error_line() or "backing" in done.error_line()
    assert_nothing_left(bare.home)


def test_hostile_images(bare: Polyvisor, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 1000)
    backed = tmp_path / "backed.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*command, "-b", str(secret), "-F", "raw", str(backed), "4M"], check=True)
    data = tmp_path / "data.qcow2"
    subprocess.run([*command, "-o", f"data_file={tmp_path}/d,data_file_raw=on", str(data), "4M"], check=True)
    truncated = tmp_path / "truncated.qcow2"
    subprocess.run([*command, str(truncated), "4M"], check=True)
    truncated.write_bytes(truncated.read_bytes()[:70])
    vmdk = tmp_path / "flat.vmdk"
    vmdk.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 8 FLAT "{secret}" 0\n'
    )
    for path in (backed, data, truncated, vmdk, tmp_path, secret):
        line = refused(bare, "image", "import", str(path), "--name", "x")
        assert path.name in line or "…" in line, line  # a long path is cut short
    assert bare.good("image", "ls").out.count("\n") <= 1


# Ports


def test_port_is_taken(polyvisor: Polyvisor) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(polyvisor, "run", "tiny", "--name", "vm", "-p", f"{port}:80")
        assert f"port {port} of 127.0.0.1 can't be had" in line


def test_port_is_taken_by_another_vm(polyvisor: Polyvisor) -> None:
    polyvisor.good("run", "tiny", "--name", "first", "-p", ":80")
    polyvisor.good("pause", "first")
    forwards = polyvisor.good("show", "first", "--json").json()["status"]["forwards"]
    port = next(forward["host_port"] for forward in forwards if forward["guest_port"] == 80)
    done = polyvisor("run", "tiny", "--name", "second", "-p", f"{port}:80")
    assert f"port {port}" in done.error_line()
    polyvisor.good("create", "tiny", "--name", "third", "-p", f"{port}:80")
    assert f"port {port}" in polyvisor("start", "third").error_line()
    assert polyvisor.states() == {"first": "paused", "third": "stopped"}
    polyvisor.good("rm", "--force", "--all")
    assert_nothing_left(polyvisor.home)


# QEMU


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_qemu_is_missing(polyvisor: Polyvisor, tmp_path: Path) -> None:
    missing = {"POLYVISOR_QEMU": "/nonexistent"}
    assert "POLYVISOR_QEMU=/nonexistent" in refused(polyvisor, "run", "tiny", "--name", "vm", env=missing)
    (tmp_path / "bin").mkdir()
    line = refused(polyvisor, "run", "tiny", "--name", "vm", env={"PATH": str(tmp_path / "bin")})
    assert "QEMU is not installed" in line and "install qemu-system-x86" in line
    assert polyvisor.good("ls", "--json", env=missing).json() == []
    assert "QEMU" in polyvisor.good("host", env=missing).out
    assert polyvisor("doctor", env=missing).status == 1


def test_vms_can_be_ended_without_qemu(polyvisor: Polyvisor) -> None:
    """Whoever upgrades QEMU, or removes it, still rules the VMs that run."""
    polyvisor.good("run", "tiny", "--name", "vm")
    missing = {"POLYVISOR_QEMU": "/nonexistent"}
    assert polyvisor.good("ls", "--json", env=missing).json()[0]["state"] == "running"
    polyvisor.good("stop", "vm", "--timeout", "0", env=missing)
    assert "POLYVISOR_QEMU" in polyvisor("start", "vm", env=missing).error_line()
    polyvisor.good("rm", "vm", env=missing)
    assert_nothing_left(polyvisor.home)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("echo 'QEMU emulator version 6.2.0'", "6.2.0; Polyvisor needs 7.2"),
        ("echo hello", "is no QEMU"),
        ("exit 3", "does not run"),
        ("printf 'QEMU emulator version 99999999999999999999.1\\n'; exit 0", None),
    ],
)
def test_not_the_qemu_that_is_needed(polyvisor: Polyvisor, tmp_path: Path, text: str, named: str | None) -> None:
    qemu = script(tmp_path / "qemu", text)
    tmp_path.chmod(0o755)
    line = refused(polyvisor, "run", "tiny", "--name", "vm", env={"POLYVISOR_QEMU": qemu})
    assert named is None or named in line


def test_qemu_is_no_program(polyvisor: Polyvisor, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(bytes(1000))
    (tmp_path / "junk").chmod(0o755)
    for path in (tmp_path / "junk", tmp_path, Path("/etc/passwd")):
        assert str(path) in refused(polyvisor, "run", "tiny", "--name", "vm", env={"POLYVISOR_QEMU": str(path)})


# The home


def test_home_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "home"
    path.write_text("a file")
    for words in (("ls",), ("run", "tiny"), ("image", "ls"), ("rm", "vm")):
        assert str(path) in Polyvisor(path)(*words).error_line()
    Polyvisor(path)("show", "vm").error_line()
    assert path.read_text() == "a file"


def test_directories_of_the_home_are_files(bare: Polyvisor) -> None:
    for name in ("vms", "images", "keys", "locks", "cache"):
        (bare.home / name).rmdir()
        (bare.home / name).write_text("")
    for words in (("ls",), ("run", "tiny"), ("image", "ls"), ("rm", "vm")):
        assert str(bare.home) in bare(*words).error_line()
    (bare.home / "vms").unlink()


def test_stray_things_in_the_home(polyvisor: Polyvisor) -> None:
    """What is no VM does not disturb those that are."""
    polyvisor.good("create", "tiny", "--name", "vm")
    (polyvisor.home / "vms" / "notes.txt").write_text("mine")
    (polyvisor.home / "vms" / "Not A Name").mkdir()
    (polyvisor.home / "vms" / "loop").symlink_to("loop")
    (polyvisor.home / "vms" / "empty").mkdir()
    assert polyvisor.states()["vm"] == "stopped"
    polyvisor.good("start", "vm")
    polyvisor.good("kill", "vm")
    done = polyvisor("image", "rm", "tiny")
    assert "vm" in done.error_line()
    polyvisor.good("rm", "--force", "empty")
    polyvisor.good("rm", "vm")
    assert sorted(path.name for path in (polyvisor.home / "vms").iterdir()) == ["Not A Name", "loop", "notes.txt"]
    (polyvisor.home / "vms" / "Not A Name").rmdir()


def test_qemu_may_not_pass(empty_home: Home, tiny: Image, cache: Path) -> None:
    """As root each QEMU is a user of its own: where the way to the home is barred, the error says which way to open."""
    if os.geteuid() != 0:
        empty_home.path.chmod(0)
        line = Polyvisor(empty_home.path)("run", "tiny", "--name", "vm").error_line()
        empty_home.path.chmod(0o700)
        assert "ermission denied" in line
        return
    barred = empty_home.path / "barred"
    barred.mkdir(mode=0o700)
    polyvisor = Polyvisor(barred / "home")
    Home(polyvisor.home).prepare()
    (polyvisor.home / "images").rmdir()
    (polyvisor.home / "images").symlink_to(cache / "home" / "images")
    assert "chmod o+x" in refused(polyvisor, "run", "tiny", "--name", "vm")
    assert_nothing_left(polyvisor.home)


# Broken records

BROKEN = [b"", b"junk", b"null", b"1", b"[]", b"{}", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"format": 99}']


def broken_variants(text: str) -> Iterator[bytes]:
    """The file with each of its values replaced by something else, and cut off."""
    yield from BROKEN
    yield text[: len(text) // 2].encode()
    whole = json.loads(text)
    wrong: list[Any] = [None, -1, "x", [], [1], {}, 1e308]
    for key in whole:
        for value in wrong:
            yield json.dumps({**whole, key: value}).encode()
        yield json.dumps({k: v for k, v in whole.items() if k != key}).encode()
    yield json.dumps({**whole, "unknown": 1}).encode()


@pytest.mark.parametrize("file", ["vm.json", "launch.json"])
def test_broken_records(polyvisor: Polyvisor, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`ls` still works, every verb says what is broken, and `rm --force` removes the VM."""
    from polyvisor.cli.main import run

    polyvisor.good("create", "tiny", "--name", "good")
    polyvisor.good("run", "tiny", "--name", "vm")
    polyvisor.good("kill", "vm")
    path = polyvisor.home / "vms" / "vm" / file
    os.environ["POLYVISOR_HOME"] = str(polyvisor.home)
    try:
        for content in broken_variants(path.read_text()):
            path.write_bytes(content)
            for words in (["ls"], ["ls", "--json"], ["show", "vm"], ["show", "vm", "--json"]):
                status = run(words)
                said = capsys.readouterr()
                assert words[0] == "show" or status == 0, (content, said)
                assert words[0] == "show" or "good" in said.out
                if status:
                    [line] = said.err.splitlines()
                    assert line.startswith(("polyvisor: ", '{"error"')) and file in line, (content, line)
    finally:
        del os.environ["POLYVISOR_HOME"]
    path.write_bytes(b"junk")
    assert file in polyvisor("start", "vm").error_line()
    polyvisor.good("rm", "--force", "vm")
    polyvisor.good("rm", "--force", "good")
    assert_nothing_left(polyvisor.home)


def test_broken_record_of_a_vm_that_runs(polyvisor: Polyvisor) -> None:
    polyvisor.good("run", "tiny", "--name", "vm")
    (polyvisor.home / "vms/vm/vm.json").write_text("junk")
    (polyvisor.home / "vms/vm/launch.json").write_text("junk")
    (polyvisor.home / "vms/vm/run/qemu.pid").write_text("junk")
    assert set(polyvisor.states()) == {"vm"}
    polyvisor("stop", "vm", "--timeout", "0").error_line()
    polyvisor.good("rm", "--force", "vm")
    assert_nothing_left(polyvisor.home)


# A full disk


def test_disk_is_full(small: Polyvisor) -> None:
    """From no room at all to just enough: a VM is made, or one line says that the disk is full and nothing is left."""
    ballast = small.home.parent / "ballast"
    free = shutil.disk_usage(small.home).free
    outcomes = set()
    for room in (
        0,
        4 << 10,
        8 << 10,
        12 << 10,
        16 << 10,
        24 << 10,
        32 << 10,
        64 << 10,
        200 << 10,
        1 << 20,
        9 << 20,
        free,
    ):
        ballast.write_bytes(bytes(free - room))
        done = small("run", "tiny", "--name", "vm", "--disk", "1G")
        outcomes.add(done.ok)
        if not done.ok:
            assert "full" in done.error_line() or "No space left" in done.error_line(), done
            assert done.status == 8, done
            assert small.states() == {}
        small.good("rm", "--force", "vm")
        assert_nothing_left(small.home)
        ballast.unlink()
    assert outcomes == {True, False}


def test_full_disk_keeps_vms(small: Polyvisor) -> None:
    """A VM that is there already stays whole and can be stopped and removed when nothing can be written any more."""
    small.good("run", "tiny", "--name", "vm")
    with contextlib.suppress(OSError), (small.home.parent / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert small.states() == {"vm": "running"}
    small.good("pause", "vm")
    small.good("stop", "vm", "--timeout", "0")
    assert small.states() == {"vm": "stopped"}
    start = small("start", "vm")
    if not start.ok:
        assert "full" in start.error_line()
    small.good("rm", "--force", "vm")
    assert_nothing_left(small.home)


# Without root


@pytest.fixture
def unprivileged(cache: Path, tiny: Image) -> Iterator[Polyvisor]:
    """The command line as a user without rights, with a home and a copy of the code that this user can read."""
    if os.geteuid() != 0:
        pytest.skip("these tests run without root already: every other test is this one")
    where = cache / "unprivileged"
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(mode=0o755)
    python = _passable_python()
    for package in ("qemu", "yaml", "rich", "argcomplete", "pycdlib", "pygments", "markdown_it", "mdurl"):
        source = next(Path(p, package) for p in sys.path if Path(p, package).is_dir() and Path(p) != ROOT)
        shutil.copytree(source, where / "code" / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "polyvisor", where / "code" / "polyvisor", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [where / "code", *(where / "code").rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    user = 65534
    (where / "user").mkdir(mode=0o700)
    os.chown(where / "user", user, user)
    polyvisor = Polyvisor(
        where / "user" / "home",
        env={"HOME": str(where / "user"), "PYTHONPATH": str(where / "code"), "XDG_CACHE_HOME": str(where / "user")},
        prefix=("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"),
        python=python,
    )
    yield polyvisor
    end_all(polyvisor.home)
    shutil.rmtree(where)


def _passable_python() -> str:
    """A Python that other users can run: our own may lie in root's home."""
    for candidate in (os.path.realpath(sys.executable), *(f"/usr/bin/python3.{minor}" for minor in range(11, 16))):
        path = Path(candidate)
        if path.exists() and all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents):
            return candidate
    pytest.skip("NOT TESTED: the way without root, since no Python here can be run by other users")


def test_without_root(unprivileged: Polyvisor, cache: Path) -> None:
    """All that a user needs: run, list, stop, start, remove; the process is the user's own."""
    source = cache / "home" / "images"
    home = unprivileged.home
    subprocess.run([*unprivileged.prefix, "mkdir", "-m", "700", str(home)], check=True)
    shutil.copytree(source, home / "images", symlinks=True)
    for path in (home / "images", *(home / "images").rglob("*")):
        os.lchown(path, 65534, 65534)
    unprivileged.good("run", "tiny", "--name", "vm", "--disk", "1G")
    assert unprivileged.states() == {"vm": "running"}
    pid = unprivileged.pid("vm")
    assert Path(f"/proc/{pid}").stat().st_uid == 65534
    assert all(path.lstat().st_uid == 65534 for path in home.rglob("*"))
    assert stat.S_IMODE((home / "vms").stat().st_mode) == 0o700
    unprivileged.good("stop", "vm", "--timeout", "0")
    unprivileged.good("start", "vm")
    os.kill(unprivileged.pid("vm"), 19)
    assert unprivileged.states() == {"vm": "unresponsive"}
    unprivileged.good("rm", "--force", "vm")
    assert_nothing_left(home)
    barred = Polyvisor(Path("/root/polyvisor-home"), unprivileged.env, unprivileged.prefix, unprivileged.python)
    for words in (("ls",), ("run", "tiny")):
        assert "ermission denied" in barred(*words).error_line()


async def test_errors_of_the_api_are_ours(host: Host) -> None:
    """Whatever goes wrong below, a program that uses the API catches one type."""
    (host.home.vms / "vm").mkdir()
    (host.home.vms / "vm" / "vm.json").mkdir()
    for verb in (host.start, host.show, host.stop):
        with pytest.raises(PolyvisorError):
            await verb("vm")
    await host.remove("vm", force=True)
