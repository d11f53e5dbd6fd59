"""QEMU's command line, by golden files, and what may never get into it."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.drivers.base import Boot, BootDisk
from polyvisor.drivers.qemu.argv import build_argv
from polyvisor.drivers.qemu.devices import hostfwd
from polyvisor.spec.forward import Forward
from tests.golden.boots import AWKWARD, BOOTS, DIRECTORY, QEMU, TINY, UEFI_CODE, golden, rendered
from tests.unit.specs import QUICK


@pytest.mark.parametrize("name", BOOTS)
def test_a_command_line_is_as_its_golden_file(name: str) -> None:
    assert rendered(BOOTS[name]) == golden(name).read_text(), "if wanted: uv run python -m tests.golden.regenerate"


def test_every_golden_file_belongs_to_a_boot() -> None:
    assert set(DIRECTORY.glob("*.argv")) == {golden(name) for name in BOOTS}


@pytest.mark.parametrize("boot", BOOTS.values(), ids=BOOTS)
def test_every_machine_is_shut_in(boot: Boot) -> None:
    argv = build_argv(QEMU, boot, UEFI_CODE)
    assert "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny" in argv
    assert {"-nodefaults", "-no-user-config"} <= set(argv)
    assert not {"-monitor", "-vnc", "-hda", "-drive", "-net"} & set(argv)
    assert len(argv) == len([word for word in argv if word]), "no word is empty"


def blockdevs(argv: list[str]) -> list[dict[str, object]]:
    return [json.loads(argv[i + 1]) for i, word in enumerate(argv) if word == "-blockdev"]


@QUICK
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(lambda text: f"/{text}"))
def test_a_path_reaches_qemu_as_it_is_wherever_it_stands(text: str) -> None:
    path = Path(text)
    top = path / "disk0.qcow2"
    boot = replace(TINY, kernel=path, initrd=path, disks=(BootDisk(path=top, backing=path),), seed=path)
    argv = build_argv(QEMU, boot)
    # -kernel and -initrd are no option lists: QEMU takes the whole word. -blockdev is JSON.
    assert argv[argv.index("-kernel") + 1] == argv[argv.index("-initrd") + 1] == str(path)
    disk, seed = blockdevs(argv)
    assert disk["file"] == {"driver": "file", "filename": str(top), "discard": "unmap"}
    assert disk["backing"]["file"] == {"driver": "file", "filename": str(path), "read-only": True}  # type: ignore[index]
    assert seed["file"]["filename"] == str(path)  # type: ignore[index]
    plain = build_argv(QEMU, replace(TINY, kernel=Path("/k"), initrd=Path("/k"), disks=boot.disks, seed=Path("/k")))
    assert len(argv) == len(plain), "no path makes more words"


def test_nothing_of_a_path_stands_in_a_list_of_options() -> None:
    words = build_argv(QEMU, BOOTS["awkward-paths"])
    found = {option for option, word in pairwise(words) if AWKWARD.parts[2].split(",")[0] + "," in word}
    assert found == {"-kernel", "-initrd", "-blockdev"}


def test_every_block_node_names_its_format_and_ends_its_chain() -> None:
    for boot in BOOTS.values():
        for node in blockdevs(build_argv(QEMU, boot, UEFI_CODE)):
            assert node["driver"] in ("qcow2", "raw")
            if node["driver"] == "qcow2":
                backing = node["backing"]
                assert backing is None or (
                    isinstance(backing, dict) and backing["backing"] is None and backing["read-only"] is True
                )


def test_sockets_are_named_from_the_directory_so_that_their_names_fit() -> None:
    argv = build_argv(QEMU, TINY)
    assert [word for word in argv if "path=/" in word] == []
    assert argv[argv.index("-pidfile") + 1] == "run/qemu.pid"


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (Forward(host_port=1, guest_port=2), "tcp:127.0.0.1:1-:2"),
        (Forward(host_port=1, guest_port=2, host_address="0.0.0.0", protocol="udp"), "udp:0.0.0.0:1-:2"),
    ],
)
def test_forwards_as_slirp_writes_them(forward: Forward, expected: str) -> None:
    assert hostfwd(forward) == expected
