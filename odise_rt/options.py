"""What a caller may change for one segmentation. ``None`` means the model's own value."""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Literal, TypeGuard, cast

from odise_rt.errors import OptionsError
from odise_rt.specs import MAX_EDGE, ModelFacts

Output = Literal["panoptic", "semantic", "instance"]
OUTPUTS: tuple[Output, ...] = ("panoptic", "semantic", "instance")

DEFAULT_MAX_PIXELS = 64_000_000
"""Largest accepted image: 64 megapixels are 192 MB decoded, more than any model input needs."""
MAX_IMAGE_EDGE = 65_535
"""Most pixels along an edge of an image as given, JPEG's own bound: work along an edge does not grow beyond it."""
MAX_EXPLAIN = 100
"""Most candidates that a segment can carry."""


@dataclass(frozen=True)
class SegmentOptions:
    """Options of :meth:`odise_rt.Segmenter.segment`.

    Raises:
        OptionsError: a value is outside its range.
    """

    outputs: tuple[Output, ...] = ("panoptic",)
    """Results to compute; panoptic is always among them."""
    object_mask_threshold: float | None = None
    """Panoptic: masks must score strictly above this, in [0, 1]. ``None``: the model's (0.0 as published)."""
    overlap_threshold: float | None = None
    """Panoptic: a segment must keep at least this share of its mask, in [0, 1]. ``None``: the model's (0.8 as
    published; the official demo uses 0)."""
    clip_weight_seen: float | None = None
    """Weight w of CLIP in p^(1-w) * p_clip^w for classes of the training vocabulary. ``None``: the model's (0.3 label,
    0.35 caption)."""
    clip_weight_unseen: float | None = None
    """The same for other classes. ``None``: the model's (0.7 label, 0.65 caption)."""
    unknown: float | None = None
    """A mask whose best word does not reach this probability is called "unknown", in [0, 1]. ``None``: every mask gets
    its best word, however unlikely. See :meth:`odise_rt.Vocabulary.with_unknown`."""
    explain: int = 5
    """Best names that every segment carries as :attr:`odise_rt.Segment.candidates`, 0 to 100."""
    instances_per_image: int | None = None
    """Instance: the best pairs of mask and class that are kept. ``None``: the model's (100)."""
    short_edge: int | None = None
    """Pixels of the image's shorter edge inside the network. ``None``: the model's (1024 at full size). Cost grows with
    its square."""
    long_edge: int | None = None
    """Upper bound in pixels on the longer edge. ``None``: the model's (2560 at full size)."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Images of more pixels are refused before they are decoded; whatever it is, so are those with an edge above 65,535
    pixels."""
    windows_per_batch: int | None = None
    """Windows that run at a time; fewer need less memory, results agree to rounding. ``None``: chosen by the engine, or
    half of that, and so on, where memory ran out once since the segmenter was loaded."""

    def __post_init__(self) -> None:
        if isinstance(self.outputs, str):
            object.__setattr__(self, "outputs", (self.outputs,))
        if not isinstance(self.outputs, tuple | list | set | frozenset):
            raise OptionsError(f"outputs is {self.outputs!r:.60}: expected some of {list(OUTPUTS)}")
        unknown = [o for o in self.outputs if o not in OUTPUTS]
        if unknown:
            raise OptionsError(f"outputs has {unknown}: expected some of {list(OUTPUTS)}")
        ordered = tuple(o for o in OUTPUTS if o == "panoptic" or o in self.outputs)
        object.__setattr__(self, "outputs", ordered)
        for name in ("object_mask_threshold", "overlap_threshold", "clip_weight_seen", "clip_weight_unseen", "unknown"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value <= 1):
                otherwise = "to name every mask" if name == "unknown" else "for the model's"
                raise OptionsError(f"{name} is {value!r}: expected a number in [0, 1], or None {otherwise}")
            if value is not None:
                object.__setattr__(self, name, float(value))  # numpy's, too
        if not is_whole(self.explain) or not 0 <= self.explain <= MAX_EXPLAIN:
            raise OptionsError(f"explain is {self.explain!r}: expected a whole number from 0 to {MAX_EXPLAIN}")
        object.__setattr__(self, "explain", int(self.explain))
        for name in ("instances_per_image", "short_edge", "long_edge", "windows_per_batch", "max_pixels"):
            value = getattr(self, name)
            if value is None and name != "max_pixels":
                continue
            if not is_whole(value) or value < 1:
                raise OptionsError(f"{name} is {value!r}: expected a whole number of at least 1")
            object.__setattr__(self, name, int(value))
        if self.short_edge is not None and self.long_edge is not None and self.long_edge < self.short_edge:
            raise OptionsError(f"long_edge {self.long_edge} is below short_edge {self.short_edge}: swap them")
        for name in ("short_edge", "long_edge"):
            value = getattr(self, name)
            if value is not None and value > MAX_EDGE:
                raise OptionsError(f"{name} is {value}: expected at most {MAX_EDGE}")

    def resolve(self, facts: ModelFacts) -> ResolvedOptions:
        """Fill in the model's own values."""
        values = {
            "object_mask_threshold": facts.object_mask_threshold,
            "overlap_threshold": facts.overlap_threshold,
            "clip_weight_seen": facts.clip_weight_seen,
            "clip_weight_unseen": facts.clip_weight_unseen,
            "instances_per_image": facts.instances_per_image,
            "short_edge": facts.test_short_edge,
            "long_edge": facts.test_long_edge,
        }
        given = {name: getattr(self, name) for name in values if getattr(self, name) is not None}
        values |= given
        if values["long_edge"] < values["short_edge"]:
            # One was given, the other is the model's: the given one decides.
            other = "long_edge" if "short_edge" in given else "short_edge"
            values[other] = values["short_edge" if other == "long_edge" else "long_edge"]
        return ResolvedOptions(
            outputs=self.outputs,
            object_mask_threshold=float(values["object_mask_threshold"]),
            overlap_threshold=float(values["overlap_threshold"]),
            clip_weight_seen=float(values["clip_weight_seen"]),
            clip_weight_unseen=float(values["clip_weight_unseen"]),
            unknown=self.unknown,
            explain=self.explain,
            instances_per_image=int(values["instances_per_image"]),
            short_edge=int(values["short_edge"]),
            long_edge=int(values["long_edge"]),
            max_pixels=self.max_pixels,
            windows_per_batch=self.windows_per_batch,
        )


def given_options(options: SegmentOptions | None) -> SegmentOptions:
    """A caller's argument as SegmentOptions; ``None`` stands for the model's own.

    Raises:
        OptionsError: the argument is something else.
    """
    if options is None:
        return SegmentOptions()
    if not isinstance(options, SegmentOptions):
        raise OptionsError(f"options came as {type(options).__name__}: expected SegmentOptions or None")
    return options


@dataclass(frozen=True)
class ResolvedOptions:
    """:class:`SegmentOptions` with every value filled in; recorded in the result."""

    outputs: tuple[Output, ...]
    object_mask_threshold: float
    overlap_threshold: float
    clip_weight_seen: float
    clip_weight_unseen: float
    unknown: float | None
    explain: int
    instances_per_image: int
    short_edge: int
    long_edge: int
    max_pixels: int
    windows_per_batch: int | None

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return cast("dict[str, object]", dataclasses.asdict(self) | {"outputs": list(self.outputs)})


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, numpy's included, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, numpy's included, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
