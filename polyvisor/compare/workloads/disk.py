"""The disk: single blocks at random places, and a long read in a row."""

from __future__ import annotations

import json
from typing import Any

from polyvisor.compare.workload import Metric, Program, Script

# Past the guest's cache (direct), on the file system that everything else is on.
_FILE = "/var/tmp/polyvisor-compare.fio"  # noqa: S108 - of the guest
_JOBS = {"read": ("randread", "4k"), "write": ("randwrite", "4k"), "sequential": ("read", "1m")}
_SCRIPT = " ".join(
    [
        f"fio --output-format=json --filename={_FILE} --size=256m --direct=1 --ioengine=libaio --iodepth=16",
        "--time_based --runtime=2 --unlink=0 --fallocate=none",
        *(f"--name={name} --stonewall --rw={kind} --bs={size}" for name, (kind, size) in _JOBS.items()),
    ]
)
_PREPARE = f"dd if=/dev/zero of={_FILE} bs=1M count=256 2>/dev/null && sync"


def _read(said: str) -> dict[str, float]:
    found: dict[str, Any] = {job["jobname"]: job for job in json.loads(said[said.index("{") :])["jobs"]}
    read, write, row = found["read"]["read"], found["write"]["write"], found["sequential"]["read"]
    return {
        "reads": read["iops"],
        "read-p99": _p99_us(read),
        "writes": write["iops"],
        "write-p99": _p99_us(write),
        "speed": row["bw_bytes"] / (1 << 20),
    }


def _p99_us(side: dict[str, Any]) -> float:
    return float(side["clat_ns"]["percentile"]["99.000000"]) / 1000


WORKLOAD = Script(
    name="disk",
    about="fio: 4 KiB at random places and 1 MiB in a row, 16 at a time, past the guest's cache",
    metrics=(
        Metric(name="reads", unit="1/s", about="reads of 4 KiB"),
        Metric(name="read-p99", unit="µs", about="such a read, in 99 of 100 cases at most", lower_is_better=True),
        Metric(name="writes", unit="1/s", about="writes of 4 KiB"),
        Metric(name="write-p99", unit="µs", about="such a write, in 99 of 100 cases at most", lower_is_better=True),
        Metric(name="speed", unit="MiB/s", about="read in a row"),
    ),
    programs=(Program(name="fio", package="fio"),),
    prepare=_PREPARE,
    script=_SCRIPT,
    read=_read,
    native=False,  # it would write to the host's disk beside everything else there
)
