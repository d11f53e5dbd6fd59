"""Frozen dataclasses that are quick to define.

`dataclasses.dataclass` writes six methods for every class and compiles them, whenever a command starts: with the thirty
classes that `ls` loads this took a sixth of its time. Here all classes share theirs, which go by the list of fields. To users
and type checkers they are dataclasses: `fields`, `replace`, `asdict`, defaults and `__post_init__` do as ever.
"""

from __future__ import annotations

import dataclasses

__all__ = ["dataclass"]

TYPE_CHECKING = False  # the real one costs the import of typing
if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass
    from typing import Any
else:

    def dataclass(*, frozen: bool, kw_only: bool = False) -> Callable[[type], type]:
        """As `dataclasses.dataclass`, for frozen classes without slots."""
        assert frozen  # noqa: S101 - the other kind is of the standard library

        def define(cls: type) -> type:
            dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=kw_only)(cls)
            fields = dataclasses.fields(cls)
            cls.__names__ = dict.fromkeys(field.name for field in fields).keys()
            cls.__positional__ = tuple(field.name for field in fields if not field.kw_only)
            cls.__defaults__ = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
            cls.__factories__ = {
                f.name: f.default_factory for f in fields if f.default_factory is not dataclasses.MISSING
            }
            for name, method in _METHODS.items():
                if name not in cls.__dict__:
                    setattr(cls, name, method)
            return cls

        return define


def _init(self: Any, *values: Any, **named: Any) -> None:
    if values:
        given = dict(zip(self.__positional__, values, strict=False))
        if len(given) < len(values) or not given.keys().isdisjoint(named):
            raise TypeError(f"{type(self).__name__}() takes no more than {', '.join(self.__positional__) or 'names'}")
        named |= given
    own = self.__dict__
    own.update(self.__defaults__)
    own.update(named)
    for name, factory in self.__factories__.items():
        if name not in named:
            own[name] = factory()
    if own.keys() != self.__names__:
        wrong = ", ".join(sorted(own.keys() ^ self.__names__))
        raise TypeError(f"{type(self).__name__}() misses these, or does not know them: {wrong}")
    if hasattr(self, "__post_init__"):
        self.__post_init__()


def _values(self: Any) -> tuple[Any, ...]:
    return tuple([getattr(self, name) for name in self.__names__])


def _repr(self: Any) -> str:
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__names__)})"


def _equal(self: Any, other: object) -> bool:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _set(self: Any, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field '{name}'")


def _delete(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field '{name}'")


_METHODS = {
    "__init__": _init,
    "__repr__": _repr,
    "__eq__": _equal,
    "__hash__": _hash,
    "__setattr__": _set,
    "__delattr__": _delete,
}
