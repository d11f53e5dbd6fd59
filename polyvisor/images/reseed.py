"""`reseed`: a program of 200 bytes that has Linux take new random numbers from what was mixed into its pool just now.

busybox has no command that does an ioctl, and the image `tiny` has no compiler and no Python. So the program is written here
as machine code: open /dev/urandom for writing, ioctl RNDRESEEDCRNG (random(4)), exit with what that returned, negated. The
system calls are those of x86-64 (syscall(2)); the file is an ELF executable of one segment (elf(5)).
"""

from __future__ import annotations

import struct

_BASE = 0x400000
_HEADERS = 64 + 56
_RNDRESEEDCRNG = 0x5207  # _IO('R', 0x07)
_PATH = b"/dev/urandom\0"


def program() -> bytes:
    """The program, as it is to lie in a file that can be executed."""
    after_open = b"".join(
        (
            b"\xbe\x01\x00\x00\x00",  # mov esi, O_WRONLY
            b"\x31\xd2",  # xor edx, edx
            b"\x0f\x05",  # syscall
            b"\x89\xc7",  # mov edi, eax
            b"\xb8\x10\x00\x00\x00",  # mov eax, ioctl
            b"\xbe" + struct.pack("<I", _RNDRESEEDCRNG),  # mov esi, RNDRESEEDCRNG
            b"\x31\xd2",  # xor edx, edx
            b"\x0f\x05",  # syscall
            b"\x89\xc7",  # mov edi, eax
            b"\xf7\xdf",  # neg edi
            b"\xb8\x3c\x00\x00\x00",  # mov eax, exit
            b"\x0f\x05",  # syscall
        )
    )
    # mov eax, open; lea rdi, [rip + what follows]: the path stands behind the code.
    code = b"\xb8\x02\x00\x00\x00" + b"\x48\x8d\x3d" + struct.pack("<i", len(after_open)) + after_open + _PATH
    size = _HEADERS + len(code)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)  # 64 bits, little-endian, version 1, System V
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)  # loaded, readable and executable
    return header + segment + code
