"""`console` and `logs`: the serial console, live and recorded."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator

from polyvisor.cli.context import Context

DETACH = b"\x1d"  # Ctrl-], as telnet and virsh have it
_CHUNK = 4096


def add_console(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.set_defaults(action=_console)


def add_logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    parser.add_argument("--hypervisor", action="store_true", help="what the hypervisor's process said, not the console")
    parser.set_defaults(action=_logs)


def _console(context: Context, options: argparse.Namespace) -> int:
    async def work() -> None:
        reader, writer = await context.host.console(options.name)
        context.note(f"console of {options.name}; detach with Ctrl-]")
        try:
            with _raw_terminal():
                await _relay(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        context.note("")
        context.note(f"detached from {options.name}")

    context.run(work())
    return 0


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes both ways until the user detaches, input ends, or the VM does."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    typed = sys.stdin.fileno()

    def from_terminal() -> None:
        data = os.read(typed, _CHUNK)
        before, detach, _ = data.partition(DETACH)
        writer.write(before)
        if (detach or not data) and not done.done():
            loop.remove_reader(typed)
            if detach or sys.stdin.isatty():
                done.set_result(None)

    async def to_terminal() -> None:
        while data := await reader.read(_CHUNK):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

    output = loop.create_task(to_terminal())
    try:
        loop.add_reader(typed, from_terminal)
    except PermissionError:  # a file, or /dev/null: it is there to be read at once
        writer.write(sys.stdin.buffer.read())
    try:
        await asyncio.wait([output, done], return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(typed)
        output.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await output


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the guest; the terminal is as it was afterwards."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _logs(context: Context, options: argparse.Namespace) -> int:
    async def work() -> None:
        async for chunk in context.host.log(options.name, hypervisor=options.hypervisor, follow=options.follow):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()

    context.run(work())
    return 0
