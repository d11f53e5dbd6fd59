"""Choices that the user left to Polyvisor: hypervisor, mode, firmware, addresses."""

from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import InvalidInput, Unsupported
from polyvisor.host.plan import (
    build_boot,
    check_devices,
    choose_accelerator,
    choose_firmware,
    choose_mode,
    derived_mac,
    explain_choice,
)
from polyvisor.host.prepare import check_disk_sizes
from polyvisor.host.record import Launch, Record
from polyvisor.images.image import Image, ImageFile, Seed
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import DeviceModel, Disk, Firmware, Hypervisor, Mode, Nic, VMSpec
from polyvisor.status import Accelerator, Capabilities
from tests.unit.test_ports import free_port

ID = "6f4d0a54-1f0a-4b5e-9d0e-2b7f6a1c9e11"
FILES = {kind: ImageFile(name=name, sha256="", size=1) for kind, name in (("disk", "disk.qcow2"), ("kernel", "kernel"))}
KERNEL = Image(
    id="k",
    name="tiny",
    created_at=0.0,
    source="x",
    kernel=FILES["kernel"],
    initrd=ImageFile(name="initrd", sha256="", size=1),
    cmdline="quiet",
    seed=Seed.INITRD,
)
DISK = Image(
    id="d",
    name="cloud",
    created_at=0.0,
    source="x",
    disk=FILES["disk"],
    disk_size_mib=2500,
    firmware=("bios", "uefi"),
    seed=Seed.NOCLOUD,
)
BOTH = replace(DISK, id="b", name="debian", kernel=FILES["kernel"], cmdline="root=/dev/vda1")
STORE = Path("/images/store/x")


def spec(**values: Any) -> VMSpec:
    return VMSpec(**{"name": "a", "image": "tiny", **values})


def record(made: VMSpec) -> Record:
    return Record(id=ID, created_at=0.0, spec=made, image_id="k", memory_mib=128)


def host(*, kvm: bool, tcg: bool = True) -> Capabilities:
    return Capabilities(
        driver="qemu",
        version="7.2.22",
        accelerators=(
            Accelerator(name="kvm", available=kvm, reason="proved" if kvm else "no vmx"),
            Accelerator(name="tcg", available=tcg, reason="always" if tcg else "no QEMU"),
        ),
        modes=("pvh", "hvm"),
    )


class TestAccelerator:
    def test_kvm_is_taken_where_it_works_and_emulation_elsewhere(self) -> None:
        assert choose_accelerator(spec(), host(kvm=True)).name == "kvm"
        assert choose_accelerator(spec(), host(kvm=False)).name == "tcg"
        assert choose_accelerator(spec(hypervisor=Hypervisor.TCG), host(kvm=True)).name == "tcg"

    def test_kvm_that_does_not_work_is_refused_with_the_reason(self) -> None:
        with pytest.raises(Unsupported, match="kvm does not work here: no vmx") as caught:
            choose_accelerator(spec(hypervisor=Hypervisor.KVM), host(kvm=False))
        assert caught.value.hint == "use hypervisor: auto"

    def test_xen_is_refused(self) -> None:
        with pytest.raises(Unsupported, match="xen"):
            choose_accelerator(spec(hypervisor=Hypervisor.XEN), host(kvm=True))

    def test_nothing_at_all(self) -> None:
        with pytest.raises(Unsupported, match="no hypervisor works here: no vmx"):
            choose_accelerator(spec(), host(kvm=False, tcg=False))

    @pytest.mark.parametrize(("kvm", "reason"), [(True, "proved"), (False, "kvm does not work here: no vmx")])
    def test_the_choice_is_explained(self, kvm: bool, reason: str) -> None:
        capabilities = host(kvm=kvm)
        assert explain_choice(choose_accelerator(spec(), capabilities), capabilities) == reason


