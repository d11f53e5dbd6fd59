"""argparse with errors like all our others: one line, with a hint."""

from __future__ import annotations

import argparse
import re
from difflib import get_close_matches
from typing import NoReturn

from polyvisor.errors import PolyvisorError


class UsageError(PolyvisorError):
    """The command line itself is wrong: an unknown verb or flag, or one that is missing."""

    code = "usage"
    exit_status = 2
    http_status = 422


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(_shorter(message), hint=_nearest(message) or f"{self.prog} --help tells more")


def _shorter(message: str) -> str:
    """argparse's message without the list of all the choices."""
    return re.sub(r" \(choose from .*\)$", "", message)


def _nearest(message: str) -> str | None:
    match = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
    if match is None:
        return None
    choices = [choice.strip().strip("'") for choice in match[2].split(",")]
    near = get_close_matches(match[1], choices, 1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose from {', '.join(choices)}" if len(choices) < 8 else None
