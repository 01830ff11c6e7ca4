"""Composition of one scene: stuff as horizons, floors and ponds, things pasted on it, and the exact masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from training.data.sticker_world.captions import Placed, describe
from training.data.sticker_world.nouns import ClassSelection, Noun, all_nouns, category_id, select
from training.data.sticker_world.textures import draw_texture, value_noise

UPRIGHT = ("sky", "night sky", "brick wall", "leaves", "stone")
"""Stuff that stands behind a horizon; everything but the skies may lie below it too."""
NEVER_GROUND = ("sky", "night sky", "brick wall")
REFERENCE_SIDE = 256
THING_SIDE_RANGE = (36.0, 130.0)
"""Longer side of a thing in pixels of a 256-pixel scene."""
THINGS_RANGE = (3, 8)
MIN_VISIBLE_SHARE = 0.35
"""No thing may hide more of another than leaves this share of it."""
MIN_SEGMENT_AREA = 40
"""Smaller segments (pixels) are left void."""


@dataclass(frozen=True)
class Scene:
    """A picture with its panoptic truth."""

    image: np.ndarray
    """uint8 (side, side, 3) RGB."""
    segment_map: np.ndarray
    """int32 (side, side); value i is segment i, 1-based; 0 is void."""
    category_ids: tuple[int, ...]
    """Category of segment 1, 2, ..."""
    captions: tuple[str, ...]


def _texture(noun: Noun, rng: np.random.Generator, side: int) -> np.ndarray:
    """The texture at the scene's scale: drawn for 256 pixels, then resized."""
    drawn = draw_texture(noun.name, rng, REFERENCE_SIDE)
    if side == REFERENCE_SIDE:
        return drawn
    picture = Image.fromarray(drawn.astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32)


def _background(stuff: tuple[Noun, ...], rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Float picture (side, side, 3) and the category id of each pixel."""
    ground = [noun for noun in stuff if noun.name not in NEVER_GROUND]
    upright = [noun for noun in stuff if noun.name in UPRIGHT]
    floor = ground[int(rng.integers(len(ground)))]
    picture = _texture(floor, rng, side)
    owner = np.full((side, side), category_id(floor), np.int32)
    used = {floor}
    rows, columns = np.mgrid[0:side, 0:side] / side
    wobble = (value_noise(rng, side, (2, 4), 2) - 0.5) * rng.choice([0.0, 0.06, 0.16])

    def lay(noun: Noun, where: np.ndarray) -> None:
        texture = _texture(noun, rng, side)
        picture[where] = texture[where]
        owner[where] = category_id(noun)
        used.add(noun)

    def another(choices: list[Noun]) -> Noun | None:
        free = [noun for noun in choices if noun not in used]
        return free[int(rng.integers(len(free)))] if free else None

    layout = rng.random()
    horizon = rng.uniform(0.25, 0.6) + (columns - 0.5) * rng.uniform(-0.2, 0.2) + wobble
    back = another(upright) if layout < 0.82 else None
    if back is not None:
        lay(back, rows < horizon)
    middle = another(ground) if layout < 0.3 else None
    if middle is not None:
        lay(middle, (rows >= horizon) & (rows < horizon + rng.uniform(0.12, 0.25) + wobble))
    pond = another(ground) if rng.random() < 0.35 else None
    if pond is not None:
        centre = rng.uniform((0.15, 0.65), (0.85, 0.95))
        radii = rng.uniform((0.2, 0.1), (0.45, 0.22))
        distance = ((columns - centre[0]) / radii[0]) ** 2 + ((rows - centre[1]) / radii[1]) ** 2
        lay(pond, distance < 1 + 4 * wobble)
    return picture, owner


def _posed(sprite: np.ndarray, longest: float, rng: np.random.Generator) -> np.ndarray:
    """A sprite scaled so that its longer side is ``longest``, stretched a little, flipped, turned. Float RGBA 0..1."""
    height, width = sprite.shape[:2]
    factor = longest / max(height, width)
    stretch = rng.uniform(0.88, 1.14)
    picture = Image.fromarray(sprite)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size = (max(4, round(width * factor * stretch)), max(4, round(height * factor / stretch)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    angle = float(rng.normal(0, 16)) if rng.random() < 0.85 else float(rng.uniform(-90, 90))
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return np.asarray(picture, np.float32) / 255


def _overlap(corner: tuple[int, int], shape: tuple[int, ...], side: int) -> tuple[tuple[slice, slice], ...]:
    """Slices of the canvas and of a pasted patch where the two overlap."""
    (row, column), (height, width) = corner, shape[:2]
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + height, side), min(column + width, side)
    canvas = slice(top, max(bottom, top)), slice(left, max(right, left))
    patch = slice(top - row, max(bottom, top) - row), slice(left - column, max(right, left) - column)
    return canvas, patch


def _cast_shadow(picture: np.ndarray, alpha: np.ndarray, corner: tuple[int, int], rng: np.random.Generator) -> None:
    """Darken ``picture`` in place under a blurred, shifted copy of a thing's alpha."""
    margin = 8
    padded = np.pad(alpha, margin)
    blurred = Image.fromarray((padded * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 4)))
    soft = np.asarray(blurred, np.float32) / 255 * rng.uniform(0.15, 0.5)
    shift = rng.integers((-1, -5), (7, 6))
    canvas, patch = _overlap(
        (corner[0] - margin + int(shift[0]), corner[1] - margin + int(shift[1])), soft.shape, len(picture)
    )
    picture[canvas] *= 1 - soft[patch][..., None]