class TestMode:
    @pytest.mark.parametrize(
        ("image", "asked", "expected"),
        [
            (KERNEL, Mode.AUTO, Mode.PVH),
            (KERNEL, Mode.PVH, Mode.PVH),
            (DISK, Mode.AUTO, Mode.HVM),
            (DISK, Mode.HVM, Mode.HVM),
            (BOTH, Mode.AUTO, Mode.HVM),
            (BOTH, Mode.PVH, Mode.PVH),
            (BOTH, Mode.HVM, Mode.HVM),
        ],
    )
    def test_what_the_image_can(self, image: Image, asked: Mode, expected: Mode) -> None:
        assert choose_mode(spec(mode=asked), image) is expected

    @pytest.mark.parametrize(
        ("image", "asked", "problem"),
        [
            (KERNEL, Mode.HVM, "image 'tiny' has no disk"),
            (DISK, Mode.PVH, "image 'cloud' has no kernel"),
            (BOTH, Mode.PV, "need Xen"),
        ],
    )
    def test_what_it_cant(self, image: Image, asked: Mode, problem: str) -> None:
        with pytest.raises(InvalidInput, match=problem) as caught:
            choose_mode(spec(mode=asked), image)
        assert caught.value.field == "mode"
        assert caught.value.hint

    @pytest.mark.parametrize(
        ("firmware", "asked", "expected"),
        [
            (("bios", "uefi"), Firmware.AUTO, Firmware.BIOS),
            (("bios",), Firmware.AUTO, Firmware.BIOS),
            (("uefi",), Firmware.AUTO, Firmware.UEFI),
            ((), Firmware.AUTO, Firmware.BIOS),
            (("bios", "uefi"), Firmware.UEFI, Firmware.UEFI),
            (("bios", "uefi"), Firmware.BIOS, Firmware.BIOS),
        ],
    )
    def test_firmware(self, firmware: tuple[str, ...], asked: Firmware, expected: Firmware) -> None:
        assert choose_firmware(spec(firmware=asked), replace(DISK, firmware=firmware), Mode.HVM) is expected

    def test_a_kernel_booted_directly_has_no_firmware(self) -> None:
        assert choose_firmware(spec(), KERNEL, Mode.PVH) is Firmware.AUTO
        with pytest.raises(InvalidInput, match="firmware: 'uefi': mode pvh boots without firmware"):
            choose_firmware(spec(firmware=Firmware.UEFI), KERNEL, Mode.PVH)


class TestDisks:
    @pytest.mark.parametrize(
        ("image", "count", "fits"), [(KERNEL, 4, True), (KERNEL, 5, False), (DISK, 3, True), (DISK, 4, False)]
    )
    def test_emulated_controllers_have_four_places(self, image: Image, count: int, fits: bool) -> None:
        wanted = spec(devices=DeviceModel.EMULATED, disks=(Disk(),) * count)
        if fits:
            check_devices(wanted, image)
        else:
            with pytest.raises(InvalidInput, match="too many for emulated IDE"):
                check_devices(wanted, image)
        check_devices(replace(wanted, devices=DeviceModel.PARAVIRTUAL), image)

    def test_the_first_disk_holds_the_image(self) -> None:
        check_disk_sizes(spec(disks=(Disk(size_gib=3), Disk(size_gib=1))), DISK)
        check_disk_sizes(spec(disks=(Disk(),)), DISK)
        check_disk_sizes(spec(disks=(Disk(size_gib=1),)), KERNEL)
        with pytest.raises(InvalidInput, match=r"disks\[0\].size_gib: 2: is less than image 'cloud' holds") as caught:
            check_disk_sizes(spec(disks=(Disk(size_gib=2),)), DISK)
        assert caught.value.hint == "ask for 3 or more"

    def test_the_image_lies_under_the_first_disk_alone(self) -> None:
        boot = build_boot(record(spec(nics=(), disks=(Disk(), Disk()))), DISK, STORE, "tcg")
        assert [(str(d.path), d.backing) for d in boot.disks] == [
            ("disks/disk0.qcow2", STORE / "disk.qcow2"),
            ("disks/disk1.qcow2", None),
        ]
        assert len(build_boot(record(spec(nics=())), DISK, STORE, "tcg").disks) == 1
        assert build_boot(record(spec(nics=())), KERNEL, STORE, "tcg").disks == ()


