"""vCPUs, memory, and shares of CPUs and disks of a VM: with every choice made, and as changes that are asked for."""

from __future__ import annotations

from polyvisor.spec.cpus import ALL_CPUS
from polyvisor.values import dataclass

NORMAL_WEIGHT = 100


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a VM has, or is to have. The names are those of the spec's settings, and so are the units."""

    vcpus: int
    vcpus_max: int
    memory_mib: int
    memory_max_mib: int
    cpu_weight: int = NORMAL_WEIGHT
    cpu_limit: int | None = None
    cpu_affinity: str = ALL_CPUS
    disk_iops_limit: int | None = None
    disk_rate_limit_mib: int | None = None

    @property
    def limits_disks(self) -> bool:
        """Whether the disks are slower than they could be."""
        return self.disk_iops_limit is not None or self.disk_rate_limit_mib is not None


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is to change; None leaves a setting as it is. 0 lifts one of `LIMITS`."""

    vcpus: int | None = None
    vcpus_max: int | None = None
    memory_mib: int | None = None
    memory_max_mib: int | None = None
    cpu_weight: int | None = None
    cpu_limit: int | None = None
    cpu_affinity: str | None = None
    disk_iops_limit: int | None = None
    disk_rate_limit_mib: int | None = None


LIMITS = ("cpu_limit", "disk_iops_limit", "disk_rate_limit_mib")
SCHEDULING = ("cpu_weight", "cpu_affinity", *LIMITS)
SETTINGS = ("vcpus", "vcpus_max", "memory_mib", "memory_max_mib", *SCHEDULING)
