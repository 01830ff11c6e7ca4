"""Dataclasses from JSON, and what their hints refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from odise_rt.typed_fields import FieldError, Range, check_fields, read_fields


@dataclass(frozen=True)
class Point:
    x: float = 0.0
    y: Annotated[float, Range(0, 1)] = 0.0


@dataclass(frozen=True)
class Shape:
    kind: Literal["line", "area"]
    points: tuple[Point, ...]
    size: tuple[int, int]
    closed: bool


SQUARE = {"kind": "area", "points": [{"x": 1, "y": 0.5}], "size": [3, 4], "closed": True}


def test_lists_become_tuples_and_whole_numbers_floats() -> None:
    shape = read_fields(Shape, SQUARE)
    assert shape == Shape("area", (Point(1.0, 0.5),), (3, 4), True)
    assert isinstance(shape.points[0].x, float)
    check_fields(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dot"}, r"kind is 'dot': expected 'line' or 'area'"),
        ({"kind": {}}, r"kind is {}: expected 'line'"),
        ({"points": [{"x": 1, "y": 2}]}, r"points\[0\].y is 2: expected a number from 0 to 1"),
        ({"points": [{"x": 1}]}, r"missing points\[0\].y"),
        ({"points": {}}, r"points is {}: expected a list"),
        ({"size": [1]}, r"size is \[1\]: expected a list of 2"),
        ({"size": [1, 2.0]}, r"size\[1\] is 2.0: expected a whole number"),
        ({"size": [1, True]}, r"size\[1\] is True: expected a whole number"),
        ({"closed": 1}, r"closed is 1: expected true or false"),
        ({"colour": 1}, r"unknown colour"),
    ],
)
def test_a_field_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        read_fields(Shape, SQUARE | change)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(FieldError, match=r"Shape is \[\]: expected an object"):
        read_fields(Shape, [])


def test_what_was_made_in_code_is_checked_inside_as_well() -> None:
    with pytest.raises(FieldError, match=r"points\[0\].y is 7: expected a number from 0 to 1"):
        check_fields(Shape("area", (Point(1.0, 7),), (3, 4), True))
