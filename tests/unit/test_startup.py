"""The command line's quick start: asyncio is loaded when it is first used, without TLS, and works then as ever."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> str:
    """What `code` prints in a Python of its own, which must succeed."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


DEFER = "import sys; from polyvisor.cli import startup; startup.quicken()\n"
LOADED = "print('asyncio.base_events' in sys.modules)"


def test_importing_it_again_does_not_load_it() -> None:
    assert python(f"{DEFER}import asyncio\nimport asyncio\n{LOADED}") == "False"


@pytest.mark.parametrize("use", ["asyncio.sleep", "from asyncio import sleep", "import asyncio.queues"])
def test_using_it_loads_it(use: str) -> None:
    assert python(f"{DEFER}import asyncio\n{use}\n{LOADED}") == "True"


def test_who_imported_it_before_gets_the_same_things() -> None:
    code = "import asyncio as early\nstartup.ready()\nimport asyncio as late\n"
    assert python(f"{DEFER}{code}print(early.Task is late.Task, early.run(early.sleep(0, 7)))") == "True 7"


def test_tls_is_there_for_those_who_need_it() -> None:
    code = "startup.ready()\nimport ssl, gc, asyncio.sslproto as s\nprint(ssl.HAS_TLSv1_2, s.ssl, gc.isenabled())"
    assert python(DEFER + code) == "True None True"


def test_it_changes_nothing_where_asyncio_is_there_already() -> None:
    assert python("import asyncio as early\n" + DEFER + "import asyncio\nprint(early is asyncio)") == "True"


def test_dataclasses_do_without_inspect_until_somebody_uses_it() -> None:
    code = (
        "import polyvisor.host.api, inspect\nprint('ast' in sys.modules, inspect.isfunction(len), 'ast' in sys.modules)"
    )
    assert python(DEFER + code) == "False False True"


@pytest.mark.parametrize("verb", ["ls", "run tiny"])
def test_a_verb_loads_nothing_that_it_can_do_without(verb: str) -> None:
    code = f"""from polyvisor.cli.main import parse
parse({verb.split()})
dispensable = (*startup.NAMES, "gettext", "locale", "threading")
print([name for name in dispensable if "__file__" in vars(sys.modules.get(name, object))])"""
    assert python(DEFER + code) == "[]"
