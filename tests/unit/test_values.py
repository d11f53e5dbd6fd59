"""Our dataclasses behave as those of the standard library do."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, asdict, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import pytest

from polyvisor.values import dataclass


@dataclass(frozen=True)
class Point:
    """Two numbers."""

    x: int
    y: int = 0

    @cached_property
    def sum(self) -> int:
        return self.x + self.y


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One with all that a field can have."""

    count: int = 1
    name: str
    at: tuple[Point, ...] = (Point(1),)
    labels: dict[str, str] = field(default_factory=dict, metadata={"about": "x"})

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count")

    def __str__(self) -> str:
        return self.name


def test_values_are_given_by_name_or_place_or_default() -> None:
    assert (Point(1, 2).x, Point(1, y=2).y, Point(1).y, Point(y=3, x=4).x) == (1, 2, 0, 4)
    thing = Thing(name="a")
    assert (thing.count, thing.at, thing.labels, str(thing)) == (1, (Point(1, 0),), {}, "a")
    assert thing.labels is not Thing(name="a").labels


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        (Point, (), {}),
        (Point, (1, 2, 3), {}),
        (Point, (1,), {"x": 2}),
        (Point, (1,), {"z": 2}),
        (Point, (), {"y": 2, "z": 2}),
        (Thing, ("a",), {}),
        (Thing, (), {"count": 2}),
        (Thing, (), {"name": "a", "size": 1}),
    ],
)
def test_wrong_arguments_are_refused(kind: type, values: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=kind.__name__):
        kind(*values, **named)


def test_they_are_checked_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="count"):
        Thing(name="a", count=-1)
    with pytest.raises(ValueError, match="count"):
        replace(Thing(name="a"), count=-1)


def test_equal_by_their_fields_alone() -> None:
    one, same = Point(1, 2), Point(1, 2)
    assert one.sum == 3  # is kept in `one`, and is no field
    assert one == same
    assert hash(one) == hash(same)
    assert one != Point(1, 3)
    assert one != object()
    assert Thing(name="a") != Thing(name="b")
    with pytest.raises(TypeError):
        hash(Thing(name="a"))  # a dict in it


def test_they_are_shown_with_their_fields() -> None:
    assert repr(Point(1, 2)) == "Point(x=1, y=2)"
    assert repr(Thing(name="a", at=())) == "Thing(count=1, name='a', at=(), labels={})"


def test_they_stay_as_they_are() -> None:
    point = Point(1)
    with pytest.raises(FrozenInstanceError, match="'x'"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError, match="'x'"):
        del point.x
    assert point == Point(1)


def test_what_works_with_dataclasses_works_with_them() -> None:
    assert is_dataclass(Point)
    assert [f.name for f in fields(Thing)] == ["count", "name", "at", "labels"]
    assert fields(Thing)[3].metadata == {"about": "x"}
    assert replace(Point(1), y=5) == Point(1, 5)
    assert asdict(Thing(name="a")) == {"count": 1, "name": "a", "at": ({"x": 1, "y": 0},), "labels": {}}
    for other in copy.copy(Point(1, 2)), copy.deepcopy(Point(1, 2)), pickle.loads(pickle.dumps(Point(1, 2))):
        assert other == Point(1, 2)
    match Point(1, 2):
        case Point(x, y):
            assert (x, y) == (1, 2)
