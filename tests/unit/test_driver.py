"""What the QEMU driver makes of a VM's directory, in which a guest that has broken out may write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyvisor.drivers.qemu.vm_process import pid_of
from polyvisor.host.store import VMDirectory


@pytest.fixture
def vm(tmp_path: Path) -> VMDirectory:
    (tmp_path / "run").mkdir()
    return VMDirectory(tmp_path)


@pytest.mark.parametrize(("text", "pid"), [("123\n", 123), ("", None), ("x", None), ("1" * 5000, int("1" * 32))])
def test_a_pid_file(vm: VMDirectory, text: str, pid: int | None) -> None:
    (vm.run / "qemu.pid").write_text(text)
    assert pid_of(vm) == pid


def test_no_pid_file(vm: VMDirectory) -> None:
    assert pid_of(vm) is None


def test_a_pipe_in_its_place_is_not_waited_for(vm: VMDirectory) -> None:
    os.mkfifo(vm.run / "qemu.pid")
    assert pid_of(vm) is None


def test_a_link_in_its_place_is_not_followed(vm: VMDirectory, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("1\n")
    (vm.run / "qemu.pid").symlink_to(tmp_path / "other")
    assert pid_of(vm) is None
