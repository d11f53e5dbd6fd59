"""vCPUs, memory and CPU shares of a VM: with every choice made, and as changes that are asked for."""

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


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is to change; None leaves a setting as it is. `cpu_limit` 0 lifts the limit."""

    vcpus: int | None = None
    vcpus_max: int | None = None
    memory_mib: int | None = None
    memory_max_mib: int | None = None
    cpu_weight: int | None = None
    cpu_limit: int | None = None
    cpu_affinity: str | None = None


SETTINGS = ("vcpus", "vcpus_max", "memory_mib", "memory_max_mib", "cpu_weight", "cpu_limit", "cpu_affinity")
