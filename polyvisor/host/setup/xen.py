"""Xen's own part of setting up a host: dom0's share, what GRUB is told, and the daemons.

Debian's Xen reads XEN_OVERRIDE_GRUB_DEFAULT in its /etc/default/grub.d/xen.cfg: 1 boots Xen, 0 leaves GRUB's default alone, and
without it Xen is booted with a warning. GRUB's 20_linux_xen reads the GRUB_CMDLINE_XEN* variables; Xen's own options are in
https://xenbits.xenproject.org/docs/unstable/misc/xen-command-line.html.
"""

from __future__ import annotations

import re

from polyvisor.host.setup import grub
from polyvisor.host.setup.facts import Facts
from polyvisor.host.setup.grub import DROP_IN, Grub
from polyvisor.status import FileChange, SetupStep, StepState

MIN_HOST_MIB = 2000  # of a machine with 2 GiB the kernel counts a little less
MIN_DOM0_MIB = 512
_MAX_USUAL_MIB = 8192
_VARIABLES = ("GRUB_CMDLINE_XEN", "GRUB_CMDLINE_XEN_DEFAULT")
# Linux's command line, and what follows GRUB_CMDLINE_LINUX_XEN_REPLACE in the name of what replaces it under Xen.
_LINUX = {"GRUB_CMDLINE_LINUX": "", "GRUB_CMDLINE_LINUX_DEFAULT": "_DEFAULT"}
_HEADER = "# Written by: polyvisor host prepare"
_SERIAL = re.compile(r"\bconsole=ttyS([01])(?:,(\d+)\w*)?(?=\s|$)")


