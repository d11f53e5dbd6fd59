"""Where something was measured: the host, as it says itself, and whether it is real at all."""

from __future__ import annotations

from collections.abc import Mapping

from polyvisor.compare.machine import Shell
from polyvisor.compare.target import Kind, Target
from polyvisor.errors import PolyvisorError
from polyvisor.status import HostStatus

_QUESTION_S = 60.0
# One line for each fact, `key: value`; what a host does not know it leaves out.
_SCRIPT = r"""
say() { [ -n "$2" ] && printf '%s: %s\n' "$1" "$2"; }
first() { cat "$1" 2>/dev/null | head -n 1; }
say system "$( . /etc/os-release 2>/dev/null; echo "$PRETTY_NAME" )"
say kernel-build "$(uname -v)"
say clock "$(first /sys/devices/system/clocksource/clocksource0/current_clocksource)"
say governor "$(first /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor)"
say turbo-off "$(first /sys/devices/system/cpu/intel_pstate/no_turbo)"
say smt "$(first /sys/devices/system/cpu/smt/control)"
say load "$(cut -d ' ' -f 1-3 /proc/loadavg)"
say machine "$(first /sys/class/dmi/id/sys_vendor) $(first /sys/class/dmi/id/product_name)"
say virtual "$(systemd-detect-virt --vm 2>/dev/null)"
say hypervisor-below "$(grep -q -w hypervisor /proc/cpuinfo && echo yes || echo no)"
say microcode "$(sed -n 's/^microcode[^:]*: //p' /proc/cpuinfo | head -n 1)"
say command-line "$(first /proc/cmdline)"
for f in /sys/devices/system/cpu/vulnerabilities/*; do say "mitigation-${f##*/}" "$(first "$f")"; done
exit 0
"""


def described(host: HostStatus) -> dict[str, str]:
    """What `host` says of itself, as far as it bears on measurements; nothing that names the machine or its user."""
    drivers = [f"{each.driver} {each.version}" for each in host.capabilities if each.version]
    return {
        "cpu": host.cpu_model,
        "cpus": str(host.cpus),
        "memory": f"{host.memory_mib} MiB",
        "architecture": host.architecture,
        "kernel": host.kernel,
        "hypervisors": ", ".join(drivers) or "none",
    }


def parse_facts(text: str) -> dict[str, str]:
    """`key: value` lines."""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {key.strip(): value.strip() for key, colon, value in pairs if colon and value.strip()}


async def environment_of(host: HostStatus, shell: Shell) -> dict[str, str]:
    """All of it; a host whose shell answers not is described by what it says itself."""
    try:
        facts = parse_facts((await shell(_SCRIPT, _QUESTION_S)).stdout)
    except PolyvisorError as error:
        facts = {"unknown": error.message}
    return described(host) | facts


def is_emulated(target: Target, facts: Mapping[str, str]) -> bool:
    """Whether the figures of a target are those of an emulation: its own, or that of the machine that its host is."""
    if target.kind is Kind.TCG:
        return True
    machine, virtual = facts.get("machine", ""), facts.get("virtual", "")
    # systemd calls QEMU without KVM "qemu"; below Xen it sees Xen alone, and the machine says what that runs on.
    return virtual == "qemu" or (machine.startswith("QEMU") and virtual != "kvm")


def is_nested(facts: Mapping[str, str]) -> bool:
    """Whether the host is a virtual machine itself."""
    return facts.get("hypervisor-below") == "yes" or facts.get("virtual", "none") not in ("none", "")
