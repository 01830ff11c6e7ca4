"""The files that visitors download: each what is shown, in its format, at the picture's own size."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from odise_rt.demo.session import Controls, Words, Workbench


@pytest.fixture(params=["panoptic", "semantic", "instance"])
def file(
    request: pytest.FixtureRequest, bench: Workbench, colours: np.ndarray, encode: Callable[..., bytes]
) -> Callable[[str], bytes]:
    """Makes a file of the colours' result in a mode."""
    picture = bench.add(encode(colours), "my.colours.png")
    state = bench.show(picture, Controls(Words("red; green; blue; stuff: white"), mode=request.param, least_score=0.2))
    key = state["views"][0]["key"]
    return lambda kind: bench.file(picture, key, kind)


def no_constant(text: str) -> Any:
    raise AssertionError(f"{text} is no JSON")


def labels(file: Callable[[str], bytes]) -> list[str]:
    return [s["label"] for s in json.loads(file("json"))["segments"]]


def test_coco(file: Callable[[str], bytes]) -> None:
    with zipfile.ZipFile(io.BytesIO(file("coco"))) as archive:
        assert archive.namelist() == ["panoptic.json", "panoptic/my.colours.png"]
        data = json.loads(archive.read("panoptic.json"), parse_constant=no_constant)
        ids = np.asarray(Image.open(io.BytesIO(archive.read("panoptic/my.colours.png"))))[..., 0]
    assert data["images"] == [{"id": 1, "file_name": "my.colours.png", "height": 64, "width": 96}]
    (annotation,) = data["annotations"]
    assert annotation["image_id"] == 1
    assert annotation["file_name"] == "my.colours.png"
    names = {c["id"]: c["name"] for c in data["categories"]}
    assert [names[s["category_id"]] for s in annotation["segments_info"]] == labels(file)
    on_top = {int(i): ids == i for i in np.unique(ids) if i}
    assert {s["id"]: s["area"] for s in annotation["segments_info"]} == {i: mask.sum() for i, mask in on_top.items()}
    for info in annotation["segments_info"]:
        left, top, width, height = info["bbox"]
        rows, columns = np.nonzero(on_top[info["id"]])
        assert (left, top, left + width - 1, top + height - 1) == (
            columns.min(),
            rows.min(),
            columns.max(),
            rows.max(),
        )
    assert ids.shape == (64, 96)


def test_labelme(file: Callable[[str], bytes]) -> None:
    data = json.loads(file("labelme"), parse_constant=no_constant)
    assert (data["imagePath"], data["imageHeight"], data["imageWidth"]) == ("my.colours.png", 64, 96)
    assert {shape["label"] for shape in data["shapes"]} == set(labels(file))
    assert b"nan" not in file("labelme")


def test_cvat(file: Callable[[str], bytes]) -> None:
    image = ElementTree.fromstring(file("cvat")).find("image")
    assert image is not None
    assert image.get("name") == "my.colours.png"
    assert {polygon.get("label") for polygon in image} == set(labels(file))


def test_ids(file: Callable[[str], bytes]) -> None:
    ids = np.asarray(Image.open(io.BytesIO(file("png"))))
    assert ids.shape == (64, 96, 3)
    assert set(np.unique(ids[..., 0])) - {0} <= set(range(1, len(labels(file)) + 1))
