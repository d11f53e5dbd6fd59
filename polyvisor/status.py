"""What is: the observed state of VMs and hosts.

Nothing here is ever stored. Each value is made by looking, and is as old as the look.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum

from polyvisor.spec.forward import Forward
from polyvisor.values import dataclass


class VMState(StrEnum):
    """State of a VM as observed on its host."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    SAVED = "saved"
    CRASHED = "crashed"
    UNRESPONSIVE = "unresponsive"

    @property
    def alive(self) -> bool:
        """True where the VM occupies memory: it runs, is paused, or does not answer."""
        return self in (VMState.RUNNING, VMState.PAUSED, VMState.UNRESPONSIVE)

    @property
    def keeps_devices(self) -> bool:
        """True where it goes on with what it was started with: it is alive, or saved."""
        return self.alive or self is VMState.SAVED


@dataclass(frozen=True, kw_only=True)
class VMStatus:
    """One VM as it is now.

    `reason` says why a VM crashed or does not answer. `hypervisor` and `mode` are what it runs on, or, where it is
    not running, what it last ran on; None before its first start. `created_at` and `started_at` are in seconds since
    the epoch. `vcpus` and `memory_mib` are what it was given, or, where it is not alive, will be; `pending` names settings that
    the next boot alone can put in force.
    """

    name: str
    id: str
    state: VMState
    reason: str | None = None
    image: str | None = None
    hypervisor: str | None = None
    mode: str | None = None
    vcpus: int
    memory_mib: int
    pid: int | None = None
    created_at: float
    started_at: float | None = None
    forwards: tuple[Forward, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    pending: tuple[str, ...] = ()

    @property
    def running(self) -> bool:
        return self.state is VMState.RUNNING


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a VM that is alive really has at this moment, as its hypervisor says; None where that can't be told."""

    vcpus: int | None = None
    memory_mib: int | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What a VM that is alive occupies of its host's memory, in MiB, with all that its process needs for itself.

    `own_mib` is what nobody else has; `shared_mib` its share of what it has together with others: a page that three VMs map
    counts a third for each (proc(5), smaps: Private, Pss). So what all VMs occupy is the sum.
    """

    own_mib: float
    shared_mib: float

    @property
    def total_mib(self) -> float:
        return self.own_mib + self.shared_mib


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A setting that is another one at the next boot: it is `now` one value, and `then` another."""

    setting: str
    now: str
    then: str


@dataclass(frozen=True, kw_only=True)
class DiskStatus:
    """A disk of a VM: how large it is now. `pending` says what the next boot changes of it, `reason` why it is not done now."""

    name: str
    size_mib: int
    pending: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class NicStatus:
    """A network card of a VM; `pending` and `reason` as of a disk."""

    name: str
    network: str
    mac: str
    pending: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resized:
    """What came of a `set`: names of the settings that are in force as asked for, and all that wait for the next boot.

    `reasons` says of settings that were asked for why they wait.
    """

    status: VMStatus
    applied: tuple[str, ...] = ()
    pending: tuple[Pending, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The memory and devices of a VM on disk: since `at`, in seconds since the epoch; `paused` where `start` leaves it so."""

    at: float
    size_bytes: int
    paused: bool


@dataclass(frozen=True, kw_only=True)
class Forked:
    """What came of a `fork`: the forks, in the order of their names.

    `pause_s` is how long the source stood still, `copy_s` how long it took to copy it, `begin_s` from then until all
    forks ran; in seconds. `same_identity` says why the guests could not be told who they are, and so still have the name, keys
    and random numbers of the source; None where they were told.
    """

    forks: tuple[VMStatus, ...]
    pause_s: float
    copy_s: float
    begin_s: float
    same_identity: str | None = None


@dataclass(frozen=True, kw_only=True)
class StoredTemplate:
    """Memory and devices of a VM as it once was, from which others begin: `source` is the VM's name of then.

    `size_bytes` is what it occupies on the disk; `warm` are the names of the VMs that are ready to begin from it.
    """

    name: str
    created_at: float
    source: str
    image: str
    vcpus: int
    memory_mib: int
    size_bytes: int
    warm: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A way to run guests on this host, and whether it works here; `reason` says why or why not."""

    name: str
    available: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a driver can do on this host.

    `missing` maps each verb or feature that it can't do to a reason that a user understands; a key that ends in the name of an
    accelerator, a mode or a firmware is about those alone. `cpus` are the host's, as 0-3, to which VMs can be pinned.
    `memory_mib` is the machine's memory, where this system has but a part of it.
    """

    driver: str
    version: str | None
    accelerators: tuple[Accelerator, ...]
    modes: tuple[str, ...]
    missing: dict[str, str] = field(default_factory=dict)
    cpus: str = ""
    memory_mib: int | None = None

    def refusal(self, feature: str, hypervisor: str | None = None, mode: str | None = None) -> str | None:
        """Why `feature` is missing here, on that hypervisor and in that mode, or None."""
        keys = (feature, f"{feature}-{hypervisor}", f"{feature}-{mode}")
        return next((self.missing[key] for key in keys if key in self.missing), None)


@dataclass(frozen=True, kw_only=True)
class HostStatus:
    """The machine that VMs run on. Memory and storage are in MiB; None where it can't be told."""

    name: str
    kernel: str
    architecture: str
    cpus: int
    cpu_model: str
    memory_mib: int
    memory_free_mib: int
    home: str
    storage_free_mib: int | None
    hypervisor: str | None
    hypervisor_reason: str
    capabilities: tuple[Capabilities, ...]
    vms_by_state: dict[str, int]


class CheckResult(StrEnum):
    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of `polyvisor doctor`; `remedy` is the exact command that mends it, where there is one."""

    name: str
    result: CheckResult
    detail: str
    remedy: str | None = None


class HostKind(StrEnum):
    """What a machine can be made, beside what it is."""

    KVM = "kvm"
    XEN = "xen"


class StepState(StrEnum):
    """A step of making a machine a host: done already, to be done by Polyvisor, by a person, or out of reach here."""

    DONE = "done"
    TODO = "to do"
    BY_HAND = "by hand"
    BLOCKED = "blocked"


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """A file that shall have `content`, or, where that is None, shall not be there."""

    path: str
    content: str | None = None


@dataclass(frozen=True, kw_only=True)
class SetupStep:
    """One step: what was `found`, `why` it matters, the exact change: files are written first, then the commands run."""

    name: str
    state: StepState
    found: str
    why: str = ""
    files: tuple[FileChange, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    reboot: bool = False


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What makes a machine, which runs `system`, a host that runs `kind`; `notes` are what a person should know of it."""

    kind: HostKind
    system: str
    steps: tuple[SetupStep, ...]
    notes: tuple[str, ...] = ()

    def in_state(self, *states: StepState) -> tuple[SetupStep, ...]:
        return tuple(step for step in self.steps if step.state in states)


@dataclass(frozen=True, kw_only=True)
class Event:
    """A change of a VM, observed at `at` (seconds since the epoch)."""

    at: float
    vm: str
    event: str
    detail: str | None = None
