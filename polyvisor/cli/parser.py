"""argparse with errors like all our others: one line, with a hint."""

from __future__ import annotations

import argparse
import re
from functools import partial
from typing import Any, NoReturn

from polyvisor.errors import InvalidInput, PolyvisorError

COMMON = {"--json": "print JSON", "--debug": "show traces and the hypervisor's exact command"}
HOST = "--host"
ON_HOST = "do it on this host: a name (polyvisor host ls) or user@address; by default $POLYVISOR_HOST, or this machine"


class UsageError(PolyvisorError):
    """The command line itself is wrong: an unknown verb or flag, or one that is missing."""

    code = "usage"
    exit_status = 2
    http_status = 422


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of printing its usage and exiting."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # argparse makes a formatter for every flag, to try out its metavar; that need not measure the terminal each time.
        options.setdefault("formatter_class", partial(argparse.HelpFormatter, width=80))
        # A flag that is cut short would change its meaning with the next flag that begins like it.
        super().__init__(*arguments, **{"allow_abbrev": False, **options})
        # Every verb, and every verb below a verb, takes these. They may stand on either side of it, so none has a default.
        for flag, about in COMMON.items():
            self.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=about)
        self.add_argument(HOST, metavar="HOST", dest="on_host", default=argparse.SUPPRESS, help=ON_HOST)

    def format_help(self) -> str:
        self.formatter_class = argparse.HelpFormatter
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(_shorter(message), hint=_nearest(message) or f"{self.prog} --help tells more")


def seconds(text: str) -> float:
    """The value of a --timeout; raises InvalidInput."""
    if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        raise InvalidInput("timeout", text, "is not a time", hint="write seconds, as 90 or 2.5")
    return float(text)


def _shorter(message: str) -> str:
    """argparse's message without the list of all the choices."""
    return re.sub(r" \(choose from .*\)$", "", message)


def _nearest(message: str) -> str | None:
    match = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
    if match is None:
        return None
    choices = [choice.strip().strip("'") for choice in match[2].split(",")]
    from difflib import get_close_matches

    near = get_close_matches(match[1], choices, 1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose from {', '.join(choices)}" if len(choices) < 8 else None
