"""The console of a guest of Xen: what it says is read from the console log, what is typed goes to Xen's console client.

Xen's console of a domain (pv, pvh) has one reader, its console client (follow.py), which writes the log; the pipe that it reads
from lasts through reboots. An HVM guest's serial port is a socket of its QEMU, which is another one after a reboot, so it is
connected to whenever something is typed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from polyvisor.host.store import VMDirectory

_POLL_S = 0.05
_CHUNK = 64 << 10
_ESCAPE = b"\x1d"  # alone, it would end xenconsole (tools/console/client/main.c)


async def connect(vm: VMDirectory, pipe: str, serial: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Streams of what the guest says from now on, and of what is typed; raises OSError where there is no console."""
    log = os.open(vm.console_log, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.lseek(log, 0, os.SEEK_END)
    ours, theirs = socket.socketpair()
    pump = asyncio.get_running_loop().create_task(_pump(vm, theirs, log, pipe, serial))
    _pumps.add(pump)
    pump.add_done_callback(_pumps.discard)
    return await asyncio.open_connection(sock=ours)


_pumps: set[asyncio.Task[None]] = set()


async def _pump(vm: VMDirectory, client: socket.socket, log: int, pipe: str, serial: str) -> None:
    """Carry bytes both ways until the client leaves or the VM ends."""
    reader, writer = await asyncio.open_connection(sock=client)
    typing = asyncio.ensure_future(_type(vm, reader, pipe, serial))
    try:
        with contextlib.suppress(OSError):
            while not typing.done():
                ended = not vm.alive()
                while chunk := os.read(log, _CHUNK):
                    writer.write(chunk)
                    await writer.drain()
                if ended:
                    break
                await asyncio.sleep(_POLL_S)
    finally:
        typing.cancel()
        writer.close()
        os.close(log)


async def _type(vm: VMDirectory, reader: asyncio.StreamReader, pipe: str, serial: str) -> None:
    """Hand what comes from `reader` to the guest, to its end."""
    path = vm.path / pipe
    port: socket.socket | None = None
    try:
        while data := (await reader.read(4096)).replace(_ESCAPE, b""):
            if (vm.path / serial).exists():
                port = await asyncio.to_thread(_send, vm, serial, data, port)
                continue
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                with contextlib.suppress(BlockingIOError):  # a guest that does not read what is typed for 64 KiB
                    os.write(fd, data)
            finally:
                os.close(fd)
    finally:
        if port is not None:
            port.close()


def _send(vm: VMDirectory, serial: str, data: bytes, port: socket.socket | None) -> socket.socket:
    """Send to the serial port, over `port` where that still is connected; returns the connection."""
    if port is not None:
        with contextlib.suppress(OSError):
            port.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while port.recv(_CHUNK):  # the log has it
                    pass
                port.close()  # it has ended: another QEMU serves it by now
            port.setblocking(True)
            port.sendall(data)
            return port
    port = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = os.open((vm.path / serial).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        port.settimeout(10)
        port.connect(f"/proc/self/fd/{directory}/{os.path.basename(serial)}")  # noqa: PTH119
        port.sendall(data)
    finally:
        os.close(directory)
    return port
