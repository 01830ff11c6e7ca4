"""COCO mask AP through pycocotools, from panoptic ground truth and per-picture binary masks."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


@dataclass(frozen=True)
class InstanceScores:
    """COCO averages in percent; NaN where nothing is there to find (pycocotools says -1)."""

    ap: float
    """Mean over IoU 0.50:0.95."""
    ap50: float
    ap75: float


def _encode(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    encoded: dict[str, Any] = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {**encoded, "counts": encoded["counts"].decode()}  # JSON has no bytes


@dataclass
class InstanceAp:
    """Collects ground truth and detections of a data set."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        truth: Sequence[tuple[npt.NDArray[np.bool_], int, bool]],
        predicted: Sequence[tuple[npt.NDArray[np.bool_], int, float]],
        size: tuple[int, int],
    ) -> None:
        """Add a picture.

        Args:
            truth: (mask (H, W), category id, iscrowd) of each thing.
            predicted: (mask (H, W), category id, score in [0, 1]).
            size: (height, width).
        """
        # Numbers of our own: pycocotools sorts ids, which those of a data set, numbers and names, may not allow.
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "height": size[0], "width": size[1]})
        for mask, category_id, iscrowd in truth:
            encoded = _encode(mask)
            self.annotations.append(
                {
                    "id": len(self.annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "iscrowd": int(iscrowd),
                    "segmentation": encoded,
                    "area": float(rle.area(encoded)),
                    "bbox": [float(v) for v in rle.toBbox(encoded)],
                }
            )
        for mask, category_id, score in predicted:
            if mask.any():
                self.detections.append(
                    {
                        "image_id": image_id,
                        "category_id": category_id,
                        "segmentation": _encode(mask),
                        "score": float(score),
                    }
                )

    def merge(self, other: InstanceAp) -> None:
        """Add other pictures behind these."""
        images, annotations = len(self.images), len(self.annotations)
        self.images += [{**image, "id": image["id"] + images} for image in other.images]
        self.annotations += [
            {**a, "id": a["id"] + annotations, "image_id": a["image_id"] + images} for a in other.annotations
        ]
        self.detections += [{**found, "image_id": found["image_id"] + images} for found in other.detections]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"images": self.images, "annotations": self.annotations, "detections": self.detections}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InstanceAp:
        """What :meth:`to_dict` gave."""
        return cls(**data)

    def scores(self, category_ids: Iterable[int]) -> InstanceScores:
        """COCO AP over the given categories."""
        categories = sorted(set(category_ids))
        if not any(a["category_id"] in categories and not a["iscrowd"] for a in self.annotations):
            return InstanceScores(math.nan, math.nan, math.nan)
        if not self.detections:
            return InstanceScores(0.0, 0.0, 0.0)
        # pycocotools reports its progress with print.
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {
                "images": self.images,
                "annotations": self.annotations,
                "categories": [{"id": c} for c in categories],
            }
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes([dict(d) for d in self.detections]), "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        ap, ap50, ap75 = (100 * float(v) for v in evaluation.stats[:3])
        return InstanceScores(ap, ap50, ap75)
