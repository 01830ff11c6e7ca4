"""The reader of COCO's instances: every form of a segmentation, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from odise_rt import rle
from odise_rt.errors import DatasetError
from training.data.coco_instances import CocoInstances
from training.data.coco_panoptic import CocoPanoptic

SIDE = 64
DISC = (np.mgrid[:SIDE, :SIDE] ** 2).sum(axis=0) < 900
SEGMENTATIONS: dict[str, Any] = {
    "polygons": [[4, 4, 30.5, 4, 30.5, 22.25, 4, 20], [40.0, 40.0, 60.0, 44.0, 50.0, 63.0]],
    "run lengths of a crowd": {"size": [SIDE, SIDE], "counts": rle.run_lengths(DISC).tolist()},
    "compressed run lengths": rle.encode(DISC.T ^ DISC[::-1]),
}


def content() -> dict[str, Any]:
    annotations = [
        {"id": 7 + i, "image_id": 1, "category_id": 13, "iscrowd": int("crowd" in form), "segmentation": segmentation}
        for i, (form, segmentation) in enumerate(SEGMENTATIONS.items())
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 13, "name": "ball"}]}


@pytest.fixture
def data(mini_data: Path) -> CocoPanoptic:
    return CocoPanoptic.from_root(mini_data, "val", with_captions=False)


def test_every_form_is_the_mask_of_pycocotools(data: CocoPanoptic, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content()))
    found = CocoInstances(path, data).of(1, (SIDE, SIDE))
    reference = COCO()
    reference.dataset = content()
    reference.createIndex()
    assert [(category, crowd) for _, category, crowd in found] == [(13, False), (13, True), (13, False)]
    for (mask, _, _), annotation in zip(found, reference.loadAnns([7, 8, 9]), strict=True):
        assert mask.dtype == bool
        assert np.array_equal(mask, reference.annToMask(annotation))
        assert 100 < mask.sum() < 3000
    assert CocoInstances(path, data).of(2, (SIDE, SIDE)) == []


def _first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][0].update(changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("annotations"), "lacks the list 'annotations'"),
        (
            lambda c: c["images"].pop(),
            "does not know image id 3 of .*panoptic_val.json: name the instances of the same",
        ),
        (_first(image_id=9), r"annotations\[0\] is of image id 9, which is not declared"),
        (_first(category_id=11), "names category 11, which is no thing"),
        (_first(iscrowd=2), "has iscrowd 2"),
        (_first(segmentation=None), "segmentation of no known form"),
        (_first(segmentation=[]), "segmentation of no known form"),
        (_first(segmentation=[[1, 1, 9, 9]]), "polygons of three or more points"),
        (_first(segmentation=[[1, 1, 9, 9, 5]]), "polygons of three or more points"),
        (_first(segmentation=[[1, 1, 9, 9, 5, "x"]]), "polygons of three or more points"),
        (_first(segmentation=[[1, 1, 9, 9, 5, float("nan")]]), "polygons of three or more points"),
        (_first(segmentation=[[1, 1, 1e12, 9, 5, 5]]), "polygons of three or more points"),
        (_first(segmentation={"counts": [1]}), "segmentation of no known form"),
        (lambda c: c["annotations"][0].pop("segmentation"), "lacks 'segmentation'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_at_once(
    spoil: Callable[[dict[str, Any]], object], message: str, data: CocoPanoptic, tmp_path: Path
) -> None:
    path, broken = tmp_path / "instances.json", content()
    spoil(broken)
    path.write_text(json.dumps(broken))
    with pytest.raises(DatasetError, match=message):
        CocoInstances(path, data)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [SIDE, SIDE], "counts": [1, 2]},
        {"size": [SIDE, SIDE], "counts": [SIDE * SIDE + 1, -1]},
        {"size": [SIDE, SIDE], "counts": [None]},
        {"size": [SIDE, SIDE], "counts": "é"},
        {"size": [SIDE, SIDE], "counts": "o" * 99 + "0"},
        {"size": [10**6, 10**6], "counts": [10**12]},
    ],
)
def test_run_lengths_must_fill_the_picture(segmentation: dict[str, Any], data: CocoPanoptic, tmp_path: Path) -> None:
    path, broken = tmp_path / "instances.json", content()
    broken["annotations"][0]["segmentation"] = segmentation
    path.write_text(json.dumps(broken))
    with pytest.raises(DatasetError, match=r"annotations\[0\] has run lengths that do not fit its picture"):
        CocoInstances(path, data).of(1, (SIDE, SIDE))
