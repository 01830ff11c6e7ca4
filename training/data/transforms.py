"""Large-scale jitter (Ghiasi et al. 2021): random scale, crop and flip of a picture together with its segment map."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from odise_rt.errors import ConfigError

Picture = npt.NDArray[np.uint8]
SegmentMap = npt.NDArray[np.int32]


@dataclass(frozen=True)
class JitterOptions:
    """How training pictures vary (odise.md 7: target 1024, scale 0.1 to 2.0, crop 1024, flip half of them)."""

    target: int = 1024
    """Side in pixels of the square that scale 1 fits the picture into."""
    crop: int = 1024
    """Side in pixels of the square handed to the model; smaller pictures are padded right and below."""
    smallest: float = 0.1
    """Smallest scale."""
    largest: float = 2.0
    """Largest scale."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    pad_value: int = 128
    """Grey level of the padding, which belongs to no segment."""
    diagonal_crops: bool = False
    """One random number places the crop on both axes, as published: it lies on the diagonal of where it could. False:
    each axis has its own."""

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest:
            raise ConfigError(f"jitter scales {self.smallest} to {self.largest}: expected 0 < smallest <= largest")
        if self.target <= 0 or self.crop <= 0 or self.crop % 32:
            raise ConfigError(
                f"jitter target {self.target} and crop {self.crop}: expected positive, crop a multiple of 32"
            )
        if not 0 <= self.flip <= 1 or not 0 <= self.pad_value <= 255:
            raise ConfigError(f"jitter flip {self.flip}, pad_value {self.pad_value}: expected [0, 1] and [0, 255]")


def resize_pair(picture: Picture, segments: SegmentMap, height: int, width: int) -> tuple[Picture, SegmentMap]:
    """Picture by PIL bilinear, segment ids by nearest neighbour."""
    if picture.shape[:2] == (height, width):
        return picture, segments
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    ids = Image.fromarray(segments.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized), np.asarray(ids).astype(np.int32)


def large_scale_jitter(
    picture: Picture, segments: SegmentMap, options: JitterOptions, random_numbers: random.Random
) -> tuple[Picture, SegmentMap]:
    """Scale, crop or pad, and flip.

    Args:
        picture: (H, W, 3) RGB.
        segments: (H, W) segment ids, 0 = void.
        options: ranges.
        random_numbers: source of every choice.

    Returns:
        (crop, crop, 3) and (crop, crop); padding is ``pad_value`` and void.
    """
    height, width = segments.shape
    scale = random_numbers.uniform(options.smallest, options.largest) * options.target / max(height, width)
    picture, segments = resize_pair(
        picture, segments, max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    )
    height, width = segments.shape
    rows, columns = max(0, height - options.crop), max(0, width - options.crop)
    if options.diagonal_crops:
        place = random_numbers.random()
        top, left = round(place * rows), round(place * columns)
    else:
        top, left = random_numbers.randint(0, rows), random_numbers.randint(0, columns)
    picture = picture[top : top + options.crop, left : left + options.crop]
    segments = segments[top : top + options.crop, left : left + options.crop]
    if random_numbers.random() < options.flip:
        picture, segments = picture[:, ::-1], segments[:, ::-1]
    canvas = np.full((options.crop, options.crop, 3), options.pad_value, dtype=np.uint8)
    ids = np.zeros((options.crop, options.crop), dtype=np.int32)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    ids[: segments.shape[0], : segments.shape[1]] = segments
    return canvas, ids
