"""Captioned scenes in memory, for the frozen models: pictures and captions of a COCO captions file, no masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from odise_rt.errors import DatasetError
from training.data.coco_panoptic import read_captions, read_images
from training.data.picture_files import read_rgb


class SceneBank:
    """All pictures of the training split, decoded once.

    Args:
        root: Data set folder.
        least: Pixels of the smallest side that pictures may have.
        limit: Use only so many pictures.

    Attributes:
        images: uint8 (N, side, side, 3).
        captions: Captions of each picture.

    Raises:
        DatasetError: No captions, a missing picture, or pictures that are not square, too small, or of different sizes.
    """

    def __init__(self, root: Path, least: int = 1, limit: int | None = None) -> None:
        path = root / "annotations" / "captions_train.json"
        captions = read_captions(path)
        pictures = []
        self.captions: list[tuple[str, ...]] = []
        for image_id, name in read_images(path)[:limit]:
            file = root / "train" / name
            pictures.append(read_rgb(file, image_id))
            height, width, _ = pictures[-1].shape
            if height != width or width < least or pictures[-1].shape != pictures[0].shape:
                raise DatasetError(
                    f"{file} (image id {image_id}) has {width}x{height} pixels: expected square pictures of one size, "
                    f"{least} or more"
                )
            if image_id not in captions:
                raise DatasetError(f"{path}: image id {image_id} has no caption")
            self.captions.append(captions[image_id])
        self.images = np.stack(pictures)

    def __len__(self) -> int:
        return len(self.images)
