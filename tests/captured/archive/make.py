"""Makes the small archive in this directory (needs gpg); run from the checkout: python -m tests.captured.archive.make.

The private keys are thrown away, so each run makes a new archive: keyring.gpg knows its key, and not the stranger's.
"""

from __future__ import annotations

import hashlib
import lzma
import subprocess
import tempfile
from pathlib import Path

from tests.unit.debs import deb, tar

HERE = Path(__file__).parent
SUITES = {  # suite: (who signs, further fields)
    "good": (("archive",), ""),
    "both": (("archive", "stranger"), ""),
    "stranger": (("stranger",), ""),
    "expired": (("archive",), "Valid-Until: Sat, 01 Feb 2020 00:00:00 UTC\n"),
}


def main() -> None:
    package = deb(tar(("./usr/bin/hello", b"hello\n", 0o755)))
    put("pool/hello_1.0_amd64.deb", package)
    index = f"""Package: hello
Version: 1.0
Depends: libc6 (>= 2.34), a:any | b
Description: first line
 and more
Filename: pool/hello_1.0_amd64.deb
Size: {len(package)}
SHA256: {sha256(package)}

Package: gone
Version: 1.0
Filename: pool/gone_1.0_amd64.deb
Size: 5
SHA256: {sha256(b"gone!")}
"""
    packed = lzma.compress(index.encode())
    with tempfile.TemporaryDirectory() as home:
        for user in ("archive", "stranger"):
            gpg(home, "--passphrase", "", "--quick-generate-key", user, "ed25519", "sign", "never")
        put("keyring.gpg", gpg(home, "--export", "archive"))
        for suite, (users, fields) in SUITES.items():
            put(f"dists/{suite}/main/binary-amd64/Packages.xz", packed)
            release = f"Suite: {suite}\nCodename: {suite}\nDate: Wed, 01 Jan 2020 00:00:00 UTC\n{fields}SHA256:\n"
            release += f" {sha256(packed)} {len(packed)} main/binary-amd64/Packages.xz\n"
            by = [word for user in users for word in ("--local-user", user)]
            put(f"dists/{suite}/InRelease", gpg(home, *by, "--clearsign", stdin=release.encode()))


def put(path: str, data: bytes) -> None:
    (HERE / path).parent.mkdir(parents=True, exist_ok=True)
    (HERE / path).write_bytes(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def gpg(home: str, *words: str, stdin: bytes = b"") -> bytes:
    argv = ["gpg", "--homedir", home, "--batch", "--quiet", "--pinentry-mode", "loopback", *words]
    return subprocess.run(argv, input=stdin, capture_output=True, check=True).stdout


if __name__ == "__main__":
    main()
