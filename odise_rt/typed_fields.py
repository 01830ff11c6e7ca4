"""Dataclasses whose fields are checked by their type hints: read from JSON, or made in code.

A hint is ``bool``, ``int``, ``float``, ``str``, a ``Literal``, a ``tuple`` (a list in JSON) or such a dataclass.
Numbers are finite, and stay inside the :class:`Range` that an ``Annotated`` hint gives them.
"""

from __future__ import annotations

import dataclasses
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_WORDS: Mapping[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class FieldError(ValueError):
    """A field that is missing, unknown, or holds something else than its hint says; the message names it."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included: ``Annotated[int, Range(1, 1000)]``."""

    low: float
    high: float


def read_fields(kind: type[T], data: Any, name: str = "") -> T:
    """Rebuild a dataclass from JSON of what ``dataclasses.asdict`` gave for it.

    Args:
        kind: the dataclass. Every field must be there: none falls back to its default.
        data: parsed JSON.
        name: name of the field that holds it, for messages; empty at the top.

    Raises:
        FieldError: naming the first field that does not fit.
    """
    if not isinstance(data, Mapping):
        raise FieldError(f"{name or kind.__name__} is {reprlib.repr(data)}: expected an object with named fields")
    hints, prefix = get_type_hints(kind, include_extras=True), f"{name}." if name else ""
    missing = [prefix + field for field in hints if field not in data]
    unknown = [prefix + str(field) for field in data if field not in hints]
    problems = [
        f"{what} {', '.join(fields[:5])}" for what, fields in (("missing", missing), ("unknown", unknown)) if fields
    ]
    if problems:
        raise FieldError("; ".join(problems))
    return kind(**{field: _checked(hint, data[field], prefix + field) for field, hint in hints.items()})


def check_fields(value: Any, name: str = "") -> None:
    """Check a dataclass that was made in code, and those inside it; raises :class:`FieldError`."""
    for field, hint in get_type_hints(type(value), include_extras=True).items():
        _checked(hint, getattr(value, field), f"{name}.{field}" if name else field)


def _checked(hint: Any, value: Any, name: str) -> Any:
    """The value with lists as tuples, objects as dataclasses and whole numbers as floats, where the hint says so."""
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        if not isinstance(value, hint):
            return read_fields(hint, value, name)
        check_fields(value, name)
        return value
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if isinstance(value, list | tuple):
            kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
            if len(kinds) == len(value):
                items = enumerate(zip(kinds, value, strict=True))
                return tuple(_checked(kind, item, f"{name}[{index}]") for index, (kind, item) in items)
    elif _fits(hint, value):
        return float(value) if _number_of(hint)[0] is float else value
    raise FieldError(f"{name} is {reprlib.repr(value)}: expected {_described(hint)}")


def _number_of(hint: Any) -> tuple[Any, Range | None]:
    """The plain type of a hint, and its range if it has one."""
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        return kind, next((note for note in notes if isinstance(note, Range)), None)
    return hint, None


def _fits(hint: Any, value: Any) -> bool:
    kind, bounds = _number_of(hint)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        # Not isfinite, which does not take whole numbers beyond those of a float.
        sound = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    else:
        # bool is an int to Python, and none to a person.
        sound = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return sound and (bounds is None or bounds.low <= value <= bounds.high)


def _described(hint: Any) -> str:
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return "a list" if kinds[-1] is ... else f"a list of {len(kinds)}"
    kind, bounds = _number_of(hint)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if bounds is None:
        return _WORDS[kind]
    if bounds.low == bounds.high:
        return f"{bounds.low}"
    return f"{_WORDS[kind]} from {bounds.low} to {bounds.high}"
