"""The arguments of a QEMU that waits for a guest: one to be restored, one that takes a copy of memory, a fork of that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from polyvisor.drivers.base import Boot, BootDisk, BootNic, Fork
from polyvisor.drivers.qemu.argv import build_argv
from polyvisor.drivers.qemu.incoming import Machine, fork_argv, memory_argv, parsed, restoring_argv, template_argv
from polyvisor.drivers.qemu.programs import Qemu
from polyvisor.spec.forward import Forward
from tests.golden.boots import BOOTS, DEBIAN, QEMU, TINY, UEFI_CODE

MACHINE = Machine(type="pc-i440fx-7.2", vcpus=1)
MEMORY = 7
GIB = 1 << 30
WAITING = ["-S", "-incoming", "defer"]
BACKEND = "memory-backend-file,id=pc.ram,size=128M,mem-path=/proc/self/fd/7"
EXACT = "x-use-canonical-path-for-ramblock-id=off"
OWN_MEMORY = f"-object memory-backend-memfd,id=pc.ram,size=128M,share=on,{EXACT}"
OTHER_SSH = Forward(host_port=50001, guest_port=22)
FORK = Fork(
    name="copy",
    id="00000000-0000-4000-8000-000000000001",
    nics=(BootNic(mac="52:54:00:00:00:99", network="user", forwards=(OTHER_SSH,)),),
)
DISKS = (BootDisk(path=Path("disks/disk0-1.qcow2"), layers=(Path("/layers/a/disk.qcow2"),), backing=Path("/image")),)
UEFI = BOOTS["debian-uefi-tcg-emulated"]
PRIVATE = BootNic(mac="52:54:00:00:00:98", network="private:lab", group="239.192.1.2:20345", number=1)


def started(boot: Boot) -> list[str]:
    return build_argv(QEMU, boot, UEFI_CODE)


def sizes(argv: Sequence[str]) -> dict[str, int]:
    """Each disk's size: the first one's is a GiB, the next one's two, and so on."""
    nodes = [json.loads(value)["node-name"] for value in values(argv, "-blockdev")]
    return {node: i * GIB for i, node in enumerate(nodes, 1)}


def template(boot: Boot) -> list[str]:
    argv = started(boot)
    return template_argv(argv, MACHINE, MEMORY, sizes(argv))


def fork(argv: Sequence[str], wanted: Fork = FORK) -> list[str]:
    return fork_argv(argv, MACHINE, MEMORY, wanted)


def values(argv: Sequence[str], option: str) -> list[str]:
    return [value or "" for name, value in parsed(argv)[1] if name == option]


def differences(before: Sequence[str], after: Sequence[str]) -> tuple[set[str], set[str]]:
    """What has gone and what has come, as options with their values."""

    def words(argv: Sequence[str]) -> Iterator[str]:
        return (f"{option} {value}" if value else option for option, value in parsed(argv)[1])

    return set(words(before)) - set(words(after)), set(words(after)) - set(words(before))


