"""Pictures of results: coloured segments with outlines, labels in place, and a legend."""

from __future__ import annotations

import colorsys
import contextlib
import functools
import logging
import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from odise_rt.errors import ImageError, ImageTooLargeError, OptionsError
from odise_rt.preprocessing import load_image

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

    from odise_rt.preprocessing import ImageLike
    from odise_rt.results import PanopticResult, Segment

logger = logging.getLogger(__name__)

Colour = tuple[int, int, int]

OPACITY = 0.5
MIN_LONG_EDGE = 640
"""Pixels of the longer edge below which a picture is enlarged by a whole factor, so that labels can be read."""
_GOLDEN_ANGLE = 0.381966
_BAND_PIXELS = 1 << 16
_PLACING_CELLS = 160
"""Cells along the longer edge on which places for labels are looked for."""
# Tried in turn for labels with letters that Pillow's own font lacks.
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")


def class_colour(index: int, variation: int = 0) -> Colour:
    """A colour for a class, the same in every picture.

    Neighbouring indices get distant hues. ``variation`` tells objects of one class apart by brightness and a slight
    turn of the hue.
    """
    hue = (0.58 + index * _GOLDEN_ANGLE + 0.025 * ((variation + 1) // 2) * (-1) ** variation) % 1.0
    saturation = (0.78, 0.55, 0.92)[index // 3 % 3]
    value = (0.95, 0.78, 0.62, 0.88, 0.7)[(index + variation * 2) % 5]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def segment_colours(result: PanopticResult) -> list[Colour]:
    """A colour for each segment, in their order; unknown segments are grey."""
    met: dict[int, int] = {}
    colours = []
    for segment in result.segments:
        variation = met.get(segment.class_index, 0)
        met[segment.class_index] = variation + 1
        colours.append(unknown_colour(variation) if segment.unknown else class_colour(segment.class_index, variation))
    return colours


def unknown_colour(variation: int = 0) -> Colour:
    """A grey for what no word fits; ``variation`` tells such segments apart by brightness."""
    value = (150, 105, 195, 128, 80, 172)[variation % 6]
    return value, value, value


def overlay(
    image: ImageLike, result: PanopticResult, legend: bool = True, colours: Sequence[Colour] | None = None
) -> Image.Image:
    """Draw a result over its image.

    Args:
        image: the image that was segmented.
        result: its segments.
        legend: add a column at the right with every label, its score and its share of the picture.
        colours: one for each segment; ``None``: :func:`segment_colours`.

    Returns:
        An RGB PIL image; small ones are enlarged by a whole factor.

    Raises:
        ImageError: the image has another size than the result.
        OptionsError: there is not one colour for each segment.
    """
    from PIL import Image

    wanted = f"the result is of one of {result.size[1]} x {result.size[0]}: pass the image that was segmented"
    try:
        pixels = load_image(image, max_pixels=max(1, result.segment_map.size))
    except ImageTooLargeError as exc:
        raise ImageError(f"the image is too large, {wanted}") from exc
    if pixels.shape[:2] != result.size:
        raise ImageError(f"the image is {pixels.shape[1]} x {pixels.shape[0]}, {wanted}")
    factor = max(1, -(-MIN_LONG_EDGE // max(result.size)))
    segment_map = result.segment_map.repeat(factor, axis=0).repeat(factor, axis=1)
    if factor > 1:
        size = (segment_map.shape[1], segment_map.shape[0])
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    colours = segment_colours(result) if colours is None else _given_colours(colours, len(result.segments))
    picture = Image.fromarray(_blend(pixels, segment_map, colours))
    font_size = max(12, round(max(picture.size) / 62))
    _draw_labels(picture, result, factor, font_size)
    return _with_legend(picture, result, colours, font_size) if legend else picture


def _given_colours(colours: Sequence[Colour], count: int) -> list[Colour]:
    with contextlib.suppress(TypeError, ValueError):
        found = [(int(red), int(green), int(blue)) for red, green, blue in colours]
        if len(found) == count and all(0 <= value <= 255 for colour in found for value in colour):
            return found
    raise OptionsError(
        f"the colours came as {colours!r:.60}: expected three numbers from 0 to 255 for each of {count} segments"
    )


def _blend(pixels: np.ndarray, segment_map: np.ndarray, colours: list[Colour]) -> np.ndarray:
    table = np.array([(0, 0, 0), *colours], np.float32)
    inner, outer = _outlines(segment_map, width=max(1, round(max(segment_map.shape) / 500)))
    picture = np.empty(pixels.shape, np.uint8)
    # By bands of rows that stay in a core's cache: many times faster on a camera's pictures than all at once.
    step = max(1, _BAND_PIXELS // segment_map.shape[1])
    for start in range(0, len(pixels), step):
        rows = slice(start, start + step)
        owners = segment_map[rows]
        blended = pixels[rows].astype(np.float32)
        blended[owners > 0] *= 1 - OPACITY
        blended += table[owners] * np.float32(OPACITY)
        blended[outer[rows]] = blended[outer[rows]] * 0.25 + 255 * 0.75
        blended[inner[rows]] = table[owners[inner[rows]]] * 0.6
        picture[rows] = np.clip(blended + 0.5, 0, 255)
    return picture


def _outlines(segment_map: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels on either side of a border: a dark line inside the segments, a light one where nothing is named."""
    edge = np.zeros(segment_map.shape, bool)
    for axis in (0, 1):
        here = np.moveaxis(segment_map, axis, 0)
        differs = here[1:] != here[:-1]
        moved = np.moveaxis(edge, axis, 0)
        moved[1:] |= differs
        moved[:-1] |= differs
    for _ in range(width - 1):
        wider = edge.copy()
        wider[1:] |= edge[:-1]
        wider[:-1] |= edge[1:]
        wider[:, 1:] |= edge[:, :-1]
        wider[:, :-1] |= edge[:, 1:]
        edge = wider
    return edge & (segment_map > 0), edge & (segment_map == 0)


def label_places(segment_map: np.ndarray, count: int) -> list[tuple[int, int] | None]:
    """For each id from 1 to ``count`` a pixel ``(y, x)`` deep inside the segment, or ``None`` if it has no pixel.

    Depth is measured on a coarse grid by peeling off border cells, all segments at once.
    """
    height, width = segment_map.shape
    step = max(1, -(-max(height, width) // _PLACING_CELLS))
    offset = step // 2 if min(height, width) > step // 2 else 0
    coarse = segment_map[offset::step, offset::step]
    depth = np.zeros(coarse.shape, np.int32)
    alive = coarse > 0
    padded = np.pad(coarse, 1, constant_values=-1)
    same = np.ones(coarse.shape, bool)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            same &= padded[1 + dy : 1 + dy + coarse.shape[0], 1 + dx : 1 + dx + coarse.shape[1]] == coarse
    level = alive & same
    depth[alive] = 1
    while level.any():
        depth[level] += 1
        ring = np.pad(level, 1)
        shrunk = level.copy()
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                shrunk &= ring[1 + dy : 1 + dy + level.shape[0], 1 + dx : 1 + dx + level.shape[1]]
        level = shrunk
    places: list[tuple[int, int] | None] = []
    for identifier in range(1, count + 1):
        inside = coarse == identifier
        if inside.any():
            y, x = np.unravel_index(int(np.where(inside, depth, 0).argmax()), coarse.shape)
            places.append((int(y) * step + offset, int(x) * step + offset))
        else:  # too thin for the grid
            found = np.argwhere(segment_map == identifier)
            places.append((int(found[len(found) // 2][0]), int(found[len(found) // 2][1])) if len(found) else None)
    return places


def _draw_labels(picture: Image.Image, result: PanopticResult, factor: int, font_size: int) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    taken: list[tuple[float, float, float, float]] = []
    places = label_places(result.segment_map, len(result.segments))
    # Large segments choose first; a label that would hide another one is left to the legend.
    for segment in sorted(result.segments, key=lambda s: -s.area):
        place = places[segment.id - 1]
        if place is None:
            continue
        text, font = _text_and_font(segment.label, font_size)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        text_width, text_height, pad = right - left, bottom - top, font_size // 4
        if text_width + 2 * pad > width or text_height + 2 * pad > height:
            continue
        x = min(max((place[1] + 0.5) * factor - text_width / 2, pad), width - text_width - pad)
        y = min(max((place[0] + 0.5) * factor - text_height / 2, pad), height - text_height - pad)
        box = (x - pad, y - pad, x + text_width + pad, y + text_height + pad)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        draw.rounded_rectangle(box, radius=pad, fill=(20, 20, 20))
        draw.text((x - left, y - top), text, font=font, fill=(255, 255, 255))


def _with_legend(picture: Image.Image, result: PanopticResult, colours: list[Colour], font_size: int) -> Image.Image:
    from PIL import Image, ImageDraw

    line, margin = round(font_size * 1.7), font_size
    room = max(1, (picture.height - 2 * margin) // line - 1)  # below the heading
    order = sorted(zip(result.segments, colours, strict=True), key=lambda pair: -pair[0].area)
    shown = order if len(order) <= room else order[: room - 1]
    total = max(1, result.segment_map.size)
    rows: list[tuple[Colour | None, str, tuple[str, str]]] = [(None, "segment", ("score", "area"))]
    rows += [
        (
            colour,
            _legend_name(segment),
            ("" if math.isnan(segment.score) else f"{segment.score:.2f}", f"{100 * segment.area / total:.1f} %"),
        )
        for segment, colour in shown
    ]
    if len(shown) < len(order):
        rows.append((None, f"and {len(order) - len(shown)} smaller", ("", "")))
    if not shown:
        rows.append((None, "no segment", ("", "")))

    ruler = ImageDraw.Draw(picture)
    most = max(picture.width // 2, 14 * font_size)
    fitted = [
        (colour, *_fit(ruler, label, most - 9 * font_size, font_size), figures) for colour, label, figures in rows
    ]
    small = _font(round(font_size * 0.85))
    label_width = max(ruler.textlength(label, font=font) for _, label, font, _ in fitted)
    figure_width = ruler.textlength("100.0 % ", font=small)
    page_width = round(picture.width + 3 * margin + 1.5 * font_size + label_width + 2 * figure_width)
    page = Image.new("RGB", (page_width, picture.height), (255, 255, 255))
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    for number, (colour, label, font, figures) in enumerate(fitted):
        x, middle = picture.width + margin, margin + number * line + line // 2
        if colour is not None:
            swatch = font_size * 0.5
            draw.rounded_rectangle((x, middle - swatch, x + 2 * swatch, middle + swatch), radius=2, fill=colour)
        draw.text((x + font_size * 1.5, middle), label, font=font, fill=(20, 20, 20), anchor="lm")
        for place, figure in enumerate(figures):
            right = page.width - margin - (1 - place) * figure_width
            draw.text((right, middle), figure, font=small, fill=(110, 110, 110), anchor="rm")
    return page


def _legend_name(segment: Segment) -> str:
    """The label; for an unknown segment also the nearest word, whose probability the score is."""
    if segment.unknown and segment.candidates:
        return f"{segment.label} ({segment.candidates[0].label}?)"
    return segment.label


def _fit(draw: ImageDraw.ImageDraw, label: str, width: float, font_size: int) -> tuple[str, Any]:
    """The label, cut with an ellipsis to fit into ``width`` pixels, and its font."""
    text, font = _text_and_font(label, font_size)
    if draw.textlength(text, font=font) <= width:
        return text, font
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "…", font


@functools.lru_cache(maxsize=64)
def _font(size: int, names: tuple[str, ...] = ()) -> Any:
    from PIL import ImageFont

    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _text_and_font(label: str, size: int) -> tuple[str, Any]:
    """What to draw for a label. Emoji are drawn by their names, as few fonts hold them."""
    text = "".join(f" {unicodedata.name(c, '?').lower()} " if _is_pictograph(c) else c for c in label)
    text = " ".join("".join(c for c in text if c.isprintable() and c not in "\u200d\ufe0f").split()) or "?"
    latin = all(ord(c) < 0x250 for c in text)
    return text, _font(size) if latin else _font(size, _WIDE_FONTS)


def _is_pictograph(character: str) -> bool:
    return ord(character) >= 0x2190 and unicodedata.category(character) in ("So", "Sk")
