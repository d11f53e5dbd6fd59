"""Plans of `host prepare`: what is to be done on which machine, what is done already, and what is never done."""

from dataclasses import replace
from typing import Any

import pytest

from polyvisor.errors import InvalidInput
from polyvisor.host.setup import xen
from polyvisor.host.setup.facts import Facts
from polyvisor.host.setup.grub import DROP_IN
from polyvisor.host.setup.plan import plan
from polyvisor.host.setup.wish import Wish
from polyvisor.status import HostKind, Setup, SetupStep, StepState
from tests.golden.setup_plans import KVM, PLANS, SETUP_DIRECTORY, XEN, shown
from tests.unit.setups import OS_RELEASES, UNKNOWN, XEN_ENTRY, facts, grub

UNDO = Wish(kind=HostKind.XEN, undo=True)
ALL_XEN = facts().installed | {
    *(
        "xen-system-amd64",
        "xen-hypervisor-common",
        "qemu-system-xen",
        "grub-xen-host",
        "qemu-utils",
        "nftables",
        "dnsmasq-base",
    )
}


def states(setup: Setup) -> dict[str, StepState]:
    return {step.name: step.state for step in setup.steps}


def step(setup: Setup, name: str) -> SetupStep:
    return next(s for s in setup.steps if s.name == name)


def prepared(wish: Wish = XEN, **changes: Any) -> Facts:
    """A machine on which all but the reboot was done for `wish`."""
    fresh = facts()
    text = step(plan(fresh, wish), "settings").files[0].content or ""
    words = " ".join(xen.wanted_words(grub(), *(n or 0 for n in xen.dom0_of(text))))
    done = facts(
        installed=ALL_XEN,
        grub=grub(drop_in=text, default=XEN_ENTRY.format(words)),
        units=(("xen.service", "enabled"), ("xendomains.service", "disabled")),
    )
    return replace(done, **changes)


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_as_kept(name: str) -> None:
    kept = (SETUP_DIRECTORY / f"{name}.txt").read_text()
    assert shown(name) == kept, "if it is meant: uv run python -m tests.golden.regenerate"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in SETUP_DIRECTORY.iterdir()} == PLANS.keys()


class TestNothingIsTouched:
    @pytest.mark.parametrize("name", UNKNOWN)
    @pytest.mark.parametrize("wish", [KVM, XEN, UNDO])
    def test_on_a_system_that_is_not_known(self, name: str, wish: Wish) -> None:
        setup = plan(facts(name), wish)
        assert states(setup) == {"machine": StepState.BLOCKED}
        assert not any(s.files or s.commands for s in setup.steps)

    @pytest.mark.parametrize("name", [name for name in OS_RELEASES if name.split("-")[0] not in ("debian", "ubuntu")])
    @pytest.mark.parametrize("wish", [KVM, XEN, UNDO])
    def test_on_a_system_that_was_never_tried(self, name: str, wish: Wish) -> None:
        setup = plan(facts(name), wish)
        assert StepState.TODO not in states(setup).values()
        assert not any(s.files for s in setup.steps)
        assert states(setup)["machine"] is StepState.BLOCKED or "never run" in setup.notes[0]

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"architecture": "aarch64"}, "aarch64"),
            ({"container": True}, "container"),
            ({"secure_boot": True}, "Secure Boot"),
            ({"memory_mib": 1500}, "too little"),
            ({"grub": None}, "GRUB does not boot"),
            ({"grub": grub(menu=False)}, "run it as root"),
        ],
    )
    def test_where_xen_could_not_boot(self, changes: dict[str, Any], why: str) -> None:
        setup = plan(facts(**changes), XEN)
        assert states(setup) == {"machine": StepState.BLOCKED}
        assert why in setup.steps[0].found

    def test_where_kvm_could_not_work(self) -> None:
        setup = plan(facts(cpu_flag=None), KVM)
        assert states(setup) == {"machine": StepState.BLOCKED}
        assert "host prepare xen" in setup.steps[0].found

    def test_settings_that_are_not_ours(self) -> None:
        for wish in (XEN, UNDO):
            setup = plan(facts(installed=ALL_XEN, grub=grub(drop_in="XEN_OVERRIDE_GRUB_DEFAULT=0\n")), wish)
            assert states(setup)["settings"] is StepState.BLOCKED
            assert not step(setup, "settings").files


