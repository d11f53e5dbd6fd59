"""What makes the command line start quickly, in one place; everything else imports and runs as usual.

asyncio is most of what there is to load, and most verbs can do without it, or until QEMU has been started. So `quicken` puts a
module in its place that loads it at its first use, and `ready` loads it without TLS, which it knows to do without and
nothing here uses through it. The same holds for inspect, which dataclasses need for classes without a docstring alone,
and for others that are imported in many places and seldom used.
(importlib.util.LazyLoader is meant for this, but before Python 3.12 the second module that imports the deferred one already
counts as a use.) Until `ready` no garbage is collected: nothing that is imported becomes any, and looking for it would take
a tenth of the time.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAMES = ("asyncio", "inspect", "ipaddress", "shlex", "shutil", "subprocess")


class _Deferred(ModuleType):
    """Stands in for a module, and becomes it when it is first asked for anything."""

    def __getattr__(self, attribute: str) -> Any:
        # `from NAME import` looks whether NAME is a package; of these asyncio alone is one.
        if attribute == "__path__" and self.__name__ != "asyncio":
            raise AttributeError(attribute)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        self.__dict__.update(import_module(self.__name__).__dict__)
        self.__class__ = ModuleType  # type: ignore[assignment]
        return getattr(self, attribute)


def quicken() -> None:
    """Begin the start-up: call it before anything is imported that imports one of these."""
    gc.disable()
    for name in NAMES:
        if name not in sys.modules:
            sys.modules[name] = _Deferred(name)
    if "gettext" not in sys.modules:
        # What argparse takes of it, in English as all the rest; looking for translations takes longer than parsing.
        untranslated = sys.modules["gettext"] = _Deferred("gettext")
        untranslated.__dict__.update(gettext=str, ngettext=lambda one, many, number: one if number == 1 else many)


def ready() -> None:
    """End the start-up: asyncio is about to be used."""
    without_tls = "ssl" not in sys.modules
    if without_tls:
        sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        getattr(sys.modules["asyncio"], "run")  # noqa: B009 - any attribute loads it
    finally:
        if without_tls:
            del sys.modules["ssl"]
    gc.enable()
