"""What the page draws of a result: regions with colours, names and places for labels, and a map of who owns each pixel.

All three kinds of result become one form, a :class:`PanopticResult` whose segments are what is shown. The page, the
picture to download and the JSON to download are made from it, so that they agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import numpy as np

from odise_rt import rle
from odise_rt.demo.corrections import NONE, Corrections, corrected, joined
from odise_rt.options import Output
from odise_rt.postprocessing import boxes_and_areas
from odise_rt.results import Candidate, Instance, PanopticResult, Segment
from odise_rt.visualize import Colour, label_places, segment_colours
from odise_rt.vocabulary import Vocabulary

MAX_SHOWN_INSTANCES = 50
"""More overlapping masks than this are a picture of nothing."""


def shown_as(
    result: PanopticResult, mode: Output, least_score: float = 0.0, corrections: Corrections = NONE
) -> PanopticResult:
    """A result with what one mode shows as its segments.

    Args:
        result: with the output that ``mode`` needs.
        mode: ``"panoptic"``: the segments as they are. ``"semantic"``: one segment for each class that owns a pixel;
            such a segment is the sum of many masks, so its score is NaN. ``"instance"``: the best objects, drawn
            over each other with the best on top; ``instances`` are then those of the segments, in their order, and the
            ones without a pixel on top come last.
        least_score: instances below it are left out.
        corrections: made by hand; semantic maps have none.
    """
    return joined(_separate(result, mode, least_score, corrections))[0]


def _separate(result: PanopticResult, mode: Output, least_score: float, corrections: Corrections) -> PanopticResult:
    """As :func:`shown_as`, but what a visitor called by the name of stuff is still a segment of its own."""
    if mode == "semantic":
        return _semantic(result)
    unknown = _unknown_class(result)
    if mode == "instance":
        return _stacked(corrected(_instances(result, least_score), corrections, unknown))
    return corrected(dataclasses.replace(result, instances=None), corrections, unknown)


def on_top(shown: PanopticResult) -> PanopticResult:
    """What :func:`shown_as` gave, for formats in which a pixel belongs to one segment: each has the area and box of
    what is to be seen of it, and those of which nothing is are not there."""
    boxes, areas = boxes_and_areas(shown.segment_map, len(shown.segments))
    measured = zip(shown.segments, boxes, areas, strict=True)
    segments = tuple(dataclasses.replace(s, box=box, area=area) for s, box, area in measured if area)
    return dataclasses.replace(shown, segments=segments, instances=None)


def shown_instances(result: PanopticResult, least_score: float) -> list[Instance]:
    """The instances that a page can show: good enough, and of several names for one mask the best; best first."""
    assert result.instances is not None, "the options asked for instances"
    masks = set()
    chosen = []
    for instance in result.instances:
        mask = (instance.box, instance.bits.tobytes())
        if instance.score >= least_score and mask not in masks:
            masks.add(mask)
            chosen.append(instance)
    return chosen[:MAX_SHOWN_INSTANCES]


def _semantic(result: PanopticResult) -> PanopticResult:
    assert result.semantic_map is not None, "the options asked for the semantic map"
    present, flat = np.unique(result.semantic_map, return_inverse=True)
    segment_map = (flat.reshape(result.semantic_map.shape) + 1).astype(np.int32)
    boxes, areas = boxes_and_areas(segment_map, len(present))
    classes = result.vocabulary
    unknown = _unknown_class(result)
    segments = tuple(
        Segment(i, classes[k].name, k, math.nan, areas[i - 1], boxes[i - 1], classes[k].isthing, unknown=k == unknown)
        for i, k in enumerate(map(int, present), 1)
    )
    return dataclasses.replace(result, segment_map=segment_map, segments=segments)


def _instances(result: PanopticResult, least_score: float) -> PanopticResult:
    """The best objects as segments, not drawn yet."""
    instances = shown_instances(result, least_score)
    unknown = _unknown_class(result)
    segments = tuple(
        Segment(
            i,
            instance.label,
            instance.class_index,
            instance.score,
            instance.area,
            instance.box,
            isthing=True,
            unknown=instance.class_index == unknown,
            candidates=instance.candidates,
        )
        for i, instance in enumerate(instances, 1)
    )
    return dataclasses.replace(result, segments=segments, instances=tuple(instances))


def _stacked(result: PanopticResult) -> PanopticResult:
    """Instances drawn over each other with the first on top, and numbered: first those of which something is seen."""
    assert result.instances is not None
    segment_map = np.zeros(result.size, np.int32)
    for number in range(len(result.instances), 0, -1):
        segment_map[result.instances[number - 1].mask] = number
    seen = np.bincount(segment_map.ravel(), minlength=len(result.instances) + 1)[1:] > 0
    order = [*np.flatnonzero(seen).tolist(), *np.flatnonzero(~seen).tolist()]
    table = np.zeros(len(order) + 1, np.int32)
    table[np.array(order, int) + 1] = np.arange(1, len(order) + 1)
    return dataclasses.replace(
        result,
        segment_map=table[segment_map],
        segments=tuple(dataclasses.replace(result.segments[k], id=i) for i, k in enumerate(order, 1)),
        instances=tuple(result.instances[k] for k in order),
    )


def _unknown_class(result: PanopticResult) -> int | None:
    """Position of the class for what no word fits, where the options have one."""
    return len(result.vocabulary) - 1 if result.facts.options.get("unknown") is not None else None


def colours(shown: PanopticResult, beside: Vocabulary | None = None) -> list[Colour]:
    """A colour for each segment; classes of one name have one colour in both results of a comparison.

    Args:
        shown: from :func:`shown_as`.
        beside: the vocabulary of the result that it stands beside, which chose its colours first.
    """
    if beside is None:
        return segment_colours(shown)
    taken = {name: index for index, name in enumerate(beside.names)}
    segments = tuple(
        dataclasses.replace(s, class_index=taken.get(s.label, len(taken) + s.class_index)) for s in shown.segments
    )
    return segment_colours(dataclasses.replace(shown, segments=segments))


def view(
    result: PanopticResult,
    mode: Output,
    least_score: float,
    training_vocabulary: Collection[str],
    beside: Vocabulary | None = None,
    corrections: Corrections = NONE,
) -> dict[str, Any]:
    """Everything that the page draws of one result, as plain JSON types.

    Args:
        result: at the page's size.
        mode: what to show.
        least_score: for instances.
        training_vocabulary: to mark the names that were seen in training.
        beside: the first vocabulary of a comparison, for the second's colours.
        corrections: made by hand.

    Returns:
        ``map`` (``width``, ``height``, and the owners of pixels row by row as run lengths: ``ids``, ``lengths``; 0 is
        nobody), ``regions``, largest first, and ``words``, the names of all classes.
    """
    separate = _separate(result, mode, least_score, corrections)
    shown, parts = joined(separate)
    seen = shown.vocabulary.seen(training_vocabulary)
    places = label_places(shown.segment_map, len(shown.segments))
    places_of_parts = label_places(separate.segment_map, len(separate.segments))
    height, width = shown.size
    regions: list[dict[str, Any]] = []
    for segment, colour, place, ids in zip(shown.segments, colours(shown, beside), places, parts, strict=True):
        inside = filter(None, (places_of_parts[i - 1] for i in ids))
        regions.append(
            {
                "id": segment.id,
                "label": segment.label,
                "score": None if math.isnan(segment.score) else round(segment.score, 4),
                "corrected": segment.corrected,
                "share": segment.area / (height * width),
                "thing": segment.isthing,
                "unknown": segment.unknown,
                "seen": bool(seen[segment.class_index]) and not segment.unknown,
                "colour": "#{:02x}{:02x}{:02x}".format(*colour),
                "ink": ink(colour),
                "place": None if place is None else _share(place, shown.size),
                "parts": [_share(spot, shown.size) for spot in inside],
                "names": [_name(candidate, bool(seen[candidate.class_index])) for candidate in segment.candidates],
            }
        )
    if mode == "instance":
        assert shown.instances is not None
        for region, instance in zip(regions, shown.instances, strict=True):
            region["mask"] = runs(instance.mask)
    regions.sort(key=lambda region: -region["share"])
    drawn = {"width": width, "height": height, **runs(shown.segment_map)}
    return {"map": drawn, "regions": regions, "words": list(shown.vocabulary.names)}


def _share(place: tuple[int, int], size: tuple[int, int]) -> list[float]:
    """The middle of a pixel (row, column) as shares of the width and height."""
    return [(place[1] + 0.5) / size[1], (place[0] + 0.5) / size[0]]


def _name(candidate: Candidate, seen: bool) -> dict[str, Any]:
    scores = {"score": candidate.score, "mask": candidate.mask_score, "clip": candidate.clip_score}
    return {"label": candidate.label, "seen": seen, **{key: round(value, 4) for key, value in scores.items()}}


def ink(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever is read better on a colour (the larger contrast ratio of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def runs(values: np.ndarray) -> dict[str, list[int]]:
    """A map or mask as runs of equal values, row by row: ``ids`` and ``lengths``."""
    flat = values.ravel().astype(np.int32)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    return {"ids": flat[starts].tolist(), "lengths": np.diff(starts, append=flat.size).tolist()}


def download(
    result: PanopticResult, mode: Output, least_score: float, picture: str, corrections: Corrections = NONE
) -> dict[str, Any]:
    """The JSON that visitors download: segments as shown, with masks and best names, the words and how it was made.

    Args:
        result: at the picture's own size.
        mode: what is shown.
        least_score: for instances; others are not in the file.
        picture: name of the image file.
        corrections: made by hand.
    """
    shown = shown_as(result, mode, least_score, corrections)
    data = dataclasses.replace(shown, instances=None, semantic_map=None).to_dict(rle_masks=True, explain=True)
    if mode == "semantic":  # areas of a class have neither a probability nor candidates
        for segment in data["segments"]:
            del segment["score"], segment["candidates"]
    if mode == "instance":  # masks overlap: whole ones, not what is left of them on the map
        assert shown.instances is not None
        for segment, instance in zip(data["segments"], shown.instances, strict=True):
            segment["rle"] = rle.encode(instance.mask)
        data["least_score"] = least_score
    return {"image": picture, "mode": mode, **data, "vocabulary": shown.vocabulary.to_dict()["classes"]}
