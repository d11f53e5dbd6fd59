"""VMs of the Xen driver where a program stands in for `xl` (xl_program.py), for the tests of that driver."""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.drivers.base import Boot, Observed
from polyvisor.drivers.xen.driver import XenDriver
from polyvisor.host.record import Launch, Record, boot_id
from polyvisor.host.store import VMDirectory
from polyvisor.spec.vm import Mode, VMSpec
from polyvisor.waiting import pause
from tests.golden.xl_boots import XL_BOOTS
from tests.unit.xl_program import PROGRAM

INFO = Path(__file__).parents[1] / "captured" / "xl" / "info-4.17-debian.txt"
DRIVER = XenDriver()


@pytest.fixture
def xen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a program `xl`, which is first in PATH."""
    directory, programs = tmp_path / "xen", tmp_path / "bin"
    directory.mkdir()
    programs.mkdir()
    text = PROGRAM.replace("{python}", sys.executable).replace("{directory}", str(directory))
    (programs / "xl").write_text(text.replace("{info}", str(INFO)))
    (programs / "xenconsole").write_text('#!/bin/sh\nexec xl console "$@"\n')
    (programs / "xenstore-ls").write_text(f"#!/bin/sh\ncat {directory}/backends 2>/dev/null\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return directory


@pytest.fixture
def vm(xen: Path, tmp_path: Path) -> VMDirectory:
    return made(tmp_path / "vms" / "web")


def made(path: Path) -> VMDirectory:
    vm = VMDirectory(path)
    vm.run.mkdir(parents=True)
    spec = VMSpec(name=path.name, image="tiny", nics=())
    vm.write_record(Record(id=str(uuid.uuid4()), created_at=0.0, spec=spec, image_id="x", memory_mib=128))
    return vm


async def start(vm: VMDirectory, mode: Mode = Mode.PV, **changes: object) -> Observed:
    boot: Boot = replace(XL_BOOTS["no-card"], name=vm.name, id=vm.record.id, mode=mode, **changes)  # type: ignore[arg-type]
    command = await DRIVER.command(boot)
    launch = Launch(
        started_at=0.0,
        boot_id=boot_id(),
        hypervisor="xen",
        reason="",
        mode=mode.value,
        version=command.version,
        argv=command.argv,
    )
    vm.write_launch(launch)
    return await DRIVER.start(vm, boot, command, None)


async def until_ended(vm: VMDirectory) -> Observed:
    while await DRIVER.lives(vm):
        await pause(0.01)
    return await DRIVER.inspect(vm)


def domains(xen: Path) -> list[str]:
    return [path.name for path in xen.iterdir() if path.name.isdigit()]