class TestXen:
    def test_once_it_is_done_only_the_reboot_is_left(self) -> None:
        setup = plan(prepared(), XEN)
        assert {name for name, state in states(setup).items() if state is not StepState.DONE} == {"reboot"}
        assert step(setup, "reboot").state is StepState.BY_HAND

    def test_after_the_reboot_nothing_is_left(self) -> None:
        words = "dom0_mem=1808M,max:1808M dom0_max_vcpus=4 placeholder"
        assert set(states(plan(prepared(xen=words), XEN)).values()) == {StepState.DONE}
        assert states(plan(prepared(xen="dom0_mem=512M"), XEN))["reboot"] is StepState.BY_HAND

    def test_the_shares_of_an_earlier_time_stay(self) -> None:
        asked = Wish(kind=HostKind.XEN, dom0_memory_mib=3072, dom0_vcpus=2)
        assert states(plan(prepared(asked), XEN))["settings"] is StepState.DONE
        other = plan(prepared(asked), replace(asked, dom0_vcpus=3))
        assert states(other)["settings"] is StepState.TODO
        assert states(other)["boot"] is StepState.TODO
        assert "dom0_mem=3072M,max:3072M dom0_max_vcpus=3" in (step(other, "settings").files[0].content or "")

    def test_settings_that_change_make_a_new_menu(self) -> None:
        done = prepared()
        assert done.grub is not None
        older = replace(done, grub=replace(done.grub, drop_in=f"{done.grub.drop_in}# older\n"))
        assert states(plan(older, XEN))["settings"] is StepState.TODO
        assert states(plan(older, XEN))["boot"] is StepState.TODO

    def test_the_menu_is_kept_before_anything_makes_a_new_one(self) -> None:
        names = [s.name for s in plan(facts(), XEN).steps]
        assert names.index("settings") < names.index("packages") < names.index("boot") < names.index("reboot")
        assert [c[0] for c in step(plan(facts(), XEN), "settings").commands] == ["cp"]
        already = facts(grub=grub(default=XEN_ENTRY.format("")))
        assert step(plan(already, XEN), "settings").commands == (), "that of a Xen host is no way back"

    def test_dom0_as_its_owner_has_set_it(self) -> None:
        owners = grub('GRUB_CMDLINE_XEN_DEFAULT="dom0_mem=4G,max:4G ucode=scan"\n')
        settings = step(plan(facts(grub=owners), XEN), "settings")
        assert settings.state is StepState.TODO
        assert "dom0_mem" not in (settings.files[0].content or "")
        asked = plan(facts(grub=owners), Wish(kind=HostKind.XEN, dom0_memory_mib=2048))
        assert states(asked) == {"machine": StepState.DONE, "settings": StepState.BLOCKED}
        assert "/etc/default/grub already" in step(asked, "settings").found

    def test_a_file_that_is_read_later_and_takes_it_back(self) -> None:
        setup = plan(facts(grub=grub(more=(("xen.cfg", 'GRUB_CMDLINE_XEN="ucode=scan"\n'),))), XEN)
        assert states(setup)["settings"] is StepState.BLOCKED
        earlier = plan(facts(grub=grub(more=(("a.cfg", 'GRUB_CMDLINE_XEN="ucode=scan"\n'),))), XEN)
        assert states(earlier)["settings"] is StepState.TODO

    def test_domains_of_others_are_left_to_their_owner(self) -> None:
        setup = plan(facts(domains=("web.cfg",)), XEN)
        assert states(setup)["xendomains"] is StepState.BY_HAND
        assert "web.cfg" in step(setup, "xendomains").found

    def test_a_serial_console_that_xen_has_already(self) -> None:
        text = 'GRUB_CMDLINE_LINUX="console=ttyS1,9600"\n'
        assert "com2=9600,8n1 console=com2,vga" in xen.drop_in(grub(text), 1024, 1)
        assert "com2" not in xen.drop_in(grub(text + 'GRUB_CMDLINE_XEN="com2=115200,8n1"\n'), 1024, 1)

    @pytest.mark.parametrize(("has", "wants"), [("qemu-system-xen", 0), ("qemu-system-x86-xen", 1)])
    def test_the_package_that_a_release_has(self, has: str, wants: int) -> None:
        setup = plan(facts("ubuntu-24.04", available=frozenset({has})), XEN)
        install = step(setup, "packages").commands[-1]
        assert [name in install for name in ("qemu-system-xen", "qemu-system-x86-xen")] == [wants == 0, wants == 1]

    def test_packages_are_never_removed(self) -> None:
        assert "--no-remove" in step(plan(facts(), XEN), "packages").commands[-1]


