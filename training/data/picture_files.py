"""Reads the files of a data set: pictures as RGB and label maps as they are stored, of bounded size.

Whatever cannot be read is a :class:`DatasetError` that names the file and the image id.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from odise_rt.errors import DatasetError
from odise_rt.options import DEFAULT_MAX_PIXELS

ImageId = int | str
"""COCO numbers its pictures, other data sets name them."""
Decoded = TypeVar("Decoded")

COLOUR_MODES = frozenset({"RGB", "RGBA", "P"})
"""Pillow's modes of colours, the palette's of a palette picture ("P")."""
LABEL_MODES = frozenset({"L", "P", "I", "I;16", "I;16L", "I;16B"})
"""Pillow's modes of one value a pixel; of a palette picture ("P") the value is the position in the palette."""


def read_rgb(path: Path, image_id: ImageId) -> npt.NDArray[np.uint8]:
    """A picture as uint8 (H, W, 3) RGB, turned as its EXIF tag says.

    Args:
        path: the file.
        image_id: named in errors.

    Raises:
        DatasetError: missing, broken, or of more than ``odise_rt.options.DEFAULT_MAX_PIXELS`` pixels.
    """

    def decode(picture: Image.Image) -> npt.NDArray[np.uint8]:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))

    return _read(path, image_id, decode)


def read_colours(path: Path, image_id: ImageId) -> npt.NDArray[np.uint8]:
    """A PNG whose colours stand for ids as uint8 (H, W, 3) RGB.

    Raises:
        DatasetError: as :func:`read_rgb`, or it has no colours.
    """

    def decode(picture: Image.Image) -> npt.NDArray[np.uint8]:
        if picture.mode not in COLOUR_MODES:
            raise DatasetError(
                f"{path} (image id {image_id}) has Pillow's mode {picture.mode!r}: expected the colours of a panoptic "
                "PNG, of which each is an id (R + 256 G + 65536 B)"
            )
        return np.asarray(picture.convert("RGB"))

    return _read(path, image_id, decode)


def read_label_map(path: Path, image_id: ImageId) -> npt.NDArray[np.int32]:
    """A PNG or TIFF of one 8 or 16 bit value a pixel as int32 (H, W).

    Raises:
        DatasetError: as :func:`read_rgb`, or it has several values a pixel.
    """

    def decode(picture: Image.Image) -> npt.NDArray[np.int32]:
        if picture.mode not in LABEL_MODES:
            raise DatasetError(
                f"{path} (image id {image_id}) has Pillow's mode {picture.mode!r}: expected a label map of one 8 or 16 "
                "bit value a pixel, not colours"
            )
        return np.asarray(picture).astype(np.int32)

    return _read(path, image_id, decode)


def check_same_size(image: npt.NDArray[np.uint8], truth: npt.NDArray[np.int32], path: Path, image_id: ImageId) -> None:
    """Compare a picture (H, W, 3) with its map (H, W) from ``path``.

    Raises:
        DatasetError: sizes differ.
    """
    if truth.shape != image.shape[:2]:
        raise DatasetError(
            f"{path} (image id {image_id}) has {truth.shape[1]}x{truth.shape[0]} pixels, but the picture has "
            f"{image.shape[1]}x{image.shape[0]}: they must be equal"
        )


def _read(path: Path, image_id: ImageId, decode: Callable[[Image.Image], Decoded]) -> Decoded:
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > DEFAULT_MAX_PIXELS:
                raise DatasetError(
                    f"{path} (image id {image_id}) has {picture.width}x{picture.height} pixels: at most "
                    f"{DEFAULT_MAX_PIXELS:,} are read"
                )
            return decode(picture)
    except FileNotFoundError:
        raise DatasetError(f"{path} (image id {image_id}) does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise DatasetError(f"{path} (image id {image_id}) cannot be read as a picture: {exc}") from exc
