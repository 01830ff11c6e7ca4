"""Results as other tools' data: supervision, LabelMe, CVAT. Methods of :class:`PanopticResult` call these."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from odise_rt.errors import MissingPackageError, OptionsError
from odise_rt.options import is_number
from odise_rt.polygons import polygons

if TYPE_CHECKING:
    from odise_rt.results import PanopticResult, Segment
    from odise_rt.vocabulary import Vocabulary

MAX_TOLERANCE = 100
"""Pixels that an outline may leave its mask by."""
_LABELME_VERSION = "5.5.0"


def supervision_detections(result: PanopticResult) -> Any:
    """The segments as ``supervision.Detections``: boxes, masks, confidences, class ids, names, and tracks if any.

    Raises:
        MissingPackageError: supervision is not installed.
    """
    try:
        import supervision
    except ImportError as exc:
        raise MissingPackageError(
            "Detections need the package supervision: pip install 'odise_rt[supervision]'"
        ) from exc
    segments = result.segments
    if not segments:
        return supervision.Detections.empty()
    tracks = [s.track_id for s in segments]
    return supervision.Detections(
        xyxy=np.array([s.box for s in segments], np.float32),
        mask=np.stack([result.mask(s) for s in segments]),
        confidence=np.array([s.score for s in segments], np.float32),
        class_id=np.array([s.class_index for s in segments], int),
        tracker_id=None if any(t is None for t in tracks) else np.array(tracks, int),
        data={"class_name": np.array([s.label for s in segments])},
    )


def labelme_document(result: PanopticResult, image_path: str, tolerance: float) -> dict[str, Any]:
    """LabelMe's JSON for one image: a polygon for each connected part of each segment.

    Parts of one segment share a ``group_id``. LabelMe's polygons have no holes: a hole is cut open to the outline.
    """
    check_tolerance(tolerance)
    shapes = []
    for segment in result.segments:
        rings = _rings(result, segment, tolerance)
        shapes += [
            {
                "label": segment.label,
                "points": ring.tolist(),
                "group_id": segment.id if len(rings) > 1 else None,
                "description": _description(segment),
                "shape_type": "polygon",
                "flags": {},
                "mask": None,
            }
            for ring in rings
        ]
    return {
        "version": _LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": result.size[0],
        "imageWidth": result.size[1],
    }


def cvat_image(result: PanopticResult, file_name: str, tolerance: float) -> str:
    """One ``<image>`` of CVAT's "images 1.1" XML, without its number; see :func:`cvat_document`.

    Parts of one segment share a ``group_id``. CVAT's polygons have no holes: a hole is cut open to the outline.
    """
    check_tolerance(tolerance)
    height, width = result.size
    lines = [f"<image name={_attribute(file_name)} width={_attribute(str(width))} height={_attribute(str(height))}>"]
    for segment in result.segments:
        rings = _rings(result, segment, tolerance)
        group = f' group_id="{segment.id}"' if len(rings) > 1 else ""
        for ring in rings:
            points = ";".join(f"{x:.2f},{y:.2f}" for x, y in ring)
            label = _attribute(segment.label)
            source = "manual" if segment.corrected else "auto"
            lines.append(
                f'<polygon label={label} source="{source}" occluded="0" points="{points}" z_order="0"{group}/>'
            )
    return "\n".join([*lines, "</image>"])


def cvat_document(images: Iterable[str], vocabulary: Vocabulary) -> Iterator[str]:
    """CVAT's "images 1.1" XML in parts: its labels, then every entry of :func:`cvat_image` with a number."""
    yield '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta>\n<task>\n<labels>\n'
    for name in dict.fromkeys(vocabulary.names):
        yield f"<label><name>{escape(_printable(name))}</name><attributes></attributes></label>\n"
    yield "</labels>\n</task>\n</meta>\n"
    for number, image in enumerate(images):
        yield f'<image id="{number}"{image.removeprefix("<image")}\n'
    yield "</annotations>\n"


def check_tolerance(tolerance: float, what: str = "tolerance") -> None:
    """Check how far outlines may be simplified, called ``what`` in the message.

    Raises:
        OptionsError: it is no number from 0 to ``MAX_TOLERANCE`` pixels.
    """
    if not is_number(tolerance) or not 0 <= tolerance <= MAX_TOLERANCE:
        raise OptionsError(f"{what} is {tolerance!r:.60}: expected 0 to {MAX_TOLERANCE} pixels")


def _rings(result: PanopticResult, segment: Segment, tolerance: float) -> list[np.ndarray]:
    """The outline of each connected part, float64 (N, 2); only the segment's box is searched."""
    left, top, right, bottom = segment.box
    mask = result.segment_map[top:bottom, left:right] == segment.id
    corner = np.array([left, top])
    return [part.as_one_ring() + corner for part in polygons(mask, tolerance)]


def _attribute(text: str) -> str:
    return quoteattr(_printable(text))


def _printable(text: str) -> str:
    """The text without the control characters that XML cannot hold."""
    return "".join(
        c for c in text if (c >= " " or c in "\t\n\r") and c not in "\ufffe\uffff" and not "\ud800" <= c <= "\udfff"
    )


def _description(segment: Segment) -> str:
    if segment.corrected:
        return "corrected"
    return "" if math.isnan(segment.score) else f"score {segment.score:.3f}"
