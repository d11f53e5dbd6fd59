"""What every verb of the command line shares: the host, the form of output, progress, and errors on stderr."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from polyvisor import waiting
from polyvisor.cli import startup
from polyvisor.errors import PolyvisorError, ProcessFailed, escaped, one_line

if TYPE_CHECKING:
    from polyvisor.cli.progress import Display
    from polyvisor.host.api import HostApi

T = TypeVar("T")


@dataclass
class Context:
    """How the verb was called."""

    debug: bool = False
    json: bool = False
    on_host: str | None = None

    @cached_property
    def host(self) -> HostApi:
        """The host that the verb is about: the one asked for by --host or $POLYVISOR_HOST, or this machine."""
        if self._host_name is not None:
            from polyvisor.cli.remote import named_host

            return named_host(self._host_name)
        from polyvisor.host.host import Host

        return Host()

    @property
    def is_elsewhere(self) -> bool:
        """Whether the verb is about another machine."""
        return self._host_name is not None

    @property
    def _host_name(self) -> str | None:
        """The host asked for. An empty --host, as of a variable that is not set, is a mistake, and not this machine."""
        return os.environ.get("POLYVISOR_HOST") or None if self.on_host is None else self.on_host

    @cached_property
    def progress(self) -> Display:
        """The progress callback: a bar on a terminal, some lines elsewhere."""
        from polyvisor.cli.progress import Display

        return Display(quiet=self.json)

    def run(self, work: Coroutine[Any, Any, T], *, in_event_loop: bool = True) -> T:
        """Run the verb's coroutine to its end; the progress bar is gone by then, and the connection to a host closed."""
        closing = self._closing(work, in_event_loop)
        try:
            return waiting.run(closing, startup.ready)
        finally:
            for coroutine in closing, work:  # Ctrl-C may come before they have begun
                coroutine.close()
            if "progress" in self.__dict__:
                self.progress.close()

    def begin(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a verb that often needs no event loop, and asks for it where it does (see `waiting`)."""
        return self.run(work, in_event_loop=False)

    async def _closing(self, work: Coroutine[Any, Any, T], in_event_loop: bool) -> T:
        try:
            if in_event_loop or self._host_name is not None:
                await waiting.event_loop()
            return await work
        finally:
            if "host" in self.__dict__:
                await self.host.close()

    def say(self, text: str) -> None:
        """A line for a person; not with --json."""
        if not self.json:
            print(self.line(text))

    def note(self, text: str) -> None:
        """A line for a person beside the output proper."""
        if not self.json:
            print(self.line(text), file=sys.stderr)

    def line(self, text: str) -> str:
        """`text`, which may come from another machine, as a line for a terminal."""
        return one_line(self.advice(text))

    def advice(self, text: str) -> str:
        """`text` with every command that it names made one for the host of --host: hints are written where it happens."""
        if not self.on_host:
            return text
        from polyvisor.cli.main import VERBS

        verbs = "|".join(["host prepare", *(verb for verb in VERBS if verb not in ("host", "completion"))])
        return re.sub(rf"\bpolyvisor (?=(--debug )?({verbs})\b)", lambda _: f"polyvisor --host {self.on_host} ", text)

    def print_json(self, value: object) -> None:
        print(to_json(value))


def to_json(value: object, *, indent: int | None = 2) -> str:
    """`value`, of dataclasses, enums and plain data, as JSON."""
    import dataclasses
    import json

    def plain(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        return str(item)

    text = json.dumps(value, default=plain, indent=indent, ensure_ascii=False)
    # JSON leaves these as they are, and terminals obey them.
    return re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)


def report(error: PolyvisorError, context: Context) -> None:
    """Say on stderr what failed and what to do about it: one line, and the trace with --debug."""
    if context.debug:
        import traceback

        trace = "".join(traceback.format_exception(error))
        if isinstance(error, ProcessFailed):
            trace += f"command: {error.command()}\n{error.stderr.rstrip()}"
        for line in trace.splitlines():
            print(escaped(line), file=sys.stderr)
    told = error.hint and context.advice(error.hint)
    if context.json:
        print(to_json({"error": {**error.to_dict(), "hint": told}}, indent=None), file=sys.stderr)
        return
    hint = f" ({told})" if told else ""
    print(one_line(f"polyvisor: {' '.join(error.message.split())}{hint}"), file=sys.stderr)