class TestTemplate:
    def test_what_differs_from_the_guest_s_own(self) -> None:
        gone, come = differences(started(TINY), template(TINY))
        assert gone == {
            OWN_MEMORY,
            "-machine pc,usb=off,vmport=off,dump-guest-core=off",
            "-chardev socket,id=qmp,path=run/qmp.sock,server=on,wait=off",
            "-chardev socket,id=observe,path=run/observe.sock,server=on,wait=off",
            "-mon chardev=observe,mode=control",
            "-pidfile run/qemu.pid",
            "-chardev socket,id=console,path=run/console.sock,server=on,wait=off,logfile=run/console.log,logappend=on",
            "-chardev pipe,id=agent,path=run/agent",
            "-netdev user,id=nic0,hostfwd=tcp:127.0.0.1:40001-:22",
        }
        assert come == {
            "-machine pc-i440fx-7.2,usb=off,vmport=off,dump-guest-core=off",
            "-chardev socket,id=qmp,path=run/template.sock,server=on,wait=off",
            "-chardev null,id=console",
            "-chardev null,id=agent",
            "-netdev user,id=nic0",
            f"-object {BACKEND},share=on,{EXACT}",
            "-S",
            "-incoming defer",
        }

    @pytest.mark.parametrize("boot", BOOTS.values(), ids=BOOTS)
    def test_none_leads_anywhere(self, boot: Boot) -> None:
        """No file of the VM but the kernel, no port of the host, no socket but its own monitor."""
        argv = template(boot)
        assert argv[-3:] == WAITING
        assert [json.loads(value)["driver"] for value in values(argv, "-blockdev")] == ["null-co"] * len(
            values(argv, "-blockdev")
        )
        assert not [word for word in values(argv, "-netdev") if "hostfwd" in word]
        sockets = [value for value in values(argv, "-chardev") if value.startswith(("socket", "pipe", "file"))]
        assert sockets == ["socket,id=qmp,path=run/template.sock,server=on,wait=off"]
        assert values(argv, "-sandbox") == values(started(boot), "-sandbox")

    @pytest.mark.parametrize("boot", BOOTS.values(), ids=BOOTS)
    def test_devices_are_those_of_the_guest(self, boot: Boot) -> None:
        """A device that is missing, or at another place, would refuse what it is sent."""
        assert values(template(boot), "-device") == values(started(boot), "-device")
        assert values(template(boot), "-serial") == values(started(boot), "-serial")

    def test_disks_are_empty_and_as_large(self) -> None:
        code, variables, disk, seed = (json.loads(value) for value in values(template(UEFI), "-blockdev"))
        assert code == {
            **{"node-name": "uefi-code", "driver": "null-co", "size": GIB},
            **{"read-zeroes": True, "read-only": True},
        }
        assert (variables["node-name"], variables["read-only"]) == ("uefi-vars", False)
        assert (disk["node-name"], disk["size"], disk["read-only"]) == ("disk0", 3 * GIB, False)
        assert (seed["node-name"], seed["size"], seed["read-only"]) == ("seed", 4 * GIB, True)

    def test_firmware_keeps_its_place(self) -> None:
        machines = values(template_argv(started(UEFI), MACHINE, MEMORY, sizes(started(UEFI))), "-machine")
        assert machines == [
            "pc-i440fx-7.2,usb=off,vmport=off,dump-guest-core=off",
            "pflash0=uefi-code,pflash1=uefi-vars",
            "memory-backend=pc.ram",
        ]

    def test_a_private_network_keeps_its_kind(self) -> None:
        _, network = values(template(BOOTS["nested-tcg"]), "-netdev")
        assert network.startswith("socket,id=nic1,mcast=239.192.1.2:20345")

    def test_a_second_user_network_keeps_its_subnet(self) -> None:
        assert values(template(BOOTS["several-cards"]), "-netdev") == [
            "user,id=nic1,net=10.0.3.0/24",
            "user,id=nic2,net=10.0.4.0/24",
        ]