def usual_memory_mib(total_mib: int) -> int:
    """Memory of a dom0: 1 GiB and a twentieth of the machine's, at most 8 GiB and half of the machine; a multiple of 16 MiB.

    Citrix Hypervisor takes the same, but for the half (docs.citrix.com, "Memory usage").
    """
    return min(1024 + total_mib // 20, _MAX_USUAL_MIB, total_mib // 2) // 16 * 16


def usual_vcpus(cpus: int) -> int:
    """vCPUs of a dom0: all CPUs of a small machine, a quarter of a large one's, from 4 to 16."""
    return min(cpus, max(4, min(16, cpus // 4)))


def dom0_of(text: str) -> tuple[int | None, int | None]:
    """Memory in MiB and vCPUs of dom0 in settings, or a command line, of ours; None for what does not stand there."""
    memory = re.search(r"\bdom0_mem=(\d+)M\b", text)
    vcpus = re.search(r"\bdom0_max_vcpus=(\d+)\b", text)
    return (int(memory[1]) if memory else None), (int(vcpus[1]) if vcpus else None)


def settings_step(found: Grub, memory_mib: int, vcpus: int, asked: int | None) -> SetupStep:
    """The step that tells GRUB to boot Xen; `asked` is set where the user says how large dom0 is to be."""
    if found.drop_in is not None and not found.drop_in.startswith(_HEADER):
        return _blocked(f"{DROP_IN} is not Polyvisor's: move it away")
    elsewhere = _other_dom0(found)
    if elsewhere and asked:
        return _blocked(f"dom0's share is set in {elsewhere} already: change it there, or take it out")
    if later := _later(found):
        return _blocked(f"{later} takes away what {DROP_IN} says: put its GRUB_CMDLINE_XEN into {grub.SETTINGS}")
    text = drop_in(found, memory_mib, vcpus)
    share = f"dom0 as {elsewhere} has it" if elsewhere else f"dom0 with {memory_mib} MiB and {vcpus} vCPUs"
    if found.drop_in == text:
        return SetupStep(name="settings", state=StepState.DONE, found=f"{DROP_IN}: Xen by default, {share}")
    # Kept before the packages are there: they make a new menu themselves.
    backup = () if found.boots_xen() else (("cp", "-p", grub.CONFIG, grub.BACKUP),)
    return SetupStep(
        name="settings",
        state=StepState.TODO,
        found=f"{DROP_IN} is {'of another time' if found.drop_in is not None else 'not there'}",
        why=f"Xen by default, {share}: a fixed share, so that guests can't take it away. No file of others is changed; to go "
        "back: polyvisor host prepare xen --undo",
        files=(FileChange(path=DROP_IN, content=text),),
        commands=backup,
    )


def linux_settings_step(found: Grub, installed: bool) -> SetupStep:
    """The step that tells GRUB to boot Linux without Xen, which Debian's packages of Xen would boot otherwise."""
    if found.drop_in is not None and not found.drop_in.startswith(_HEADER):
        return _blocked(f"{DROP_IN} is not Polyvisor's: move it away")
    text = f"{_HEADER}. Xen is installed and not booted.\nXEN_OVERRIDE_GRUB_DEFAULT=0\n" if installed else None
    if found.drop_in == text:
        told = "Linux without Xen" if installed else "not there"
        return SetupStep(name="settings", state=StepState.DONE, found=f"{DROP_IN}: {told}")
    return SetupStep(
        name="settings",
        state=StepState.TODO,
        found=f"{DROP_IN} {'is not there' if found.drop_in is None else 'says to boot Xen'}",
        why="packages of Xen stay, and would be booted by default; to be rid of them: apt-get purge xen-system-amd64 "
        "xen-hypervisor-common, then apt-get autoremove",
        files=(FileChange(path=DROP_IN, content=text),),
    )


def drop_in(found: Grub, memory_mib: int, vcpus: int) -> str:
    """What our file of settings says. A serial console of Linux becomes Xen's, which shares it with dom0."""
    lines = [f"{_HEADER} xen. To go back: polyvisor host prepare xen --undo", "XEN_OVERRIDE_GRUB_DEFAULT=1"]
    if found.setting("GRUB_TIMEOUT") == "0" or found.setting("GRUB_TIMEOUT_STYLE") in ("hidden", "countdown"):
        lines += [
            "# A way back at the machine's console, should Xen not boot.",
            "GRUB_TIMEOUT_STYLE=menu",
            "GRUB_TIMEOUT=5",
        ]
    if words := _words(found, memory_mib, vcpus):
        lines.append(f'GRUB_CMDLINE_XEN="${{GRUB_CMDLINE_XEN:+$GRUB_CMDLINE_XEN }}{" ".join(words)}"')
    if port := _serial(found):
        for linux, suffix in _LINUX.items():
            if f"console=ttyS{port[0]}" in found.setting(linux):
                replaced = f"sed 's/console=ttyS{port[0]}[^ ]*/console=hvc0/'"
                lines.append(f'GRUB_CMDLINE_LINUX_XEN_REPLACE{suffix}="$(echo "${linux}" | {replaced})"')
    return "\n".join(lines) + "\n"


def wanted_words(found: Grub, memory_mib: int, vcpus: int) -> set[str]:
    """What has to stand on Xen's command line once our settings are at work."""
    return set(_words(found, memory_mib, vcpus))


def _words(found: Grub, memory_mib: int, vcpus: int) -> list[str]:
    dom0 = [] if _other_dom0(found) else [f"dom0_mem={memory_mib}M,max:{memory_mib}M", f"dom0_max_vcpus={vcpus}"]
    port = _serial(found)
    return dom0 + ([f"com{port[0] + 1}={port[1]},8n1", f"console=com{port[0] + 1},vga"] if port else [])


def _serial(found: Grub) -> tuple[int, int] | None:
    """Port and speed of Linux's serial console; None where it has none, or Xen is told of one already."""
    if any(re.search(r"\bcom[12]=", found.setting(name)) for name in _VARIABLES):
        return None
    words = " ".join(found.setting(name) for name in _LINUX)
    match = _SERIAL.search(words)
    return (int(match[1]), int(match[2] or 9600)) if match else None


def _other_dom0(found: Grub) -> str | None:
    """The file of somebody else's settings that says how much memory dom0 has."""
    of_them = (path for path, values in found.files if any("dom0_mem=" in values.get(name, "") for name in _VARIABLES))
    return next(of_them, None)


def _later(found: Grub) -> str | None:
    """A file that is read after ours and sets GRUB_CMDLINE_XEN to something else."""
    return next((path for path, values in found.files if path > DROP_IN and "GRUB_CMDLINE_XEN" in values), None)


def _blocked(found: str) -> SetupStep:
    return SetupStep(name="settings", state=StepState.BLOCKED, found=found)


def daemon_steps(facts: Facts) -> tuple[SetupStep, SetupStep]:
    """Debian's unit `xen` starts xenstored and xenconsoled in a dom0; `xendomains` saves and restores domains by itself."""
    enabled = facts.unit("xen.service") == "enabled"
    daemons = SetupStep(
        name="daemons",
        state=StepState.DONE if enabled else StepState.TODO,
        found=f"xen.service, which starts xenstored and xenconsoled, is {facts.unit('xen.service') or 'not there yet'}",
        why="" if enabled else "xl needs both; they start with the machine",
        commands=() if enabled else (("systemctl", "enable", "xen.service"),),
    )
    return daemons, _domains(facts)


def _domains(facts: Facts) -> SetupStep:
    state = facts.unit("xendomains.service")
    why = (
        "it saves every domain when the machine goes down, and restores it at the next boot. Polyvisor's VMs would then run "
        "behind its back, and twice if they are started"
    )
    if state == "disabled":
        return SetupStep(name="xendomains", state=StepState.DONE, found="xendomains.service is disabled")
    command = (("systemctl", "disable", "xendomains.service"),)
    if facts.domains:
        found = f"/etc/xen/auto has domains of others ({', '.join(facts.domains)}), which xendomains.service starts"
        return SetupStep(name="xendomains", state=StepState.BY_HAND, found=found, why=why, commands=command)
    found = f"xendomains.service is {state or 'not there yet'}"
    return SetupStep(name="xendomains", state=StepState.TODO, found=found, why=why, commands=command)
