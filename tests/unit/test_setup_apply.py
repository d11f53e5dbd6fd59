"""Carrying out a plan of `host prepare`, on a made-up machine: a directory, and programs that note their calls."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from polyvisor.errors import NotPermitted, PolyvisorError, ProcessFailed, StorageFull, Unsupported
from polyvisor.host.setup import apply
from polyvisor.host.setup.apply import carry_out, prepare
from polyvisor.host.setup.facts import MODULES_FILE, gather
from polyvisor.host.setup.grub import CONFIG, DROP_IN
from polyvisor.host.setup.wish import Wish
from polyvisor.operation import Step
from polyvisor.status import FileChange, HostKind, Setup, SetupStep, StepState
from tests.unit.setups import OS_RELEASES, XEN_ENTRY

XEN = Wish(kind=HostKind.XEN, dom0_memory_mib=1024, dom0_vcpus=1)
KVM = Wish(kind=HostKind.KVM)
UNDO = Wish(kind=HostKind.XEN, undo=True)
# What the programs of a Debian do, as far as `prepare` sees it; each notes how it was called. $ROOT is the machine.
PROGRAMS = {
    "dpkg-query": 'for p in $(cat "$ROOT/installed"); do echo "ii  $p"; done; echo "rc  purged"',
    "apt-cache": 'shift; for p; do printf "%s:\\n  Installed: (none)\\n  Candidate: 1.0\\n" "$p"; done',
    "apt-get": """case "$*" in
*install*) echo "dlstatus:1:50.0:half"; echo "pmstatus:x:100:done"
    for p; do case $p in -*|install|*=*) ;; *) echo "$p" >>"$ROOT/installed";; esac; done
    echo xen-hypervisor-common >>"$ROOT/installed"; umask >"$ROOT/umask";;
esac""",
    "update-grub": """if grep -q OVERRIDE_GRUB_DEFAULT=1 "$ROOT/etc/default/grub.d/polyvisor.cfg" && [ -z "$BROKEN" ]
then cat "$ROOT/with-xen.cfg"; else cat "$ROOT/without.cfg"; fi >"$ROOT/boot/grub/grub.cfg"
""",
    "systemctl": """case $1 in
is-enabled) cat "$ROOT/$2" 2>/dev/null || exit 1;;
enable) echo enabled >"$ROOT/$2";;
disable) echo disabled >"$ROOT/$2";;
*) exit 1;;
esac""",
    "modprobe": 'mkdir -p "$ROOT/dev"; : >"$ROOT/dev/kvm"',
    "cp": ":",
}


class Machine:
    """A made-up Debian 12 with an AMD CPU below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        words = "dom0_mem=1024M,max:1024M dom0_max_vcpus=1"
        menu = "menuentry 'Debian' {{\n{}\n}}\n"
        self.write("etc/os-release", OS_RELEASES["debian-12"])
        self.write("proc/meminfo", "MemTotal:       4030000 kB\n")
        self.write("proc/cpuinfo", "flags\t\t: fpu svm lm\n")
        self.write("etc/default/grub", 'GRUB_DEFAULT=0\nGRUB_TIMEOUT=5\nGRUB_CMDLINE_LINUX=""\n')
        self.write("boot/config-6.1.0-30-amd64", "\nCONFIG_XEN_DOM0=y\n")
        self.write("without.cfg", menu.format("  linux /vmlinuz"))
        self.write(CONFIG[1:], menu.format("  linux /vmlinuz"))
        self.write("with-xen.cfg", menu.format(XEN_ENTRY.format(words)))
        self.write("installed", "python3\n")
        self.write("usr/sbin/update-grub", "")
        (self.root / "run").mkdir()
        (self.root / "etc/default/grub.d").mkdir()

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def calls(self) -> list[str]:
        """The commands that may have changed something, since the last time."""
        log = self.root / "calls"
        said = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        looks = ("dpkg-query", "apt-cache", "systemctl is-enabled")
        return [call for call in said if call and not call.startswith(looks)]

    async def prepare(self, wish: Wish, *, act: bool = True) -> Setup:
        return await prepare(wish, act=act, root=self.root)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"$ROOT/calls"\n{body}\n')
        (programs / name).chmod(0o755)
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setenv("ROOT", str(root))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return Machine(root)


def states(setup: Setup) -> dict[str, StepState]:
    return {step.name: step.state for step in setup.steps}


