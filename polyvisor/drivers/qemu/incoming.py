"""The arguments of a QEMU that waits for a guest, made of those that the guest was last started with: pure functions.

Devices must be those of then, and so must the machine, under its versioned name (`pc` alone may be another one with every
version). What else differs depends on what the QEMU is for: to go on with a guest that was saved, to take a copy of a running
guest's memory (a template), or to be a fork that begins from such a copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from polyvisor.drivers.base import BootNic, Fork
from polyvisor.drivers.qemu.argv import CROWD, CROWD_BUFFER_MIB, FORK_BUFFER_MIB, QMP_SOCKET, RAM, SHARED_MEMORY, smp
from polyvisor.drivers.qemu.devices import netdev, with_disks
from polyvisor.values import dataclass

TEMPLATE_SOCKET = "run/template.sock"
# Where a guest finds its seed that was not appended to its initrd (qemu(1), -fw_cfg; images/data/tiny/init reads it).
SEED_FILE = "name=opt/polyvisor/seed,file="
_WAITING = ("-S", "-incoming", "defer")
_WAITED = (("-S", None), ("-incoming", "defer"))
_FLAGS = ("-S", "-no-user-config", "-nodefaults")  # those of ours that take no value
# Gives the option's new value, or None where it goes.
Change = Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a guest as it is, which a later one must be like.

    `type` is its versioned name, `vcpus` how many there are now (they are plugged in and pulled out in order, so that this
    says which).
    """

    type: str
    vcpus: int | None = None


def restoring_argv(argv: Sequence[str], machine: str, nics: Sequence[BootNic], vcpus: int | None = None) -> list[str]:
    """The arguments `argv` that the VM was last started with, for a QEMU that waits for its memory.

    Ports of the host are those of `nics`.
    """
    like = _like(Machine(type=machine, vcpus=vcpus))
    return [*changed(argv, {**like, "-netdev": _network(nics)}), *_own_memory(argv), *_WAITING]


def template_argv(argv: Sequence[str], machine: Machine, memory: int, sizes: Mapping[str, int]) -> list[str]:
    """Those of a QEMU whose memory is the open file `memory`, into which a running guest's is copied; it never runs the guest.

    So it has no disks and no ways out: in their place are empty ones, of the same `sizes` in bytes by the name of their node.
    """
    words = changed(
        argv,
        {
            **_like(machine),
            "-blockdev": lambda value: _empty_disk(value, sizes),
            "-netdev": _unplugged,
            "-chardev": _silent,
            "-mon": lambda value: value if value.startswith("chardev=qmp,") else None,
            "-pidfile": lambda _: None,
        },
    )
    return [*words, *memory_argv(argv, memory, share=True), *_WAITING]


def fork_argv(argv: Sequence[str], machine: Machine, memory: int, fork: Fork) -> list[str]:
    """Those of a fork: a VM of its own, whose memory is the open file `memory` until it writes there."""
    words = changed(
        with_disks(argv, fork.disks),
        {
            **_like(machine),
            "-name": lambda _: f"guest={fork.name},process={fork.name}",
            "-uuid": lambda _: fork.id,
            "-accel": _same if _can_grow(argv, machine) else _smaller_buffer(fork.together),
            "-netdev": _network(fork.nics),
            "-device": _address(fork.nics),
            "-kernel": _file(fork.kernel),
            "-initrd": _file(fork.initrd),
            "-fw_cfg": lambda value: None if value.startswith(SEED_FILE) else value,
        },
    )
    seed = ["-fw_cfg", f"{SEED_FILE}{fork.seed}"] if fork.seed else []
    return [*words, *seed, *memory_argv(argv, memory, share=False), *_WAITING]


def changed(argv: Sequence[str], changes: Mapping[str, Change]) -> list[str]:
    """`argv` without what a QEMU had that waited before, and with the values of options changed."""
    program, options = parsed(argv)
    words = list(program)
    for option, value in options:
        if (option, value) in _WAITED or _is_memory(option, value):
            continue
        change = changes.get(option)
        if (new := change(value) if change and value is not None else value) is not None:
            words += [option, new]
        elif value is None:
            words.append(option)
    return words


def parsed(argv: Sequence[str]) -> tuple[Sequence[str], list[tuple[str, str | None]]]:
    """The program, with what stands before its options, and each option of ours with its value, which some don't have."""
    first = next(i for i, word in enumerate(argv) if word.startswith("-"))
    rest = iter(argv[first:])
    return argv[:first], [(option, None if option in _FLAGS else next(rest)) for option in rest]