class TestBack:
    def test_xen_stays_installed_and_is_not_booted(self) -> None:
        setup = plan(prepared(xen=""), UNDO)
        assert states(setup)["settings"] is StepState.TODO
        assert (step(setup, "settings").files[0].content or "").endswith("\nXEN_OVERRIDE_GRUB_DEFAULT=0\n")
        assert states(setup)["boot"] is StepState.TODO
        assert states(setup)["reboot"] is StepState.BY_HAND

    def test_without_its_packages_nothing_is_left_of_it(self) -> None:
        setup = plan(prepared(installed=frozenset()), UNDO)
        assert [(f.path, f.content) for f in step(setup, "settings").files] == [(DROP_IN, None)]

    def test_twice(self) -> None:
        text = step(plan(prepared(), UNDO), "settings").files[0].content
        again = plan(prepared(grub=grub(drop_in=text)), UNDO)
        assert set(states(again).values()) == {StepState.DONE}
        assert set(states(plan(facts(), UNDO)).values()) == {StepState.DONE}, "of a machine that never had it"

    def test_and_forth(self) -> None:
        text = step(plan(prepared(), UNDO), "settings").files[0].content
        assert states(plan(prepared(grub=grub(drop_in=text)), XEN))["settings"] is StepState.TODO

    def test_the_module(self) -> None:
        undo = Wish(kind=HostKind.KVM, undo=True)
        assert states(plan(facts(cpu_flag=None), undo))["module"] is StepState.DONE
        assert [f.content for f in step(plan(facts(modules_file=True), undo), "module").files] == [None]


class TestWish:
    def test_by_default_what_the_machine_runs(self) -> None:
        assert plan(facts(), Wish()).kind is HostKind.KVM
        assert plan(facts(xen=""), Wish()).kind is HostKind.XEN

    @pytest.mark.parametrize(
        "wish",
        [
            Wish(kind=HostKind.KVM, dom0_memory_mib=1024),
            Wish(dom0_vcpus=2),
            Wish(kind=HostKind.XEN, dom0_memory_mib=511),
            Wish(kind=HostKind.XEN, dom0_memory_mib=15984),
            Wish(kind=HostKind.XEN, dom0_vcpus=0),
            Wish(kind=HostKind.XEN, dom0_vcpus=9),
        ],
    )
    def test_sizes_that_can_not_be(self, wish: Wish) -> None:
        with pytest.raises(InvalidInput):
            plan(facts(), wish)

    @pytest.mark.parametrize(
        ("total", "memory"), [(2000, 992), (4096, 1216), (15984, 1808), (65536, 4288), (262144, 8192), (1 << 20, 8192)]
    )
    def test_the_usual_memory(self, total: int, memory: int) -> None:
        assert xen.usual_memory_mib(total) == memory

    @pytest.mark.parametrize(("cpus", "vcpus"), [(1, 1), (2, 2), (4, 4), (16, 4), (32, 8), (64, 16), (256, 16)])
    def test_the_usual_vcpus(self, cpus: int, vcpus: int) -> None:
        assert xen.usual_vcpus(cpus) == vcpus
