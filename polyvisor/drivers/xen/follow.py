"""What guests in modes pv and pvh say on Xen's console, added to the VM's console log for as long as the VM lives.

Xen's console client ends with its domain, and a guest that reboots becomes another: `xl create -c` starts the client once,
and not again. So a small shell process beside xl starts it for each. What a domain says before is kept by xenconsoled.
"""

from __future__ import annotations

import os

from polyvisor.host.store import VMDirectory
from polyvisor.process import spawn_detached

CONSOLE_INPUT = "run/console.in"

# $1 is the process id of xl, which could be another's by now: so it is told by its start time as well (proc(5)). The client is
# called without xl, which has no way to say that what is not a terminal is to be read too (`--interactive`); Debian keeps it
# beside the real xl, others in Xen's private directory. A client that was killed is started again.
_FOLLOW = """\
began=$(cut -d' ' -f22 "/proc/$1/stat") || exit
while [ "$(cut -d' ' -f22 "/proc/$1/stat" 2>/dev/null)" = "$began" ]; do
    domain=$(sed -n 's/^Waiting for domain .* (domid \\([0-9]*\\)) to die.*/\\1/p' qemu.log | tail -n 1)
    if [ -n "$domain" ]; then
        beside=$(dirname "$(readlink "/proc/$1/exe")")
        for directory in "$beside" /usr/libexec/xen/bin /usr/lib/xen/bin "$(dirname "$(command -v xenconsole)")"; do
            [ -x "$directory/xenconsole" ] && break
        done
        "$directory/xenconsole" --interactive --type pv --num 0 "$domain" 2>/dev/null
    fi
    sleep 0.3
done
"""


def follow_console(vm: VMDirectory, pid: int) -> None:
    """Follow the domains that xl, process `pid`, makes for a VM. Raises OSError.

    What is to be typed is read from a pipe that never ends, since it is opened for both ways.
    """
    pipe = vm.path / CONSOLE_INPUT
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe, 0o600)
    keys = os.open(pipe, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    said = os.open(vm.console_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(keys, "rb"), os.fdopen(said, "ab") as log:
        words = ("/bin/sh", "-c", _FOLLOW, "console", str(pid))
        spawn_detached(words, cwd=vm.path, output=log, stdin=keys)
