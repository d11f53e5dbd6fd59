"""Encryption and hashing, with all instructions that the CPU has for them."""

from __future__ import annotations

from polyvisor.compare.workload import Metric, Program, Script

_SCRIPT = "; ".join(
    f"openssl speed -mr -seconds 2 -bytes 16384 -evp {name} 2>/dev/null" for name in ("aes-256-gcm", "sha256")
)


def _read(said: str) -> dict[str, float]:
    # -mr: +F:NUMBER:NAME:BYTES PER SECOND, one for each size of a block.
    lines = [line.split(":") for line in said.splitlines() if line.startswith("+F:")]
    aes, sha = (float(words[-1]) / (1 << 20) for words in lines)
    return {"aes": aes, "sha": sha}


WORKLOAD = Script(
    name="crypto",
    about="openssl speed, blocks of 16 KiB",
    metrics=(
        Metric(name="aes", unit="MiB/s", about="encrypted with AES-256-GCM"),
        Metric(name="sha", unit="MiB/s", about="hashed with SHA-256"),
    ),
    programs=(Program(name="openssl", package="openssl"),),
    script=_SCRIPT,
    read=_read,
)