class TestBoot:
    def test_direct_boot_takes_the_seeded_initrd_and_both_command_lines(self) -> None:
        boot = build_boot(record(spec(nics=(), cmdline="debug")), KERNEL, STORE, "tcg")
        assert (boot.kernel, boot.initrd, boot.cmdline) == (STORE / "kernel", Path("disks/initrd"), "quiet debug")
        assert (boot.seed, boot.uefi_vars, boot.mode) == (None, None, Mode.PVH)

    def test_firmware_boot_leaves_the_kernel_to_the_guest(self) -> None:
        boot = build_boot(record(spec(nics=(), firmware=Firmware.UEFI, cmdline="debug")), BOTH, STORE, "kvm")
        assert (boot.kernel, boot.initrd, boot.cmdline) == (None, None, "")
        assert (boot.seed, boot.uefi_vars) == (Path("disks/seed.iso"), Path("disks/uefi-vars.fd"))

    def test_a_way_to_ssh_is_added_to_the_first_card_on_a_user_network(self) -> None:
        nics = (Nic(network="none"), Nic(), Nic(forwards=(":80",)))
        cards = build_boot(record(spec(nics=nics)), KERNEL, STORE, "tcg").nics
        assert [[f.guest_port for f in card.forwards] for card in cards] == [[], [22], [80]]

    def test_ports_differ_between_cards(self) -> None:
        nics = (Nic(forwards=(":80", ":22")), Nic(forwards=(":80",)))
        last = Launch(
            started_at=0.0,
            boot_id="",
            hypervisor="tcg",
            reason="",
            version="",
            mode="pvh",
            argv=(),
            forwards=(Forward(host_port=free_port(), guest_port=80),),
        )
        cards = build_boot(record(spec(nics=nics)), KERNEL, STORE, "tcg", last).nics
        ports = [f.host_port for card in cards for f in card.forwards]
        assert len(set(ports)) == 3
        assert ports[0] == last.forwards[0].host_port

    def test_one_port_for_two_cards_is_refused(self) -> None:
        port = free_port()
        nics = (Nic(forwards=(f"{port}:80",)), Nic(forwards=(f"{port}:81",)))
        with pytest.raises(InvalidInput, match=f"port {port} .* is asked for twice"):
            build_boot(record(spec(nics=nics)), KERNEL, STORE, "tcg")


@given(st.uuids(), st.integers(0, 7))
def test_a_derived_address_is_stable_unicast_and_local(vm: object, index: int) -> None:
    mac = derived_mac(str(vm), index)
    first = int(mac.split(":")[0], 16)
    assert first & 1 == 0
    assert first & 2 == 2
    assert mac == derived_mac(str(vm), index) != derived_mac(str(vm), index + 1)
    assert Nic(mac=mac).mac == mac


def test_the_address_of_a_machine_never_changes_between_versions() -> None:
    assert derived_mac(ID, 0) == "52:54:00:5e:20:87"


class TestPrivateNetworks:
    def groups(self, place: str, *networks: str) -> list[str | None]:
        nics = tuple(Nic(network=network) for network in networks)
        return [card.group for card in build_boot(record(spec(nics=nics)), KERNEL, STORE, "tcg", place=place).nics]

    def test_cards_of_one_network_meet_and_others_do_not(self) -> None:
        first, second, third, user = self.groups("/home", "private:a", "private:a", "private:b", "user")
        assert first == second != third
        assert user is None
        assert self.groups("/other", "private:a") != [first], "each home has networks of its own"

    def test_frames_go_to_a_group_that_no_router_lets_out(self) -> None:
        group, _, port = str(self.groups("/home", "private:a")[0]).partition(":")
        assert ip_address(group) in ip_network("239.192.0.0/14")
        assert 20000 <= int(port) < 32000


class TestNested:
    def capabilities(self, **missing: str) -> Capabilities:
        kvm, tcg = (Accelerator(name=name, available=True, reason="works") for name in ("kvm", "tcg"))
        return Capabilities(
            driver="qemu",
            version="7.2",
            accelerators=(kvm, tcg),
            modes=(),
            missing={k.replace("_", "-"): v for k, v in missing.items()},
        )

    def test_kvm_runs_it_where_it_nests(self) -> None:
        assert choose_accelerator(spec(cpu="nested"), self.capabilities()).name == "kvm"

    def test_emulation_runs_it_elsewhere(self) -> None:
        assert choose_accelerator(spec(cpu="nested"), self.capabilities(nested_kvm="is off")).name == "tcg"
        assert choose_accelerator(spec(), self.capabilities(nested_kvm="is off")).name == "kvm"

    def test_whoever_wants_kvm_hears_the_reason(self) -> None:
        with pytest.raises(Unsupported, match="is off"):
            choose_accelerator(spec(cpu="nested", hypervisor=Hypervisor.KVM), self.capabilities(nested_kvm="is off"))
