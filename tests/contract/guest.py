"""What contract tests share beside fixtures."""

from __future__ import annotations

from polyvisor.host.api import HostApi
from polyvisor.ssh import execute

BOOT_S = 120.0


async def guest(api: HostApi, name: str, command: str) -> str:
    """What `command` prints in the guest of VM `name`."""
    return (await execute(api, name, ["sh", "-c", command], timeout_s=60)).stdout.strip()
