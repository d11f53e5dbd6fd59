"""A real sshd on a port of loopback, for this user alone, with keys of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from polyvisor.process import find_program
from polyvisor.remote.address import Entry

_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
MaxStartups 100
MaxSessions 100
LogLevel ERROR
"""


@dataclass(frozen=True)
class Server:
    """Where it listens, the key that it lets in, and the file that knows its own."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def identity(self) -> Path:
        return self.directory / "identity"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    def entry(self, home: Path | None = None, *, port: int | None = None) -> Entry:
        """This server as a host, whose VMs are in `home`; reached by another `port` where one leads to it."""
        return Entry(
            name="loopback",
            url=f"ssh://{getpass.getuser()}@127.0.0.1:{port or self.port}",
            added_at=0.0,
            identity=str(self.identity),
            known_hosts=str(self.known_hosts),
            home=str(home) if home else None,
        )

    def know(self, port: int) -> None:
        """Let clients know the server's key at another port too."""
        key = (self.directory / "host_key.pub").read_text()
        with self.known_hosts.open("a") as file:
            file.write(f"[127.0.0.1]:{port} {key}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(directory: Path, *settings: str) -> Iterator[Server]:
    """An sshd that keeps its files in `directory`, until the end of the block; `settings` are lines of sshd_config(5)."""
    for name in ("host_key", "identity"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    (directory / "authorized_keys").write_bytes((directory / "identity.pub").read_bytes())
    port = free_port()
    config = _CONFIG.format(port=port, directory=directory)
    (directory / "sshd_config").write_text(config + "".join(f"{line}\n" for line in settings))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    program = find_program("sshd", package="openssh-server")
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([program, "-D", "-e", "-f", directory / "sshd_config"], stderr=log)
    server = Server(directory, port, process)
    server.know(port)
    try:
        _wait(server)
        yield server
    finally:
        process.terminate()
        process.wait()


def _wait(server: Server) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
            return
        assert server.process.poll() is None, (server.directory / "log").read_text()
        time.sleep(0.05)
    raise AssertionError("sshd does not listen")
