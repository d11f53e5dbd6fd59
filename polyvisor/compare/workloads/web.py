"""A web server and its clients, in one guest."""

from __future__ import annotations

import re

from polyvisor.compare.workload import Metric, Program, Script

_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


def _read(said: str) -> dict[str, float]:
    [rate] = re.findall(r"^Requests/sec:\s*([\d.]+)", said, re.MULTILINE)
    [(late, unit)] = re.findall(r"^\s*99%\s+([\d.]+)(us|ms|s)$", said, re.MULTILINE)
    return {"requests": float(rate), "p99": float(late) * _UNITS[unit]}


WORKLOAD = Script(
    name="web",
    about="nginx serves a small page to wrk, by 16 connections of the guest's loopback",
    metrics=(
        Metric(name="requests", unit="1/s", about="answered"),
        Metric(
            name="p99", unit="ms", about="until an answer is there, in 99 of 100 cases at most", lower_is_better=True
        ),
    ),
    programs=(Program(name="nginx", package="nginx-light"), Program(name="wrk", package="wrk")),
    prepare="systemctl start nginx",
    script="wrk -t 1 -c 16 -d 3s --latency http://127.0.0.1/",
    read=_read,
    native=False,  # the host's web server is the host's
)
