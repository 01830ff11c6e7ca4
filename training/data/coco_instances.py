"""Reads the instances of a COCO file: masks that may overlap, which a panoptic PNG cannot hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as polygon_masks

from odise_rt import rle
from odise_rt.errors import DatasetError
from training.data.coco_fields import field_of, flag_of, image_id_of, number_of, read_coco
from training.data.coco_panoptic import CocoPanoptic
from training.data.picture_files import ImageId


class CocoInstances:
    """The instances of a panoptic set's pictures, as published AP is measured against.

    Args:
        path: COCO JSON, such as ``instances_val2017.json`` or ``ade20k_instance_val.json``. Segmentations are polygons,
            or run lengths, compressed or not.
        data: the panoptic set; the file must know all its pictures, and name no category but its things.

    Raises:
        DatasetError: a file that is missing or broken, or does not belong to the panoptic set.
    """

    def __init__(self, path: Path, data: CocoPanoptic) -> None:
        self.path = path
        things = {category.id for category in data.categories if category.isthing}
        content = read_coco(path, ("images", "annotations"))
        self._entries: dict[ImageId, list[dict[str, Any]]] = {
            image_id_of(entry, "id", f"{path}: images[{position}]"): []
            for position, entry in enumerate(content["images"])
        }
        unknown = [image_id for image_id in data.image_ids if image_id not in self._entries]
        if unknown:
            raise DatasetError(
                f"{path} does not know image id {unknown[0]} of {data.annotations_path}: name the instances of the "
                "same pictures"
            )
        for position, entry in enumerate(content["annotations"]):
            where = f"{path}: annotations[{position}]"
            image_id = image_id_of(entry, "image_id", where)
            if image_id not in self._entries:
                raise DatasetError(f"{where} is of image id {image_id}, which is not declared")
            category = number_of(entry, "category_id", where)
            if category not in things:
                raise DatasetError(f"{where} names category {category}, which is no thing of {data.annotations_path}")
            if not is_segmentation(field_of(entry, "segmentation", where)):
                raise DatasetError(
                    f"{where} has a segmentation of no known form: expected polygons of three or more points, "
                    "[[x, y, x, y, x, y], ...], or run lengths, {'size': [height, width], 'counts': ...}"
                )
            iscrowd = "iscrowd" in entry and flag_of(entry, "iscrowd", where)
            self._entries[image_id].append({**entry, "where": where, "category_id": category, "iscrowd": iscrowd})

    def of(self, image_id: ImageId, size: tuple[int, int]) -> list[tuple[npt.NDArray[np.bool_], int, bool]]:
        """(mask (H, W), category id, iscrowd) of each instance of a picture.

        Args:
            image_id: the picture.
            size: its height and width.

        Raises:
            DatasetError: run lengths that do not fill the picture.
        """
        return [
            (mask_of(entry["segmentation"], size, entry["where"]), entry["category_id"], entry["iscrowd"])
            for entry in self._entries[image_id]
        ]


def is_segmentation(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("size"), list) and isinstance(value.get("counts"), list | str)
    return isinstance(value, list) and len(value) > 0 and all(map(_is_polygon, value))


def _is_polygon(value: Any) -> bool:
    # Within bounds of pictures: pycocotools takes memory for every pixel that an edge is long.
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(isinstance(v, int | float) and math.isfinite(v) and abs(v) < 2**16 for v in value)
    )


def mask_of(segmentation: Any, size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    height, width = size
    if isinstance(segmentation, list):
        merged = polygon_masks.merge(polygon_masks.frPyObjects(segmentation, height, width))
        filled: npt.NDArray[np.bool_] = polygon_masks.decode(merged).astype(bool)
        return filled
    try:
        if segmentation["size"] != [height, width]:
            raise ValueError(f"size {segmentation['size']}, and the picture has {[height, width]}")
        return rle.decode(segmentation)
    except (ValueError, TypeError, OverflowError) as exc:
        raise DatasetError(f"{where} has run lengths that do not fit its picture ({exc}): download it again") from exc
