"""A probe guest for KVM, in plain ioctls: it tells whether the CPU runs guests, in a few milliseconds.

The guest is a 64 KiB firmware image, like a PC's: it starts at the reset vector, goes from real mode to 64-bit mode
with paging as a kernel does, calculates with the x87 FPU, counts down four million, and halts. On its way it writes
bytes to a port. The FPU matters most: KVM's built-in instruction emulator, which steps in where there is no hardware
behind KVM, gets through everything else but does not know these instructions. The countdown would catch a more
complete emulator: it takes a CPU a few milliseconds, and that emulator five seconds.

Request numbers and structures: the Linux kernel's Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h.
Encodings: Intel's Software Developer's Manual, volume 2; mode switch: volume 3, 10.8.5 (initializing IA-32e mode).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import signal
import struct
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

TIME_LIMIT_S = 2.0
PORT = 0xF1
EXPECTED_OUTPUT = b"RL\x02C"

_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_GET_SUPPORTED_CPUID = 0xC008AE05
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_SET_TSS_ADDR = 0xAE47
_RUN = 0xAE80
_SET_CPUID2 = 0x4008AE90

_EXIT_IO, _EXIT_HLT, _EXIT_SHUTDOWN, _EXIT_FAIL_ENTRY, _EXIT_INTERNAL_ERROR = 2, 5, 8, 9, 17

_SIZE = 0x10000
_LOW, _FIRMWARE, _TOP = 0, 0xF0000, 0xFFFF0000  # where the guest sees its 64 KiB: as memory, and as a PC's firmware
_TSS_ADDR = 0x10000000  # three pages that the guest does not use; Intel CPUs need them in real mode
_CPUID_ENTRIES, _CPUID_ENTRY_BYTES = 256, 40


class ProbeFailed(Exception):
    """The probe guest did not come to its end; the text completes "KVM is there, but …"."""


def firmware() -> bytes:
    """The probe guest: 64 KiB that end in the reset vector, runnable by any PC emulator as `-bios`."""
    image = bytearray(_SIZE)
    # Tables, with the accessed (0x20) and dirty (0x40) bits set, because firmware can't be written: the first level
    # leads to the second, that to the third, whose first entry maps 2 MiB at 0.
    image[0x1000:0x1008] = struct.pack("<Q", _FIRMWARE + 0x2000 | 0x23)
    image[0x2000:0x2008] = struct.pack("<Q", _FIRMWARE + 0x3000 | 0x23)
    image[0x3000:0x3008] = struct.pack("<Q", 0xE3)
    # A descriptor table: empty, 64-bit code, data; and the pointer to it.
    image[0x4000:0x4018] = struct.pack("<3Q", 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
    image[0x4020:0x4026] = struct.pack("<HI", 0x17, _FIRMWARE + 0x4000)
    real = _real_mode_code()
    jump = b"\x66\xea" + struct.pack("<IH", _FIRMWARE + 0x8000 + len(real) + 8, 8)  # to the next byte, 64-bit
    code = real + jump + _long_mode_code()
    image[0x8000 : 0x8000 + len(code)] = code
    image[0xFFF0:0xFFF5] = b"\xea" + struct.pack("<HH", 0x8000, _FIRMWARE >> 4)
    return bytes(image)


def _out(value: int | None = None) -> bytes:
    """Write `value`, or what is in AL already, to the port."""
    return (b"" if value is None else bytes([0xB0, value])) + bytes([0xE6, PORT])


def _real_mode_code() -> bytes:
    return b"".join(
        (
            bytes.fromhex("fa"),  # cli
            _out(ord("R")),
            bytes.fromhex("2e660f01162040"),  # lgdt cs:[0x4020]
            bytes.fromhex("66b820000000 0f22e0"),  # cr4 = PAE
            bytes.fromhex("66b800100f00 0f22d8"),  # cr3 = the first table
            bytes.fromhex("66b9800000c0 0f32 660d00010000 0f30"),  # EFER |= LME
            bytes.fromhex("66b811000080 0f22c0"),  # cr0 = PG | ET | PE
        )
    )


def _long_mode_code() -> bytes:
    return b"".join(
        (
            _out(ord("L")),
            bytes.fromhex("dbe3 d9e8 d9e8 dec1"),  # fninit; 1 + 1
            bytes.fromhex("db1c2500700000"),  # fistp dword [0x7000]
            bytes.fromhex("8a042500700000"),  # mov al, [0x7000]
            _out(),
            bytes.fromhex("b900093d00 ffc9 75fc"),  # four million times: dec ecx
            _out(ord("C")),
            bytes.fromhex("f4ebfd"),  # hlt, for ever
        )
    )


def run_probe(device: Path) -> float:
    """Run the probe guest and return the milliseconds it took, set-up included; raises ProbeFailed.

    It runs in a child process, because a vCPU that hangs can only be ended with the thread that runs it.
    """
    start = time.perf_counter()
    image = firmware()
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        _child(device, image, writer)
    os.close(writer)
    try:
        answer = _answer(reader)
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if answer != b"ok":
        raise ProbeFailed(answer.decode(errors="replace"))
    return (time.perf_counter() - start) * 1000


def _fork() -> int:
    """fork(2) without Python's warning about threads: the child only makes system calls and leaves by `_exit`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _child(device: Path, image: bytes, writer: int) -> None:
    """Run the guest and write the outcome to `writer`; never returns. The alarm ends it even if its parent is gone."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * TIME_LIMIT_S)
        os.write(writer, _outcome(device, image).encode())
    finally:
        os._exit(0)


def _answer(reader: int) -> bytes:
    """What the child wrote, in time."""
    ready, _, _ = select.select([reader], [], [], TIME_LIMIT_S)
    if not ready:
        return f"a probe guest did not end within {TIME_LIMIT_S:g} s".encode()
    return os.read(reader, 4096) or b"the process that ran a probe guest died"


def _outcome(device: Path, image: bytes) -> str:
    try:
        output = b"".join(_run(device, image))
    except ProbeFailed as failed:
        return str(failed)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return "another hypervisor (VirtualBox, VMware …) holds the CPU's virtualization"
        return f"it refuses a probe guest: {error.strerror}"
    return "ok" if output == EXPECTED_OUTPUT else f"a probe guest calculated wrongly ({output!r})"


def _run(device: Path, image: bytes) -> Iterator[bytes]:
    """Make a VM with one vCPU, run it until it halts, and yield what it writes to the port."""
    kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    run_bytes = fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0)
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    fcntl.ioctl(vm, _SET_TSS_ADDR, _TSS_ADDR)
    memory = _give_memory(vm, image)
    vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    cpuid = bytearray(struct.pack("<II", _CPUID_ENTRIES, 0) + bytes(_CPUID_ENTRIES * _CPUID_ENTRY_BYTES))
    fcntl.ioctl(kvm, _GET_SUPPORTED_CPUID, cpuid)  # without it the guest may not switch to 64-bit mode
    fcntl.ioctl(vcpu, _SET_CPUID2, cpuid)
    with memory, mmap.mmap(vcpu, run_bytes) as run:
        while True:
            fcntl.ioctl(vcpu, _RUN, 0)
            reason = struct.unpack_from("<I", run, 8)[0]
            if reason == _EXIT_HLT:
                return
            yield _port_output(run) if reason == _EXIT_IO else _stopped(reason, run)


def _give_memory(vm: int, image: bytes) -> mmap.mmap:
    """Give the guest one memory that holds `image` and that it sees at three addresses."""
    import ctypes

    memory = mmap.mmap(-1, _SIZE)
    memory[:] = image
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for slot, guest_address in enumerate((_LOW, _FIRMWARE, _TOP)):
        region = struct.pack("<IIQQQ", slot, 0, guest_address, _SIZE, address)
        fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, region)
    return memory


def _port_output(run: mmap.mmap) -> bytes:
    """The bytes of struct kvm_run's `io`; raises ProbeFailed for other ports and for input."""
    direction, size, port, count, offset = struct.unpack_from("<BBHIQ", run, 32)
    if (direction, port) != (1, PORT):
        raise ProbeFailed(f"a probe guest went astray (port {port:#x})")
    return run[offset : offset + size * count]


def _stopped(reason: int, run: mmap.mmap) -> bytes:
    """Raise the ProbeFailed that explains exit `reason`."""
    detail = struct.unpack_from("<I", run, 32)[0]
    if reason == _EXIT_INTERNAL_ERROR and detail == 1:
        raise ProbeFailed("a probe guest was run by KVM's instruction emulator, not by the CPU, and failed at the FPU")
    if reason == _EXIT_FAIL_ENTRY:
        raise ProbeFailed(f"the CPU refused to enter a probe guest (reason {detail:#x})")
    if reason == _EXIT_SHUTDOWN:
        raise ProbeFailed("a probe guest crashed (triple fault)")
    raise ProbeFailed(f"a probe guest stopped early (exit {reason}, {detail})")
