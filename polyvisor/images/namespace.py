"""Root without root: a user namespace in which a build may own files, chroot and mount.

In it the caller is root, and the caller's subordinate ids (subuid(5)) are the other users, so that a root file system
has its proper owners, also under a home that nobody else may enter. A real root gets no user namespace.
Mounts and processes made inside end with it, whatever happens to Polyvisor.
"""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from polyvisor.errors import PolyvisorError, Unavailable
from polyvisor.process import run

NEEDED_IDS = 65535
"""Subordinate ids that a Debian system needs: up to `nobody`, 65534, less the caller as number 0."""


def namespace_argv(argv: list[str], *, root: bool) -> list[str]:
    """The command that runs `argv` as root of new namespaces; `root` says whether the caller is root already.

    The whole tree of processes is killed when the command is, and when the process that started it dies.
    """
    user = [] if root else ["--user", "--map-root-user", "--map-auto"]
    dies_with_us = ["setpriv", "--pdeathsig", "KILL"]
    return [*dies_with_us, "unshare", *user, "--mount", "--pid", "--fork", "--kill-child", *argv]


def has_ids(table: str, user: str, uid: int) -> bool:
    """Whether `table` (the text of /etc/subuid or /etc/subgid) gives `user` a range that is large enough."""
    for line in table.splitlines():
        name, _, rest = line.partition(":")
        count = rest.partition(":")[2].strip()
        if name in (user, str(uid)) and count.isdecimal() and int(count) >= NEEDED_IDS:
            return True
    return False


def free_start(tables: list[str]) -> int:
    """The first id, from 100000 on, that no range in `tables` reaches: ids of two users must not overlap."""
    ends = [100000]
    for line in "\n".join(tables).splitlines():
        fields = line.split(":")
        if len(fields) == 3 and all(each.strip().isdecimal() for each in fields[1:]):
            ends.append(int(fields[1]) + int(fields[2]))
    return max(ends)


def missing_ids() -> str | None:
    """The command that gives the caller subordinate ids, if they are missing and the caller isn't root."""
    uid = os.geteuid()
    if uid == 0:
        return None
    user = getpass.getuser()
    tables = [_text(Path(path)) for path in ("/etc/subuid", "/etc/subgid")]
    if all(has_ids(table, user, uid) for table in tables):
        return None
    first = free_start(tables)
    ids = f"{first}-{first + NEEDED_IDS}"
    return f"sudo usermod --add-subuids {ids} --add-subgids {ids} {user}"


async def check_namespace() -> None:
    """Try a namespace out; raises Unavailable where this machine does not let the caller have one."""
    try:
        await run(namespace_argv(["true"], root=os.geteuid() == 0), timeout_s=30)
    except PolyvisorError as error:
        raise Unavailable(
            f"this machine gives {getpass.getuser()} no user namespace: {error}",
            hint="build as root, or allow it, by whichever exists of: sudo sysctl kernel.unprivileged_userns_clone=1;"
            " sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        ) from error


async def remove_tree(path: Path) -> None:
    """Remove a directory that may hold files of subordinate ids, which the caller alone can't remove."""
    await run(namespace_argv(["rm", "-rf", "--one-file-system", "--", str(path)], root=os.geteuid() == 0), check=False)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
