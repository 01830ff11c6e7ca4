"""Pages of pictures beside their truth and prediction: what the numbers look like."""

from __future__ import annotations

import base64
import colorsys
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from odise_rt.results import PanopticResult
from training.data.coco_panoptic import CocoPanoptic, PanopticExample
from training.data.picture_files import ImageId
from training.data.semantic_sets import SemanticExample, SemanticSet

_STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;max-width:1100px}
figure{margin:0 0 1.5em}figcaption{color:#555;margin-bottom:.3em}img{image-rendering:auto;max-width:100%}"""
SMALL_SIDE = 640
"""Pixels of the longer side up to which a picture is enlarged, so that names fit on its segments."""


@dataclass(frozen=True)
class Labelled:
    """A segment map with the name of each id."""

    segment_map: npt.NDArray[np.int32]
    names: dict[int, str]


def truth_of(example: PanopticExample | SemanticExample, data: CocoPanoptic | SemanticSet) -> Labelled:
    """The annotation's segments, or its classes."""
    if isinstance(data, SemanticSet):
        assert isinstance(example, SemanticExample)
        return labelled_classes(example.class_map, data.vocabulary.names)
    assert isinstance(example, PanopticExample)
    names = {s.id: data.categories[data.index_of[s.category_id]].name for s in example.segments}
    return Labelled(example.segment_map, names)


def prediction_of(prediction: PanopticResult, data: CocoPanoptic | SemanticSet) -> Labelled:
    """The prediction's segments, or its classes for a semantic set."""
    if isinstance(data, SemanticSet):
        assert prediction.semantic_map is not None, "semantic output was asked for"
        return labelled_classes(prediction.semantic_map, data.vocabulary.names)
    return Labelled(prediction.segment_map, {s.id: s.label for s in prediction.segments})


def labelled_classes(class_map: npt.NDArray[np.int32], names: Sequence[str]) -> Labelled:
    """One segment for each class of an int32 (H, W) map of class indices; -1 is no segment."""
    return Labelled(class_map + 1, {index + 1: names[index] for index in np.unique(class_map).tolist() if index >= 0})


def colour_of(name: str, number: int) -> tuple[int, int, int]:
    """A colour that depends on the class name, a little lighter or darker for each further segment of it."""
    hue = sum(ord(c) * 31**i for i, c in enumerate(name)) % 997 / 997
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, (0.95, 0.75, 0.6)[number % 3])
    return int(255 * red), int(255 * green), int(255 * blue)


def overlay(image: npt.NDArray[np.uint8], labelled: Labelled, scale: int = 2) -> Image.Image:
    """The picture with coloured segments and their names, enlarged ``scale`` times."""
    canvas = image.astype(np.float32)
    seen: dict[str, int] = {}
    for identifier, name in labelled.names.items():
        colour = np.array(colour_of(name, seen.get(name, 0)), dtype=np.float32)
        seen[name] = seen.get(name, 0) + 1
        inside = labelled.segment_map == identifier
        canvas[inside] = 0.45 * canvas[inside] + 0.55 * colour
    edges = np.zeros(labelled.segment_map.shape, dtype=bool)
    edges[:, 1:] |= labelled.segment_map[:, 1:] != labelled.segment_map[:, :-1]
    edges[1:] |= labelled.segment_map[1:] != labelled.segment_map[:-1]
    canvas[edges] = 255
    picture = Image.fromarray(canvas.astype(np.uint8))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(picture)
    for identifier, name in labelled.names.items():
        rows, columns = np.nonzero(labelled.segment_map == identifier)
        if len(rows):
            # The pixel of the segment nearest to its centre: the centre itself may lie outside.
            nearest = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
            place = (float(columns[nearest] * scale), float(rows[nearest] * scale))
            pen.text(place, name, fill="white", anchor="mm", stroke_width=2, stroke_fill="black")
    return picture


def side_by_side(
    example: PanopticExample | SemanticExample, prediction: PanopticResult, data: CocoPanoptic | SemanticSet
) -> Image.Image:
    """Picture, prediction and truth in one row; small pictures are shown twice as large."""
    scale = 2 if max(example.image.shape) <= SMALL_SIDE else 1
    parts = [
        overlay(example.image, Labelled(np.zeros(example.image.shape[:2], np.int32), {}), scale),
        overlay(example.image, prediction_of(prediction, data), scale),
        overlay(example.image, truth_of(example, data), scale),
    ]
    row = Image.new("RGB", (sum(p.width for p in parts) + 8 * (len(parts) - 1), parts[0].height), "white")
    left = 0
    for part in parts:
        row.paste(part, (left, 0))
        left += part.width + 8
    return row


Kept = tuple[float, ImageId, Image.Image]
"""Quality, image id and the row of pictures."""


@dataclass
class BestAndWorst:
    """Keeps the pictures of highest and lowest quality while an evaluation runs; of equals the first."""

    data: CocoPanoptic | SemanticSet
    count: int = 8
    best: list[Kept] = field(default_factory=list)
    worst: list[Kept] = field(default_factory=list)

    def __call__(self, quality: float, example: PanopticExample | SemanticExample, prediction: PanopticResult) -> None:
        """Look at one picture; it is drawn only if it is kept."""
        in_best, in_worst = self._places(quality)
        if in_best or in_worst:
            entry = (quality, example.image_id, side_by_side(example, prediction, self.data))
            self.merge([entry] if in_best else [], [entry] if in_worst else [])

    def wants(self, quality: float) -> bool:
        """Whether a picture of this quality would be kept."""
        return any(self._places(quality))

    def _places(self, quality: float) -> tuple[bool, bool]:
        """Whether it would be among the best, and among the worst; NaN is of no quality."""
        if not self.count or math.isnan(quality):
            return False, False
        in_best = len(self.best) < self.count or quality > self.best[-1][0]
        in_worst = len(self.worst) < self.count or quality < self.worst[-1][0]
        return in_best, in_worst

    def merge(self, best: Sequence[Kept], worst: Sequence[Kept]) -> None:
        """Look at what was kept of later pictures."""
        self.best = sorted([*self.best, *best], key=lambda e: -e[0])[: self.count]
        self.worst = sorted([*self.worst, *worst], key=lambda e: e[0])[: self.count]

    def page(self, title: str, summary: Sequence[tuple[str, str]]) -> str:
        """A self-contained HTML page."""
        measure = "mIoU" if isinstance(self.data, SemanticSet) else "PQ"
        rows = "".join(f"<tr><th align=left>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in summary)
        sections = []
        for heading, entries in (("Best", self.best), ("Worst", self.worst)):
            figures = "".join(
                f"<figure><figcaption>image {html.escape(str(image_id))}, {measure} {100 * quality:.1f}: picture, "
                f'prediction, truth</figcaption><img alt="image {html.escape(str(image_id))}" '
                f'src="data:image/jpeg;base64,{_jpeg(picture)}"></figure>'
                for quality, image_id, picture in entries
            )
            sections.append(f"<h2>{heading} pictures</h2>{figures}")
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
            f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><table>{rows}</table>{''.join(sections)}</html>\n"
        )


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