class TestFork:
    def test_what_differs_from_the_source_s(self) -> None:
        gone, come = differences(started(TINY), fork(started(TINY)))
        assert gone == {
            "-name guest=web-1,process=web-1",
            "-uuid 6f4d0a54-1f0a-4b5e-9d0e-2b7f6a1c9e11",
            "-machine pc,usb=off,vmport=off,dump-guest-core=off",
            "-accel tcg,thread=multi,tb-size=32",
            OWN_MEMORY,
            "-netdev user,id=nic0,hostfwd=tcp:127.0.0.1:40001-:22",
        }
        assert come == {
            "-name guest=copy,process=copy",
            "-uuid 00000000-0000-4000-8000-000000000001",
            "-machine pc-i440fx-7.2,usb=off,vmport=off,dump-guest-core=off",
            "-accel tcg,thread=multi,tb-size=16",
            "-netdev user,id=nic0,hostfwd=tcp:127.0.0.1:50001-:22",
            f"-object {BACKEND},share=off,{EXACT}",
            "-S",
            "-incoming defer",
        }

    def test_its_own_address_where_others_see_it(self) -> None:
        """After a reset a card has the address of these words; a user network knows its guest by the source's."""
        cards = ("virtio-net-pci,mac=52:54:00:aa:aa:aa,id=nic0-dev,romfile=", "e1000,mac=52:54:00:bb:bb:bb,id=nic1-dev")
        argv = [
            "q",
            "-m",
            "size=1M",
            "-smp",
            "cpus=1,sockets=1,cores=1,threads=1",
            *(word for card in cards for word in ("-device", card)),
        ]
        own = fork_argv(argv, MACHINE, 7, replace(FORK, nics=(FORK.nics[0], PRIVATE)))
        assert values(own, "-device") == [cards[0], f"e1000,mac={PRIVATE.mac},id=nic1-dev"]

    def test_a_crowd_keeps_less_translated_code(self) -> None:
        many = fork_argv(started(TINY), MACHINE, 7, replace(FORK, together=100))
        assert values(many, "-accel") == ["tcg,thread=multi,tb-size=8"]

    def test_a_fork_with_room_for_vcpus_has_room_for_their_code(self) -> None:
        source = started(replace(TINY, vcpus=1, vcpus_max=2))
        assert values(source, "-accel") == ["tcg,thread=multi,tb-size=256"]
        for now, size in ((None, 256), (1, 256), (2, 16)):
            assert values(fork_argv(source, replace(MACHINE, vcpus=now), 7, FORK), "-accel")[0].endswith(f"={size}")

    def test_its_memory_is_private(self) -> None:
        assert memory_argv(started(TINY), 3, share=False)[1].split(",")[-2:] == ["share=off", EXACT]
        assert memory_argv(started(TINY), 3, share=True)[1].split(",")[-2:] == ["share=on", EXACT]

    def test_what_it_boots_by_is_shared_and_its_seed_its_own(self) -> None:
        own = replace(FORK, kernel=Path("/i/vmlinux"), initrd=Path("/i/initrd"), seed=Path("disks/seed.cpio"))
        argv = fork(started(TINY), own)
        assert (values(argv, "-kernel"), values(argv, "-initrd")) == (["/i/vmlinux"], ["/i/initrd"])
        assert values(argv, "-append") == values(started(TINY), "-append")
        assert values(argv, "-fw_cfg") == ["name=opt/polyvisor/seed,file=disks/seed.cpio"]
        assert fork(argv, own) == argv, "a fork's fork has one seed"
        assert values(fork(argv), "-fw_cfg") == []
        restored = restoring_argv(argv, MACHINE.type, FORK.nics)
        assert values(restored, "-fw_cfg") == values(argv, "-fw_cfg"), "its guest may reboot then too"

    def test_firmware_takes_no_kernel(self) -> None:
        argv = fork(started(UEFI), replace(FORK, disks=DISKS, kernel=Path("/i/vmlinux")))
        assert "/i/vmlinux" not in argv

    def test_its_disks_are_its_own(self) -> None:
        argv = fork(started(DEBIAN), replace(FORK, disks=DISKS))
        disk, seed = (json.loads(value) for value in values(argv, "-blockdev"))
        assert (disk["node-name"], disk["file"]["filename"]) == ("disk0-1", "disks/disk0-1.qcow2")
        assert disk["backing"]["file"]["filename"] == "/layers/a/disk.qcow2"
        assert disk["backing"]["backing"]["file"]["filename"] == "/image"
        assert seed["file"]["filename"] == "disks/seed.iso"
        assert "virtio-blk-pci,drive=disk0-1,id=disk0-dev,bootindex=1" in values(argv, "-device")

    def test_it_has_as_many_vcpus_as_the_guest_had(self) -> None:
        boot = replace(TINY, vcpus=1, vcpus_max=4)
        argv = fork_argv(started(boot), replace(MACHINE, vcpus=3), MEMORY, FORK)
        [before], [after] = values(started(boot), "-smp"), values(argv, "-smp")
        assert before.startswith("cpus=1,") and after.startswith("cpus=3,")
        assert before.split(",")[1:] == after.split(",")[1:]

    def test_networks_of_several_cards(self) -> None:
        nics = (FORK.nics[0], PRIVATE)
        argv = fork(started(BOOTS["nested-tcg"]), replace(FORK, nics=nics, disks=DISKS))
        assert values(argv, "-netdev") == [
            "user,id=nic0,hostfwd=tcp:127.0.0.1:50001-:22",
            "socket,id=nic1,mcast=239.192.1.2:20345,localaddr=127.0.0.1",
        ]

    def test_a_card_that_is_plugged_into_nothing(self) -> None:
        none, first, second = (
            BootNic(mac="m", network=network, number=i) for i, network in enumerate(("none", "user", "user"))
        )
        argv = fork(started(BOOTS["several-cards"]), replace(FORK, nics=(none, first, second)))
        assert values(argv, "-netdev") == ["user,id=nic1,net=10.0.3.0/24", "user,id=nic2,net=10.0.4.0/24"]

    def test_firmware_keeps_its_place(self) -> None:
        argv = fork(started(UEFI), replace(FORK, disks=DISKS))
        assert "pflash0=uefi-code,pflash1=uefi-vars" in values(argv, "-machine")
        variables = json.loads(values(argv, "-blockdev")[1])
        assert variables["file"]["filename"] == "disks/uefi-vars.fd"


