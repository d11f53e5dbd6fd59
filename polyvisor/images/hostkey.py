"""A guest's SSH host key: made with the VM, handed to the guest, and known to whoever logs in, from the first time on.

OpenSSH's private key format is described in its source, PROTOCOL.key; that of dropbear in its source, signkey.c and
ed25519.c: the name of the algorithm and the 64 bytes of secret seed and public key, each a string of RFC 4251, 5.
"""

from __future__ import annotations

import binascii
import struct

from polyvisor.values import dataclass

_MAGIC = b"openssh-key-v1\0"
_ALGORITHM = b"ssh-ed25519"


@dataclass(frozen=True)
class HostKey:
    """An Ed25519 key pair: `private` as OpenSSH has it in a file (PEM), `public` as one line."""

    private: str
    public: str

    @property
    def dropbear(self) -> bytes:
        """The private key as dropbear has it in a file."""
        return _string(_ALGORITHM) + _string(secret_of(self.private))


def secret_of(pem: str) -> bytes:
    """The 64 bytes (seed, public key) of an Ed25519 key in an OpenSSH private key file without passphrase.

    Raises ValueError for anything else.
    """
    lines = [line for line in pem.strip().splitlines() if not line.startswith("-----")]
    blob = binascii.a2b_base64("".join(lines), strict_mode=True)
    if not blob.startswith(_MAGIC + _string(b"none") * 2):
        raise ValueError("not an OpenSSH private key without passphrase")
    rest = blob[len(_MAGIC) + 2 * len(_string(b"none")) :]
    _, rest = _take(rest)  # options of the key derivation: none
    _, rest = _take(rest[4:])  # the number of keys, then the public key
    private, _ = _take(rest)
    algorithm, private = _take(private[8:])  # behind two check numbers
    _, private = _take(private)
    secret, _ = _take(private)
    if algorithm != _ALGORITHM or len(secret) != 64:
        raise ValueError("not an Ed25519 key")
    return secret


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _take(data: bytes) -> tuple[bytes, bytes]:
    """The string at the beginning of `data`, and what follows it."""
    if len(data) < 4 or len(data) < 4 + (length := struct.unpack_from(">I", data)[0]):
        raise ValueError("the key is cut off")
    return data[4 : 4 + length], data[4 + length :]