def _own_memory(argv: Sequence[str]) -> list[str]:
    """The words by which QEMU makes the memory itself, as a file that it shares (`argv.memory_argv`); none in a fork."""
    _, options = parsed(argv)
    made = [value for option, value in options if option == "-object" and value and value.startswith(SHARED_MEMORY)]
    return ["-object", made[0], "-machine", f"memory-backend={RAM}"] if made else []


def _is_memory(option: str, value: str | None) -> bool:
    """Whether these words are of `memory_argv`."""
    if option == "-machine":
        return value == f"memory-backend={RAM}"
    return option == "-object" and f"id={RAM}" in (value or "").split(",")


def memory_argv(argv: Sequence[str], file: int, *, share: bool) -> list[str]:
    """The guest's memory as a file, which is open as `file` in the QEMU too: as the VM's own, or private and copied on writing.

    The id, and that it stays just that, make it the same memory to a migration as that of a QEMU without such words
    (qemu(1), -machine memory-backend).
    """
    value = f"memory-backend-file,id={RAM},size={memory_size(argv)},mem-path=/proc/self/fd/{file}"
    shared = "on" if share else "off"
    backend = f"{value},share={shared},x-use-canonical-path-for-ramblock-id=off"
    return ["-object", backend, "-machine", f"memory-backend={RAM}"]


def memory_size(argv: Sequence[str]) -> str:
    """The value of -m, as 128M."""
    return argv[argv.index("-m") + 1].removeprefix("size=")


def _can_grow(argv: Sequence[str], machine: Machine) -> bool:
    """Whether vCPUs can be plugged in, for which a buffer of translated code must not be full."""
    counts = _counts(argv[argv.index("-smp") + 1])
    return (machine.vcpus or counts["cpus"]) < counts["cores"]


def _counts(value: str) -> dict[str, int]:
    """What -smp says, as `smp` writes it."""
    return {name: int(count) for name, count in (each.split("=") for each in value.split(","))}


def _like(machine: Machine) -> dict[str, Change]:
    def _smp(value: str) -> str:
        if machine.vcpus is None:
            return value
        return smp(machine.vcpus, _counts(value)["cores"])

    def _machine(value: str) -> str:
        if value.startswith("pflash"):
            return value
        return ",".join([machine.type, *value.split(",")[1:]])

    return {"-machine": _machine, "-smp": _smp}


def _network(nics: Sequence[BootNic]) -> Change:
    """Each card's network as it is for `nics`."""

    def change(value: str) -> str:
        return next((netdev(nic) for nic in nics if f"id={nic.name}" in value.split(",")), value)

    return change


def _address(nics: Sequence[BootNic]) -> Change:
    """The address of each card as it is after a reset: the fork's own where others see it.

    A user network is the VM's own, and remembers by its address who its one guest is.
    """

    def change(value: str) -> str:
        words = value.split(",")
        for nic in nics:
            if f"id={nic.name}-dev" in words and nic.network != "user":
                return ",".join(f"mac={nic.mac}" if word.startswith("mac=") else word for word in words)
        return value

    return change


def _file(path: Path | None) -> Change:
    return lambda value: value if path is None else str(path)


def _smaller_buffer(together: int) -> Change:
    """An accelerator that keeps less translated code at a time, where it keeps any, for so many forks that run at once."""
    size_mib = FORK_BUFFER_MIB if together < CROWD else CROWD_BUFFER_MIB
    return lambda value: re.sub(r"(?<=,tb-size=)[0-9]+", str(size_mib), value)


def _same(value: str) -> str:
    return value


def _unplugged(value: str) -> str:
    """The same kind of network, with the same state in a migration, which nothing leads to."""
    kept = ("user", "id=", "net=") if value.startswith("user,") else ("socket", "id=", "mcast=", "localaddr=")
    return ",".join(word for word in value.split(",") if word.startswith(kept))


def _silent(value: str) -> str | None:
    """A port that leads nowhere; of the monitors, the one for verbs under a name of its own."""
    options = dict(word.partition("=")[::2] for word in value.split(",")[1:])
    if options["id"] == "observe":
        return None
    return value.replace(QMP_SOCKET, TEMPLATE_SOCKET) if options["id"] == "qmp" else f"null,id={options['id']}"


def _empty_disk(value: str, sizes: Mapping[str, int]) -> str:
    options = json.loads(value)
    node = options["node-name"]
    empty = {"node-name": node, "driver": "null-co", "size": sizes[node], "read-zeroes": True}
    return _json({**empty, "read-only": options.get("read-only", False)})


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
