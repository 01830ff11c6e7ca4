"""Captioned scenes in memory, for the frozen models: pictures and captions of a COCO captions file, no masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from odise_rt.errors import DatasetError


class SceneBank:
    """All pictures of a split, decoded once.

    Args:
        root: Data set folder.
        split: Its split, "train" as a rule.
        limit: Use only so many pictures.

    Attributes:
        images: uint8 (N, side, side, 3).
        captions: Captions of each picture.

    Raises:
        DatasetError: No captions, a missing picture, or pictures of different sizes.
    """

    def __init__(self, root: Path, split: str = "train", limit: int | None = None) -> None:
        path = root / "annotations" / f"captions_{split}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            entries = content["images"][:limit]
            by_image: dict[int, list[str]] = {}
            for caption in content["annotations"]:
                by_image.setdefault(caption["image_id"], []).append(caption["caption"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise DatasetError(
                f"{path} is not a COCO captions file ({exc!r}): draw one with python -m training.data.sticker_world"
            ) from exc
        pictures = []
        for entry in entries:
            file = root / split / entry["file_name"]
            try:
                pictures.append(np.asarray(Image.open(file).convert("RGB")))
            except OSError as exc:
                raise DatasetError(f"{file} (image id {entry['id']}): cannot be read: {exc}") from exc
            if pictures[-1].shape != pictures[0].shape:
                raise DatasetError(f"{file} (image id {entry['id']}): all pictures must have the size of the first")
            if not by_image.get(entry["id"]):
                raise DatasetError(f"{path}: image id {entry['id']} has no caption")
        self.images = np.stack(pictures)
        self.captions = [by_image[entry["id"]] for entry in entries]

    def __len__(self) -> int:
        return len(self.images)