class TestXen:
    async def test_it_is_done_once(self, machine: Machine) -> None:
        before = await machine.prepare(XEN, act=False)
        assert machine.calls() == []
        assert len(before.in_state(StepState.TODO)) == 5
        after = await machine.prepare(XEN)
        assert set(states(after).values()) == {StepState.DONE, StepState.BY_HAND}
        assert states(after)["reboot"] is StepState.BY_HAND
        first = [call.split()[0] for call in machine.calls()]
        assert first == ["cp", "apt-get", "apt-get", "update-grub", "systemctl", "systemctl"]
        again = await machine.prepare(XEN)
        assert again == after
        assert machine.calls() == [], "there is nothing left to do"

    async def test_and_back(self, machine: Machine) -> None:
        await machine.prepare(XEN)
        machine.calls()
        ours = machine.read(DROP_IN)
        back = await machine.prepare(UNDO)
        assert set(states(back).values()) == {StepState.DONE}
        assert machine.calls() == ["update-grub "]
        assert "XEN_OVERRIDE_GRUB_DEFAULT=0" in machine.read(DROP_IN)
        assert machine.read(f"{DROP_IN}.old") == ours
        assert (await machine.prepare(UNDO)) == back
        assert machine.calls() == []
        await machine.prepare(XEN)
        assert machine.read(DROP_IN) == ours

    async def test_what_was_cut_off_goes_on(self, machine: Machine) -> None:
        first = (await machine.prepare(XEN, act=False)).in_state(StepState.TODO)
        for step in first[:2]:
            await carry_out(step, root=machine.root)
        machine.calls()
        await machine.prepare(XEN)
        assert machine.calls() == [
            "update-grub ",
            "systemctl enable xen.service",
            "systemctl disable xendomains.service",
        ]

    async def test_a_menu_that_does_not_boot_it_is_seen(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BROKEN", "1")
        with pytest.raises(PolyvisorError, match="'boot' is not as it should be") as caught:
            await machine.prepare(XEN)
        assert "--undo" in (caught.value.hint or "")

    async def test_permissions_are_those_of_a_system(self, machine: Machine) -> None:
        old = os.umask(0o077)
        try:
            await machine.prepare(XEN)
        finally:
            os.umask(old)
        assert (machine.root / DROP_IN[1:]).stat().st_mode & 0o777 == 0o644
        assert machine.read("umask").strip() == "0022"

    async def test_in_a_dom0_the_machine_is_as_xen_sees_it(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from polyvisor.drivers.xen import xl

        captured = Path(__file__).parents[1] / "captured" / "xl" / "info-4.17-debian.txt"

        async def info() -> xl.XenInfo:
            return xl.parse_info(captured.read_text())

        monkeypatch.setattr(xl, "info", info)
        machine.write("proc/xen/capabilities", "control_d\n")
        machine.write("proc/cpuinfo", "flags\t\t: fpu lm hypervisor\n")
        facts = await gather(machine.root)
        assert (facts.memory_mib, facts.cpus, facts.cpu_flag) == (4095, 2, "hvm")
        assert "dom0_mem=2048M,max:2048M" in (facts.xen or "")


class TestKvm:
    async def test_packages_and_module(self, machine: Machine) -> None:
        after = await machine.prepare(KVM)
        assert set(states(after).values()) == {StepState.DONE}
        assert machine.read(MODULES_FILE).endswith("\nkvm_amd\n")
        assert [call.split()[0] for call in machine.calls()] == ["apt-get", "apt-get", "modprobe"]
        assert await machine.prepare(KVM) == after
        assert machine.calls() == []
        await machine.prepare(Wish(kind=HostKind.KVM, undo=True))
        assert not (machine.root / MODULES_FILE[1:]).exists()


class TestRefused:
    async def test_without_root_nothing_is_done(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert (await machine.prepare(XEN, act=False)).in_state(StepState.TODO)
        with pytest.raises(NotPermitted, match="root's rights"):
            await machine.prepare(XEN)
        assert machine.calls() == []
        assert not (machine.root / DROP_IN[1:]).exists()

    async def test_an_unknown_system_is_left_alone(self, machine: Machine) -> None:
        machine.write("etc/os-release", "ID=arch\n")
        for wish in (XEN, KVM, UNDO):
            with pytest.raises(Unsupported, match="nothing was changed"):
                await machine.prepare(wish)
        assert machine.calls() == []

    async def test_a_program_that_fails_ends_it_there(self, machine: Machine, tmp_path: Path) -> None:
        (tmp_path / "programs" / "apt-get").write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
        with pytest.raises(ProcessFailed, match=r"step 'packages': .*E: no network"):
            await machine.prepare(XEN)
        assert [call.split()[0] for call in machine.calls()] == ["cp"], "update-grub was not reached"

    async def test_a_full_disk(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(apply, "write_atomic", full)
        with pytest.raises(StorageFull, match="step 'settings'"):
            await machine.prepare(XEN)
        assert machine.calls() == []


async def test_progress_of_packages(machine: Machine) -> None:
    steps: list[Step] = []
    await prepare(XEN, steps.append, act=True, root=machine.root)
    assert Step("fetching packages", 50, 100, "%") in steps
    assert Step("installing packages", 100, 100, "%") in steps
    assert next(s.phase for s in steps if s.phase.startswith("step")) == "step 'settings'"


async def test_files_come_before_commands(tmp_path: Path) -> None:
    step = SetupStep(
        name="x",
        state=StepState.TODO,
        found="",
        files=(FileChange(path="/a/b", content="1"),),
        commands=(("sh", "-c", f"cat {tmp_path}/a/b >{tmp_path}/c"),),
    )
    await carry_out(step, root=tmp_path)
    assert (tmp_path / "c").read_text() == "1"