class TestAgain:
    """A fork is a VM like any other: what waits for its memory has no trace of the memory that it began with."""

    def test_a_fork_that_is_restored(self) -> None:
        argv = restoring_argv(fork(started(TINY)), MACHINE.type, FORK.nics, MACHINE.vcpus)
        plain = restoring_argv(started(TINY), MACHINE.type, FORK.nics, MACHINE.vcpus)
        gone, come = differences(plain, argv)
        accel = "-accel tcg,thread=multi,tb-size="
        assert gone == {
            "-name guest=web-1,process=web-1",
            f"-uuid {TINY.id}",
            f"{accel}32",
            *(OWN_MEMORY, "-machine memory-backend=pc.ram"),
        }
        assert come == {"-name guest=copy,process=copy", f"-uuid {FORK.id}", f"{accel}16"}
        assert argv[-3:] == WAITING and argv.count("-S") == 1

    def test_a_fork_of_a_fork(self) -> None:
        second = fork_argv(fork(started(TINY)), MACHINE, 9, replace(FORK, name="third"))
        assert second == fork_argv(started(TINY), MACHINE, 9, replace(FORK, name="third"))
        assert "fd/7" not in " ".join(second)

    def test_the_template_of_a_fork(self) -> None:
        argv = template_argv(fork(started(TINY)), MACHINE, 9, {})
        assert len(values(argv, "-object")) == 1
        assert values(argv, "-machine")[1:] == ["memory-backend=pc.ram"]
        assert argv.count("-incoming") == 1

    def test_a_fork_of_what_was_restored(self) -> None:
        restored = restoring_argv(started(TINY), MACHINE.type, TINY.nics, 1)
        assert fork(restored) == fork(started(TINY))


@pytest.mark.parametrize(
    "cmdline",
    ["-S", "-incoming", "defer", "-object id=pc.ram", "-netdev", "user,id=nic0", "-blockdev", "memory-backend=pc.ram"],
)
def test_a_kernel_s_command_line_is_no_option(cmdline: str) -> None:
    """What the user wants the kernel to be told may look like a word of ours."""
    boot = replace(TINY, cmdline=cmdline)
    for argv in (fork(started(boot)), template(boot), restoring_argv(started(boot), MACHINE.type, TINY.nics)):
        assert values(argv, "-append") == [cmdline]
        assert argv[-3:] == WAITING
        assert [option for option, _ in pairwise(argv)].count("-netdev") == 1 + (cmdline == "-netdev")


def test_a_qemu_from_a_wheel(tmp_path: Path) -> None:
    """It is started through its own loader, whose words stand before QEMU's options."""
    binary = tmp_path / "bin" / "qemu"
    (tmp_path / "bin/lib/qemu").mkdir(parents=True)
    wheel = Qemu(str(binary), "9.0")
    packed = wheel.complete(started(TINY))
    argv = wheel.renewed(fork(packed))
    program, options = parsed(argv)
    assert list(program) == ["/usr/bin/env", f"QEMU_MODULE_DIR={tmp_path}/bin/lib/qemu", str(binary)]
    assert options[0] == ("-L", f"{tmp_path}/bin/share/qemu")
    assert ("-uuid", FORK.id) in options
    assert argv[-3:] == tuple(WAITING)
