"""Flags of `run` and `create`: every setting has one, and they add up to the spec that is meant."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from polyvisor.cli.parser import Parser, UsageError
from polyvisor.cli.spec_flags import add_spec_flags, size_gib, size_mib, spec_from_flags
from polyvisor.errors import InvalidInput, PolyvisorError
from polyvisor.spec.vm import DeviceModel, Disk, Firmware, Hypervisor, Mode, Nic, OnReboot, VMSpec

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPhgn9Y"


def parser() -> argparse.ArgumentParser:
    made = Parser()
    made.add_argument("image")
    add_spec_flags(made)
    return made


def spec(*words: str) -> VMSpec:
    return spec_from_flags(parser().parse_args(["tiny", *words]), "a")


def test_no_flag_asks_for_nothing() -> None:
    assert spec() == VMSpec(name="a", image="tiny")


def test_every_setting_has_a_flag_and_a_line_about_it() -> None:
    flags = {action.dest: action for action in parser()._actions}
    for field in dataclasses.fields(VMSpec):
        assert flags[field.name].help or field.name == "image"
        assert field.metadata["about"]
    for kind in (Disk, Nic):
        assert all(field.metadata["about"] for field in dataclasses.fields(kind))


def test_all_flags_together(tmp_path: Path) -> None:
    (tmp_path / "ud").write_text("#cloud-config\n")
    (tmp_path / "id.pub").write_text(f"{KEY} me\n")
    words = (
        "-c 2 -m 1.5G --hypervisor tcg --mode hvm --firmware uefi --devices emulated --cpu max --cmdline quiet "
        f"--disk 10G --disk 5 --nic user --nic none --ssh-key {tmp_path}/id.pub --user-data {tmp_path}/ud "
        "--on-reboot stop --label tier=web --label x= -p 8080:80 --publish 53:53/udp"
    )
    assert spec(*words.split(), "--ssh-key", KEY) == VMSpec(
        name="a",
        image="tiny",
        vcpus=2,
        memory_mib=1536,
        hypervisor=Hypervisor.TCG,
        mode=Mode.HVM,
        firmware=Firmware.UEFI,
        devices=DeviceModel.EMULATED,
        cpu="max",
        cmdline="quiet",
        disks=(Disk(size_gib=10), Disk(size_gib=5)),
        nics=(Nic(forwards=("8080:80", "53:53/udp")), Nic(network="none")),
        ssh_keys=(f"{KEY} me", KEY),
        user_data="#cloud-config\n",
        on_reboot=OnReboot.STOP,
        labels={"tier": "web", "x": ""},
    )


@pytest.mark.parametrize("flag", ["-c", "--vcpus", "--cpus"])
def test_names_of_one_flag(flag: str) -> None:
    assert spec(flag, "3").vcpus == 3


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        ("512", 512),
        ("512M", 512),
        ("512m", 512),
        ("512MiB", 512),
        ("512MB", 512),
        ("2G", 2048),
        ("1.5G", 1536),
        ("0.5GiB", 512),
        (" 1 G ", 1024),
        ("1T", 1 << 20),
        ("0", 0),
    ],
)
def test_amounts_of_memory(text: str, mib: int) -> None:
    assert size_mib(text, "memory") == mib


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1.5", "0.3M", "512K", "512B", "512iB", "1e3", "0x10", "1,5G", "1GG", "nan", "9" * 13]
)
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        size_mib(text, "memory")
    assert caught.value.field == "memory"
    assert caught.value.hint == "write 512M or 2G"


@pytest.mark.parametrize(("text", "gib"), [("10", 10), ("10G", 10), ("10gib", 10), ("2T", 2048), ("0", 0)])
def test_sizes_of_disks(text: str, gib: int) -> None:
    assert size_gib(text, "size") == gib


@pytest.mark.parametrize("text", ["", "10M", "1.5G", "10K", "ten", "-1", "1.5T", "10B"])
def test_what_is_no_size_of_a_disk(text: str) -> None:
    with pytest.raises(InvalidInput, match="size: .*is not a size of a disk in whole GiB".replace(".*", "'.*': ")):
        size_gib(text, "size")


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--label", "x"], "labels"),
        (["--label", "=x"], "labels"),
        (["--disk", "x"], "disks[0]"),
        (["--disk", "10", "--disk", "1M"], "disks[1]"),
        (["--disk", "0"], "disks[0].size_gib"),
        (["--nic", "bridge0"], "nics[0].network"),
        (["-p", "x"], "publish[0]"),
        (["-p", "80", "--publish", "99999:1"], "publish[1]"),
        (["--nic", "none", "-p", "8080:80"], "nics[0].forwards"),
        (["--ssh-key", "/nowhere/id.pub"], "ssh_keys[0]"),
        (["-c", "two"], "vcpus"),
        (["-c", "1.5"], "vcpus"),
        (["-c", "0"], "vcpus"),
        (["-m", "1K"], "memory"),
        (["-m", "1"], "memory_mib"),
        (["--mode", "PVH"], "mode"),
        (["--cpu", "host,+x"], "cpu"),
    ],
)
def test_a_refusal_names_the_setting(words: list[str], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec(*words)
    assert caught.value.field == field
    assert caught.value.hint


def test_a_flag_without_its_value() -> None:
    with pytest.raises(UsageError, match="expected one argument"):
        spec("--memory")


def test_user_data_that_cant_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "large").write_bytes(b"\xc3\xa9" * (256 << 10) + b"aa")
    for name, problem in (
        ("absent", "there is no file"),
        ("bytes", "not text in UTF-8"),
        ("large", "larger than 512 KiB"),
        (".", "Is a directory"),
    ):
        with pytest.raises(PolyvisorError, match=problem):
            spec("--user-data", str(tmp_path / name))


def test_a_machine_without_a_card_has_no_forwards() -> None:
    options = parser().parse_args(["tiny", "-p", "8080:80"])
    options.nics = []
    with pytest.raises(InvalidInput, match="publish: '8080:80': the VM has no network card"):
        spec_from_flags(options, "a")
