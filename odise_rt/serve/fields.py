"""The fields of a request: parsed and documented from one table.

Each may come as a part of a multipart form or as a query parameter. Unknown and repeated ones are refused, so that a
typing error does not silently mean the default.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from odise_rt.options import MAX_EXPLAIN, OUTPUTS, SegmentOptions
from odise_rt.serve.problems import RequestRefused

FORMATS = ("json", "png", "overlay", "coco")
MASKS = ("rle", "none")


@dataclass(frozen=True)
class Field:
    """One field."""

    parse: Callable[[str], Any]
    """Text to value; raises ValueError."""
    schema: dict[str, Any]
    """JSON schema, for the documentation."""
    description: str
    option: bool = False
    """Whether it is a field of :class:`odise_rt.SegmentOptions`."""
    formats: tuple[str, ...] = FORMATS
    """In which it shows."""


def _choice(names: Iterable[str]) -> Callable[[str], str]:
    known = tuple(names)

    def parse(text: str) -> str:
        if text not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return text

    return parse


def _whole(text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,11}", text.strip()):
        raise ValueError("expected a whole number")
    return int(text)


def _number(text: str) -> float:
    try:
        if not text.isascii() or "_" in text:  # Python reads 0_5 as 5, and digits of every script
            raise ValueError
        return float(text)
    except ValueError:
        raise ValueError("expected a number") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _share(description: str) -> Field:
    return Field(_number, {"type": "number", "minimum": 0, "maximum": 1}, description, option=True)


def _pixels(description: str) -> Field:
    return Field(_whole, {"type": "integer", "minimum": 1}, description, option=True)


FIELDS: dict[str, Field] = {
    "vocabulary": Field(
        str,
        {"type": "string", "example": "black pickup truck, pickup truck; stuff: blue sky, sky"},
        "Words: ';' or a new line ends a class, ',' separates synonyms, 'thing:' or 'stuff:' before a class sets its "
        "kind. Or JSON: a list of classes, {'things': [...], 'stuff': [...]} or {name: [synonyms]}.",
    ),
    "vocabulary_name": Field(
        str, {"type": "string", "example": "coco"}, "Instead of words: a vocabulary of GET /v1/vocabularies."
    ),
    "format": Field(
        _choice(FORMATS),
        {"type": "string", "enum": list(FORMATS), "default": "json"},
        "json: segments with RLE masks. png: segment ids as R + 256 G + 65536 B, the segments as JSON in the text "
        "chunk 'odise_rt'. overlay: a picture for people. coco: COCO panoptic JSON with the PNG in base64.",
    ),
    "masks": Field(
        _choice(MASKS),
        {"type": "string", "enum": list(MASKS), "default": "rle"},
        "Format json: whether results carry their masks as COCO run-length encoding.",
        formats=("json",),
    ),
    "outputs": Field(
        _names,
        {"type": "string", "example": "panoptic,instance"},
        f"Format json: results to compute, separated by commas, of {', '.join(OUTPUTS)}. Instances, and the classes of "
        "the semantic map, come beside the panoptic segments, which are always there.",
        option=True,
        formats=("json",),
    ),
    "object_mask_threshold": _share("Masks must score above this."),
    "overlap_threshold": _share("A segment must keep at least this share of its mask."),
    "clip_weight_seen": _share("Weight of CLIP for classes seen in training."),
    "clip_weight_unseen": _share("Weight of CLIP for other classes."),
    "unknown": _share("Call segments whose best word does not reach this probability 'unknown'."),
    "explain": Field(
        _whole,
        {"type": "integer", "minimum": 0, "maximum": MAX_EXPLAIN, "default": 0},
        "Formats json and png: give each segment so many of its best names with both classifiers' scores; 0: none.",
        option=True,
        formats=("json", "png"),
    ),
    "instances_per_image": Field(
        _whole,
        {"type": "integer", "minimum": 1},
        "With outputs=instance: those that are kept, best first; the model's own number is the upper bound.",
        option=True,
        formats=("json",),
    ),
    "short_edge": _pixels("Pixels of the image's shorter edge inside the network; the server has an upper bound."),
    "long_edge": _pixels("Bound on the longer edge; the server has an upper bound."),
}
OPTIONS = tuple(name for name, field in FIELDS.items() if field.option)
"""Those that are fields of :class:`odise_rt.SegmentOptions`."""
IMAGE = "image"
"""Name of the multipart part that holds the encoded image."""


def parse_fields(given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Values of the fields of a request.

    Raises:
        RequestRefused: a field is unknown, repeated or malformed, or would change nothing, or there is not exactly one
            vocabulary.
    """
    values: dict[str, Any] = {}
    for name, text in given:
        field = FIELDS.get(name)
        if field is None:
            shown = name[:40].encode("ascii", "backslashreplace").decode()
            raise RequestRefused("bad_options", f"there is no field {shown!r}: expected {IMAGE}, {', '.join(FIELDS)}")
        if name in values:
            raise RequestRefused("bad_options", f"{name} was given more than once: keep one")
        try:
            values[name] = field.parse(text)
        except ValueError as exc:
            shown = text[:40].encode("ascii", "backslashreplace").decode()
            raise RequestRefused("bad_options", f"{name} is {shown!r}: {exc}") from exc
    form = values.get("format", FORMATS[0])
    for name in values:
        if form not in FIELDS[name].formats:
            shown = ", ".join(FIELDS[name].formats)
            raise RequestRefused("bad_options", f"{name} shows in format {shown} alone, not in {form}: leave it out")
    if "instances_per_image" in values and "instance" not in values.get("outputs", ()):
        raise RequestRefused("bad_options", "instances_per_image needs outputs=instance: add it, or leave this out")
    if ("vocabulary" in values) == ("vocabulary_name" in values):
        raise RequestRefused(
            "bad_vocabulary",
            "expected one vocabulary: words in the field 'vocabulary' ('truck, pickup; stuff: sky'), or a name of "
            "/v1/vocabularies in 'vocabulary_name'",
        )
    return values


def segment_options(values: Mapping[str, Any], max_pixels: int) -> SegmentOptions:
    """The options of a request. One that asks for no names gets none: ``explain`` is 0 unless it is given.

    Args:
        values: of :data:`FIELDS`; those of no option are left alone.
        max_pixels: of the server; clients cannot change it.

    Raises:
        OptionsError: a value is out of range.
    """
    given = {name: values[name] for name in OPTIONS if name in values}
    return SegmentOptions(max_pixels=max_pixels, **({"explain": 0} | given))
