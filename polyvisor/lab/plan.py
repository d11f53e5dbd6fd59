"""What the lab consists of: names, addresses and specs of its hosts. Pure functions.

The hosts of a lab are VMs that run VMs (`cpu: nested`), with two cards: one on a user network, by which SSH comes in and
packages are fetched; one on a private network, on which they reach each other under their names.
"""

from __future__ import annotations

import json
from enum import StrEnum

from polyvisor.errors import InvalidInput
from polyvisor.spec.vm import NESTED, Nic, VMSpec
from polyvisor.values import dataclass

LABEL = "polyvisor.lab"
NETWORK = "private:lab"
MAX_HOSTS = 9
VCPUS = 2
# Before QEMU 8.1 a vCPU may go on with a stale translation of code that another one patches meanwhile, as Linux does with that
# of KVM whenever a guest starts or ends: the host hangs then, sooner or later (docs/design/lab.md).
PATCHED_SAFELY = (8, 1)
SUITES = ("bookworm", "trixie")
_PREFIX = 16


class Kind(StrEnum):
    """What a host of the lab runs."""

    KVM = "kvm"
    XEN = "xen"


@dataclass(frozen=True, kw_only=True)
class LabHost:
    """One host of the lab; `number` counts from 1 within its kind."""

    kind: Kind
    number: int

    @property
    def name(self) -> str:
        return f"lab-{self.kind}{self.number}"

    @property
    def address(self) -> str:
        """Its address on the lab's network."""
        return f"10.77.{_KINDS.index(self.kind) + 1}.{self.number}"

    @property
    def mac(self) -> str:
        """Of its card on the lab's network."""
        return f"52:54:00:77:{_KINDS.index(self.kind) + 1:02x}:{self.number:02x}"


_KINDS = tuple(Kind)


def parse_host(text: str) -> LabHost:
    """The host that `lab-kvm1`, or `kvm1` for short, names; raises InvalidInput."""
    for kind in Kind:
        number = text.removeprefix("lab-").removeprefix(kind.value)
        if text in (f"{kind}{number}", f"lab-{kind}{number}") and number in map(str, range(1, MAX_HOSTS + 1)):
            return LabHost(kind=kind, number=int(number))
    problem = "is no name of a host of the lab"
    raise InvalidInput("host", text, problem, hint=f"lab-kvm1 … lab-kvm{MAX_HOSTS}, or lab-xen1 … lab-xen{MAX_HOSTS}")


# Emulated hosts can be saved while none of their vCPUs executes a guest. So guests are stopped before, and go on afterwards;
# those that somebody had paused stay so.
_FROZEN = "/run/polyvisor-frozen"
_FREEZE = {
    Kind.KVM: "pkill -STOP -f '[q]emu-system' || true",
    Kind.XEN: f"""xl list | awk 'NR > 2 && $5 !~ /p/ {{ print $2 }}' > {_FROZEN}
while read -r domain; do xl pause "$domain"; done < {_FROZEN}""",
}
_THAW = {
    Kind.KVM: "pkill -CONT -f '[q]emu-system' || true",
    Kind.XEN: f"""[ -e {_FROZEN} ] || exit 0
while read -r domain; do xl unpause "$domain"; done < {_FROZEN}
rm {_FROZEN}""",
}


def freeze_script(kind: Kind) -> str:
    """What stops the guests of a host, for its shell."""
    return _FREEZE[kind]


def thaw_script(kind: Kind, now_s: float) -> str:
    """What sets a host's clock to `now_s` (seconds since the epoch), and lets guests that were stopped go on.

    A host that was saved still has the time of that moment.
    """
    return f"date --utc --set @{now_s:.3f} >/dev/null\n{_THAW[kind]}"


def lab_hosts(kvm: int, xen: int) -> list[LabHost]:
    """So many hosts of each kind; raises InvalidInput for none at all, or too many."""
    counts = {Kind.KVM: kvm, Kind.XEN: xen}
    for kind, count in counts.items():
        if not 0 <= count <= MAX_HOSTS:
            raise InvalidInput(kind.value, count, "is out of range", hint=f"use 0 to {MAX_HOSTS}")
    if not kvm and not xen:
        raise InvalidInput("kvm", 0, "and xen: 0 leave the lab without a host", hint="ask for one at least")
    return [LabHost(kind=kind, number=number + 1) for kind, count in counts.items() for number in range(count)]


def image_name(kind: Kind, suite: str) -> str:
    """The image of a host; raises InvalidInput for a suite that can't be built."""
    if suite not in SUITES:
        raise InvalidInput("suite", suite, "is not known", hint=f"use {' or '.join(SUITES)}")
    return f"lab-{kind}" + ("" if suite == SUITES[0] else "-13")


def default_vcpus(kind: Kind, accelerator: str, qemu: tuple[int, ...]) -> int:
    """How many vCPUs a host gets where `accelerator` of a QEMU of version `qemu` runs it: one where two would not be safe."""
    return 1 if kind is Kind.KVM and accelerator == "tcg" and qemu < PATCHED_SAFELY else VCPUS


def lab_spec(host: LabHost, suite: str | None, vcpus: int, memory_mib: int | None) -> VMSpec:
    """The VM that is `host`; None stands for the first suite, and for what the image recommends."""
    return VMSpec(
        name=host.name,
        image=image_name(host.kind, suite or SUITES[0]),
        vcpus=vcpus,
        memory_mib=memory_mib,
        cpu=NESTED,
        nics=(Nic(), Nic(network=NETWORK, mac=host.mac)),
        user_data=user_data(host),
        labels={LABEL: host.kind.value},
    )


def user_data(host: LabHost) -> str:
    """A cloud-config that gives a host its address on the lab's network, and every host its name."""
    network = f"[Match]\nMACAddress={host.mac}\n\n[Network]\nAddress={host.address}/{_PREFIX}\nIPv6AcceptRA=no\n"
    config = {
        "write_files": [
            {"path": "/etc/systemd/network/20-lab.network", "content": network},
            {"path": "/etc/hosts", "content": _names(), "append": True},
        ],
        # D-Bus, which networkctl needs, is not there yet at this stage.
        "bootcmd": [["systemctl", "restart", "--no-block", "systemd-networkd"]],
    }
    return "#cloud-config\n" + json.dumps(config, indent=1) + "\n"


def _names() -> str:
    every = (LabHost(kind=kind, number=number) for kind in _KINDS for number in range(1, MAX_HOSTS + 1))
    return "".join(f"{host.address} {host.name}\n" for host in every)
