"""What is measured, and in what order: targets as users write them, and plans that are the same for the same seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyvisor.compare.environment import described, is_emulated, is_nested, parse_facts
from polyvisor.compare.place import Place, choose_targets, seeks_hosts
from polyvisor.compare.plan import Plan, check_plan, visits
from polyvisor.compare.session import check_same_machines
from polyvisor.compare.target import Kind, Target, parse_target, refusal, spec_of
from polyvisor.compare.workload import Stage, all_workloads, choose_workloads
from polyvisor.errors import InvalidInput, Unavailable, WrongState
from polyvisor.host.host import Host
from polyvisor.spec.vm import Hypervisor, Mode
from polyvisor.status import Accelerator, Capabilities, HostStatus
from tests.unit.compared import WORKLOADS, plan, results


class TestTargets:
    def test_a_kind_alone(self) -> None:
        assert parse_target("tcg") == Target(label="tcg", kind=Kind.TCG)

    def test_all_that_can_be_said(self) -> None:
        found = parse_target("slow=tcg:cpu_limit=50:vcpus=2@root@big:2222")
        assert (found.label, found.kind, found.host) == ("slow", Kind.TCG, "root@big:2222")
        assert found.settings == {"cpu_limit": "50", "vcpus": "2"}
        assert parse_target(str(found)) == found

    def test_what_has_no_name_is_called_what_it_is(self) -> None:
        assert parse_target("xen-pv@lab-xen1").label == "xen-pv-at-lab-xen1"
        assert parse_target("tcg:cpu_limit=50").label == "tcg-cpu-limit-50"

    @pytest.mark.parametrize(
        ("text", "hint"),
        [
            ("xen-pvv", "xen-pv or xen-pvh"),
            ("vmware", "there are kvm"),
            ("tcg:cpu_limt=5", "cpu_limit"),
            ("tcg:cpu_limit=much", "write cpu_limit=2"),
            ("tcg:cpu_limit=0", "use 1 to"),
            ("tcg@", "polyvisor host ls"),
            ("native:vcpus=2", "leave it out"),
            ("xen-pv:mode=hvm", "leave mode out"),
            ("tcg:vcpus", "write it as"),
            ("", "write it as"),
            ("A=tcg", "write it as"),
        ],
    )
    def test_what_is_none_is_refused_in_one_line_with_a_remedy(self, text: str, hint: str) -> None:
        with pytest.raises(InvalidInput) as raised:
            parse_target(text)
        assert hint in str(raised.value.hint)
        assert "\n" not in raised.value.message

    def test_the_guest_of_a_target(self) -> None:
        spec = spec_of(parse_target("xen-pvh:memory_mib=256:cpu_limit=50"), "x", "tiny")
        assert (spec.hypervisor, spec.mode, spec.memory_mib, spec.cpu_limit) == (Hypervisor.XEN, Mode.PVH, 256, 50)

    def test_a_limit_that_the_hypervisor_does_not_keep_is_not_in_the_spec(self) -> None:
        target = parse_target("tcg:cpu_limit=50")
        assert spec_of(target, "x", "tiny").cpu_limit is None
        assert target.cpu_cap == 50
        assert parse_target("xen-pv:cpu_limit=50").cpu_cap is None


def status(*accelerators: Accelerator, modes: tuple[str, ...] = ("pvh", "hvm")) -> HostStatus:
    return HostStatus(
        name="h",
        kernel="6.1",
        architecture="x86_64",
        cpus=2,
        cpu_model="Some CPU",
        memory_mib=4096,
        memory_free_mib=2048,
        home="/h",
        storage_free_mib=1,
        hypervisor=None,
        hypervisor_reason="because",
        capabilities=(Capabilities(driver="d", version="1", accelerators=accelerators, modes=modes),),
        vms_by_state={},
    )


TCG = Accelerator(name="tcg", available=True, reason="always")
NO_KVM = Accelerator(name="kvm", available=False, reason="the CPU has no vmx")
XEN = Accelerator(name="xen", available=True, reason="booted by Xen")


def place(name: str | None, *accelerators: Accelerator, modes: tuple[str, ...] = ("pvh", "hvm")) -> Place:
    return Place(name=name, api=Host("/nowhere"), status=status(*accelerators, modes=modes))


class TestWhere:
    def test_what_is_not_available_says_why(self) -> None:
        assert refusal(parse_target("kvm"), status(NO_KVM, TCG)) == "the CPU has no vmx"
        assert "no Xen host" in str(refusal(parse_target("xen-pv"), status(TCG)))
        assert "mode pv" in str(refusal(parse_target("xen-pv"), status(XEN)))
        assert refusal(parse_target("native"), status()) is None

    def test_a_target_is_taken_where_it_is_to_be_had(self) -> None:
        places = [place(None, NO_KVM, TCG), place("lab-xen1", XEN, modes=("pv", "pvh"))]
        found = choose_targets(["tcg", "xen-pv"], places, everywhere=False)
        assert [(t.kind, t.host) for t in found] == [(Kind.TCG, None), (Kind.XEN_PV, "lab-xen1")]

    def test_on_hosts_that_are_named_it_is_taken_on_each(self) -> None:
        found = choose_targets(["tcg"], [place("a", TCG), place("b", TCG), place("c", NO_KVM)], everywhere=True)
        assert [t.label for t in found] == ["tcg-at-a", "tcg-at-b"]

    def test_everything_that_works_is_the_default(self) -> None:
        places = [place(None, NO_KVM, TCG), place("x", XEN, modes=("pv", "pvh"))]
        assert [t.label for t in choose_targets([], places[:1], everywhere=False)] == ["tcg"]
        assert len(choose_targets([], places, everywhere=False)) == 3

    def test_other_hosts_are_looked_at_where_they_may_be_needed_alone(self) -> None:
        assert seeks_hosts([]) and seeks_hosts(["tcg", "kvm"])
        assert not seeks_hosts(["tcg", "native", "xen-pv@lab-xen1"])

    def test_where_it_is_nowhere_all_reasons_are_told(self) -> None:
        with pytest.raises(Unavailable, match=r"this host: the CPU has no vmx; x: no driver"):
            choose_targets(["kvm"], [place(None, NO_KVM, TCG), place("x", XEN)], everywhere=False)


class TestPlan:
    @settings(max_examples=30)
    @given(st.integers(0, 2**31), st.integers(1, 20), st.integers(0, 3))
    def test_every_round_has_every_target_once(self, seed: int, runs: int, warmups: int) -> None:
        of = plan("tcg", "kvm", "native", seed=seed, runs=runs, warmups=warmups)
        found = visits(of, WORKLOADS)
        assert found == visits(of, WORKLOADS)
        for number in range(-warmups, runs):
            labels = [visit.target.label for visit in found if visit.round == number]
            assert sorted(labels) == ["kvm", "native", "tcg"]
        assert [visit.round for visit in found] == sorted(visit.round for visit in found)

    def test_another_seed_is_another_order_and_more_runs_begin_the_same(self) -> None:
        short, long = plan(runs=8), plan(runs=20)
        assert visits(long, WORKLOADS)[: len(visits(short, WORKLOADS))] == visits(short, WORKLOADS)
        assert visits(plan(runs=20, seed=8), WORKLOADS) != visits(long, WORKLOADS)

    def test_no_target_always_goes_first(self) -> None:
        first = [visit.target.label for visit in visits(plan(runs=20), WORKLOADS)[::2]]
        assert 5 < first.count("tcg") < 17

    def test_the_order_of_life_and_what_a_host_itself_can_not_do(self) -> None:
        for visit in visits(plan("tcg", "native", runs=5), WORKLOADS):
            if visit.target.kind is Kind.NATIVE:
                assert sorted(visit.workloads) == ["a", "b"]
            else:
                assert visit.workloads[0] == "birth"

    def test_twice_the_same_label_is_refused_with_the_way_to_compare_it_with_itself(self) -> None:
        with pytest.raises(InvalidInput) as raised:
            plan("tcg", "tcg")
        assert raised.value.hint == "name them: a=tcg,b=tcg compares it with itself"
        assert len(plan("a=tcg", "b=tcg").targets) == 2

    def test_bounds(self) -> None:
        for runs in (0, 1001):
            with pytest.raises(InvalidInput, match="runs"):
                plan(runs=runs)
        with pytest.raises(InvalidInput, match="no target"):
            Plan(seed=1, runs=1, warmups=0, image="tiny", targets=(), workloads=("a",))

    def test_a_target_with_nothing_to_do_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="native"):
            check_plan(replace(plan("native"), workloads=("birth",)), WORKLOADS)
        check_plan(plan("native"), WORKLOADS)


class TestWorkloads:
    def test_each_file_is_one_under_its_own_name(self) -> None:
        for name, workload in all_workloads().items():
            assert workload.name == name
            assert workload.metrics and workload.about
            assert len({metric.name for metric in workload.metrics}) == len(workload.metrics)
            assert workload.stage is Stage.INSIDE or not workload.native

    def test_the_quick_ones_need_nothing_that_tiny_lacks(self) -> None:
        quick = choose_workloads([], quick=True)
        assert {program.name for each in quick for program in each.programs} <= {"busybox"}
        assert len(quick) >= 6

    def test_one_that_is_unknown_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(InvalidInput) as raised:
            choose_workloads(["boot", "syscals"], quick=False)
        assert raised.value.hint == "did you mean syscalls?"


def test_a_comparison_goes_on_where_it_was_begun_alone() -> None:
    here = place(None, TCG)
    begun = replace(results(plan("tcg")), environments={"tcg": {**described(here.status), "load": "1"}})
    check_same_machines(begun, {None: here})
    other = replace(begun, environments={"tcg": {**described(here.status), "kernel": "5.10"}})
    with pytest.raises(WrongState, match=r"kernel was 5\.10, and is 6\.1"):
        check_same_machines(other, {None: here})


def test_what_is_emulated_and_nested() -> None:
    tcg, kvm = parse_target("tcg"), parse_target("kvm")
    real = parse_facts("machine: Dell Inc. PowerEdge\nhypervisor-below: no\nvirtual: none\nnonsense\n: x\nempty:")
    assert real["machine"] == "Dell Inc. PowerEdge" and "empty" not in real
    assert is_emulated(tcg, real) and not is_emulated(kvm, real) and not is_nested(real)
    for lab in ({"virtual": "qemu"}, {"machine": "QEMU Standard PC", "virtual": "xen"}):
        assert is_emulated(kvm, lab) and is_nested(lab)
    cloud = {"machine": "QEMU Standard PC", "virtual": "kvm", "hypervisor-below": "yes"}
    assert is_nested(cloud) and not is_emulated(kvm, cloud)