def _place_things(
    picture: np.ndarray,
    sprites: dict[str, np.ndarray],
    things: tuple[Noun, ...],
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[Noun]]:
    """Paste things into ``picture``; returns the owner map (0 background, i = thing i, 1-based) and the things."""
    side = len(picture)
    owner = np.zeros((side, side), np.int32)
    placed: list[Noun] = []
    full_areas: list[int] = []
    low, high = (bound * side / REFERENCE_SIDE for bound in THING_SIDE_RANGE)
    for _ in range(int(rng.integers(THINGS_RANGE[0], THINGS_RANGE[1] + 1))):
        repeated = placed and rng.random() < 0.12
        noun = placed[int(rng.integers(len(placed)))] if repeated else things[int(rng.integers(len(things)))]
        posed = _posed(sprites[noun.name], float(np.exp(rng.uniform(np.log(low), np.log(high)))), rng)
        for _attempt in range(12):
            centre = rng.uniform(0.06, 0.94, 2) * side
            corner = int(centre[0] - posed.shape[0] / 2), int(centre[1] - posed.shape[1] / 2)
            canvas, patch = _overlap(corner, posed.shape, side)
            solid = posed[patch][..., 3] >= 0.5
            covered = np.bincount(owner[canvas][solid], minlength=len(placed) + 1)
            remaining = np.bincount(owner.ravel(), minlength=len(placed) + 1) - covered
            if int(solid.sum()) < 4 * MIN_SEGMENT_AREA or any(
                remaining[i + 1] < MIN_VISIBLE_SHARE * area for i, area in enumerate(full_areas)
            ):
                continue
            _cast_shadow(picture, posed[..., 3], corner, rng)
            alpha = posed[patch][..., 3:]
            light = rng.uniform(0.82, 1.12)
            picture[canvas] = picture[canvas] * (1 - alpha) + np.clip(posed[patch][..., :3] * light, 0, 1) * 255 * alpha
            placed.append(noun)
            full_areas.append(int(solid.sum()))
            owner[canvas][solid] = len(placed)
            break
    return owner, placed


def _develop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light from one side, tint, blur and sensor noise; uint8."""
    side = len(picture)
    rows, columns = np.mgrid[0:side, 0:side] / side - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0.82, 1.12) + rng.uniform(0, 0.3) * (np.cos(angle) * rows + np.sin(angle) * columns)
    picture = picture * light[..., None] * rng.uniform(0.95, 1.05, 3)
    developed = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        developed = developed.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))
    noise = rng.normal(0, rng.uniform(0.5, 6), (side, side, 3))
    return np.clip(np.asarray(developed, np.float32) + noise, 0, 255).astype(np.uint8)


def compose(
    sprites: dict[str, np.ndarray], rng: np.random.Generator, side: int = 256, classes: ClassSelection = "all"
) -> Scene:
    """Make one scene.

    Args:
        sprites: Picture of every thing, from :func:`training.data.sticker_world.sprites.load_sprites`.
        rng: Source of every choice; the same state gives the same scene.
        side: Pixels of the square picture.
        classes: "seen" leaves the unseen nouns out of the picture altogether, "all" uses every noun.

    Returns:
        The picture, its segments and its captions.
    """
    nouns = select(all_nouns(), classes)
    things = tuple(noun for noun in nouns if noun.is_thing)
    picture, stuff_owner = _background(tuple(noun for noun in nouns if not noun.is_thing), rng, side)
    thing_owner, placed = _place_things(picture, sprites, things, rng)

    segment_map = np.zeros((side, side), np.int32)
    category_ids: list[int] = []
    described: list[Placed] = []
    stuff: list[Noun] = []

    def add(where: np.ndarray, category: int) -> bool:
        if int(where.sum()) < MIN_SEGMENT_AREA:
            return False
        category_ids.append(category)
        segment_map[where] = len(category_ids)
        return True

    for index, noun in enumerate(placed):
        where = thing_owner == index + 1
        if add(where, category_id(noun)):
            rows, columns = np.nonzero(where)
            described.append(Placed(noun, (columns.mean() / side, rows.mean() / side), int(where.sum())))
    for category in np.unique(stuff_owner):
        if add((stuff_owner == category) & (thing_owner == 0), int(category)):
            stuff.append(all_nouns()[int(category) - 1])
    captions = describe(described, stuff, rng)
    return Scene(_develop(picture, rng), segment_map, tuple(category_ids), tuple(captions))
