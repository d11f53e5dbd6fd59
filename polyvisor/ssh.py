"""The one place that opens SSH to guests, through OpenSSH's own programs.

`ssh_argv` and `scp_argv` give the commands that the command line runs on its terminal; `execute` and `copy` are for programs.
Nothing of the user's own SSH configuration is used: a guest's key, host key and port are known to Polyvisor.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from polyvisor.errors import InvalidInput, ProcessFailed
from polyvisor.host.api import HostApi, SSHTarget
from polyvisor.process import Completed, find_program, run

READY_S = 180.0
SSH_FAILED = 255


def ssh_argv(target: SSHTarget, *command: str) -> list[str]:
    """The command that logs in to a guest, or has its shell run `command`; raises Unavailable without OpenSSH."""
    program = find_program("ssh", package="openssh-client")
    return [program, *_options(target), "-p", str(target.port), "--", f"{target.user}@{target.address}", *command]


def scp_argv(target: SSHTarget, sources: Sequence[str], destination: str, *, recursive: bool = False) -> list[str]:
    """The command that copies between this machine and the guest; paths in the guest are written NAME:PATH."""
    program = find_program("scp", package="openssh-client")
    paths = [_remote(path, target) for path in (*sources, destination)]
    return [program, *(["-r"] if recursive else []), *_options(target), "-P", str(target.port), "--", *paths]


async def execute(
    api: HostApi, name: str, argv: Sequence[str], *, stdin: bytes | None = None, timeout_s: float | None = None
) -> Completed:
    """Run a program in the guest of VM `name`, each word of `argv` as it is, and return its output and exit status.

    Waits for the guest to answer first. Raises ProcessFailed where SSH itself fails, TimedOut after `timeout_s` seconds.
    """
    target = await api.wait_for_ssh(name, timeout_s=READY_S)
    command = ssh_argv(target, shlex.join(argv))
    completed = await run(command, stdin=stdin, timeout_s=timeout_s, check=False)
    if completed.status == SSH_FAILED:
        raise ProcessFailed(command, completed.status, completed.stderr)
    return completed


async def copy(api: HostApi, sources: Sequence[str], destination: str, *, recursive: bool = False) -> None:
    """Copy files between this machine and one guest; paths in the guest are written NAME:PATH.

    Raises InvalidInput where not exactly one guest is named, ProcessFailed where scp fails.
    """
    target = await api.wait_for_ssh(guest_named([*sources, destination]), timeout_s=READY_S)
    await run(scp_argv(target, sources, destination, recursive=recursive))


def guest_named(paths: Sequence[str]) -> str:
    """The one VM that `paths` name as NAME:PATH; raises InvalidInput where there are none or several."""
    names = {name for path in paths if (name := _guest_of(path))}
    if len(names) != 1:
        problem = "names no guest" if not names else "names several guests"
        raise InvalidInput("paths", " ".join(paths), problem, hint="one side is FILE, the other NAME:PATH")
    return names.pop()


def _guest_of(path: str) -> str | None:
    """The VM in NAME:PATH; a path with a slash before the colon is a file here, as scp has it."""
    name, colon, _ = path.partition(":")
    return name if colon and name and "/" not in name else None


def _remote(path: str, target: SSHTarget) -> str:
    if _guest_of(path) is None:
        return path if path.startswith(("/", ".")) else f"./{path}"
    return f"{target.user}@{target.address}:{path.partition(':')[2]}"


def _quoted(path: Path) -> str:
    """`path` as OpenSSH reads it in a setting: % begins a token, quotes and backslashes are escaped (ssh_config(5))."""
    escaped = str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _options(target: SSHTarget) -> list[str]:
    settings = {
        "IdentityFile": _quoted(target.identity),
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": _quoted(target.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": target.alias,
        "StrictHostKeyChecking": "accept-new",
        "ConnectTimeout": "60",
        "LogLevel": "ERROR",
        **({"ProxyCommand": target.proxy} if target.proxy else {}),
    }
    return ["-F", "none", *(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))]
