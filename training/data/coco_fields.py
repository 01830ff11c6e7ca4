"""Reads the fields of COCO's annotation files.

Whatever does not fit is a :class:`DatasetError` that names the file, or where in it the field is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from odise_rt.errors import DatasetError
from training.data.picture_files import ImageId


def read_coco(path: Path, required: tuple[str, ...]) -> dict[str, Any]:
    """A COCO file, whose lists of these names must be there and not be empty.

    Raises:
        DatasetError: missing, broken, or without one of the lists.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist: expected a COCO annotation file") from None
    except (OSError, ValueError) as exc:
        raise DatasetError(f"{path} cannot be read as JSON ({exc}): download or draw it again") from exc
    if not isinstance(content, dict):
        raise DatasetError(f"{path} holds a {type(content).__name__}: expected an object with {', '.join(required)}")
    for key in required:
        if not isinstance(content.get(key), list):
            raise DatasetError(f"{path} lacks the list {key!r}: expected a COCO file with {', '.join(required)}")
        if not content[key]:
            raise DatasetError(f"{path}: {key!r} is empty; expected at least one entry")
    return content


def field_of(entry: Any, key: str, where: str) -> Any:
    """The value of a field, whatever it is."""
    if not isinstance(entry, dict) or key not in entry:
        raise DatasetError(f"{where} lacks {key!r}")
    return entry[key]


def number_of(entry: Any, key: str, where: str) -> int:
    """A whole number, perhaps written as text."""
    value = field_of(entry, key, where)
    written = isinstance(value, str) and value.isdecimal()
    if not written and (isinstance(value, bool) or not isinstance(value, int)):
        raise DatasetError(f"{where} has {key} {value!r}: expected a whole number")
    return int(value)


def positive_of(entry: Any, key: str, where: str) -> float:
    """A finite number above 0."""
    value = field_of(entry, key, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DatasetError(f"{where} has {key} {value!r}: expected a number above 0")
    return value


def text_of(entry: Any, key: str, where: str) -> str:
    """A text of at least one letter, without space around it."""
    value = field_of(entry, key, where)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(f"{where} has {key} {value!r}: expected text")
    return value.strip()


def flag_of(entry: Any, key: str, where: str) -> bool:
    """0 or 1."""
    value = field_of(entry, key, where)
    if value not in (0, 1):
        raise DatasetError(f"{where} has {key} {value!r}: expected 0 or 1")
    return bool(value)


def image_id_of(entry: Any, key: str, where: str) -> ImageId:
    """A number where it is one, else text, such as ADE20K's ``ADE_val_00000001``."""
    value = field_of(entry, key, where)
    named = isinstance(value, str) and not value.isdecimal()
    return text_of(entry, key, where) if named else number_of(entry, key, where)
