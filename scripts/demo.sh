#!/bin/sh
# The main job, shown: a virtual machine from nothing, and what it says when logged in to. Run by `make demo`, after
# setup.sh. A second run finds the machine `demo` of the first and uses it again.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
name=demo
step='the start'

ended() {
    status=$?
    if [ "$status" -eq 0 ]; then return; fi
    printf '\n%s\n' "The demo stopped (exit status $status) at: $step" >&2
    printf '%s\n' "  uv run polyvisor doctor             says what is missing here, and the command that mends it" >&2
    printf '%s\n' "  uv run polyvisor logs $name           shows what the virtual machine printed" >&2
    printf '%s\n' "  uv run polyvisor rm --force $name     removes it; then: make demo" >&2
}
trap ended EXIT

polyvisor() { "$root/.venv/bin/polyvisor" "$@"; }

show() { # Print a command as a user would type it, and run it.
    step="polyvisor $*"
    if [ -t 1 ]; then printf '\n\033[1m$ %s\033[0m\n' "$step"; else printf '\n$ %s\n' "$step"; fi
    polyvisor "$@"
}

if ! [ -x "$root/.venv/bin/polyvisor" ]; then
    step='looking for the environment (run: sh scripts/setup.sh)'
    exit 1
fi

step='polyvisor image show tiny'
if ! polyvisor image show tiny >/dev/null 2>&1; then show image build tiny; fi

if polyvisor show "$name" >/dev/null 2>&1; then
    show start "$name" --wait
else
    show run tiny --name "$name" --wait
fi
show ssh "$name" -- uname -a
show ls
show host

cat <<END

The virtual machine '$name' is running. How to go on:
  uv run polyvisor ssh $name           log in
  uv run polyvisor console $name       its serial console
  uv run polyvisor show $name          all about it
  uv run polyvisor stop $name          shut it down; start brings it back
  uv run polyvisor rm --force $name    remove it
  uv run polyvisor --help             everything else
END
