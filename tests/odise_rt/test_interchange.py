"""Results as other tools' data, read back with those tools or by their rules."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from odise_rt import MissingPackageError, OptionsError, PanopticResult, Segmenter, SegmentOptions, cli
from odise_rt.interchange import cvat_document

WORDS = "red; green; stuff: blue; white"


@pytest.fixture
def result(segmenter: Segmenter, colours: np.ndarray) -> PanopticResult:
    return segmenter.segment(colours, WORDS)


def drawn(polygons: list[list[tuple[float, float]]], size: tuple[int, int]) -> np.ndarray:
    """Fill polygons at eight times the size and look at the pixels' centres: Pillow also paints the outline itself."""
    mask = np.zeros(size, bool)
    for points in polygons:
        canvas = Image.new("L", (size[1] * 8, size[0] * 8))
        ImageDraw.Draw(canvas).polygon([(8 * x, 8 * y) for x, y in points], fill=1)
        mask |= np.asarray(canvas)[4::8, 4::8] > 0
    return mask


def test_supervision_detections(result: PanopticResult) -> None:
    pytest.importorskip("supervision", reason="Requires: the package supervision")
    detections = result.to_supervision()
    assert len(detections) == len(result.segments)
    assert detections.xyxy.tolist() == [list(map(float, s.box)) for s in result.segments]
    assert detections["class_name"].tolist() == [s.label for s in result.segments]
    assert detections.tracker_id is None
    for mask, segment in zip(detections.mask, result.segments, strict=True):
        assert np.array_equal(mask, result.mask(segment))
    assert detections.area.tolist() == [s.area for s in result.segments]
    best = detections[detections.confidence > 0.5]
    assert len(best) <= len(detections)
    nothing = PanopticResult(result.segment_map * 0, (), result.vocabulary, result.facts)
    assert len(nothing.to_supervision()) == 0


def test_supervision_has_the_tracks_of_a_video(result: PanopticResult) -> None:
    pytest.importorskip("supervision", reason="Requires: the package supervision")
    from odise_rt.tracking import SegmentTracker

    tracked = SegmentTracker().update(result)
    assert tracked.to_supervision().tracker_id.tolist() == [s.track_id for s in tracked.segments]


def test_missing_supervision_is_named(result: PanopticResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingPackageError, match="odise_rt\\[supervision\\]"):
        result.to_supervision()


def test_what_has_no_score_has_none_in_files(result: PanopticResult) -> None:
    segments = tuple(dataclasses.replace(s, score=math.nan) for s in result.segments)
    unscored = dataclasses.replace(result, segments=segments)
    assert {shape["description"] for shape in unscored.to_labelme("a.png")["shapes"]} == {""}
    for given, expected in ((unscored, False), (result, True)):
        found = ["score" in info for info in given.to_coco_panoptic()["annotation"]["segments_info"]]
        assert found == [expected] * len(segments)


@pytest.mark.parametrize("tolerance", [-1, math.nan, 101, "1", None, True])
def test_a_tolerance_that_is_none_is_refused(result: PanopticResult, tolerance: Any) -> None:
    for convert in (result.to_labelme, result.to_cvat):
        with pytest.raises(OptionsError, match="expected 0 to 100 pixels"):
            convert("a.png", tolerance)


def test_labelme(result: PanopticResult) -> None:
    """The red area has a white square in it, so a hole is among the shapes."""
    document = json.loads(json.dumps(result.to_labelme("../a.png", tolerance=0)))
    assert (document["imageHeight"], document["imageWidth"]) == result.size
    assert document["imagePath"] == "../a.png"
    for segment in result.segments:
        shapes = [s for s in document["shapes"] if s["label"] == segment.label]
        assert all(s["shape_type"] == "polygon" and len(s["points"]) >= 3 for s in shapes)
        assert len({s["group_id"] for s in shapes}) == 1
        assert np.array_equal(drawn([s["points"] for s in shapes], result.size), result.mask(segment)), segment.label


def test_cvat(result: PanopticResult) -> None:
    names = ["a.png", 'sub/"quoted" & <b>.png', "two\nlines\tand\r.png"]
    images = [result.to_cvat(name, tolerance=0) for name in names]
    root = ElementTree.fromstring("".join(cvat_document(images, result.vocabulary)))
    assert root.findtext("version") == "1.1"
    assert [n.text for n in root.findall("./meta/task/labels/label/name")] == ["red", "green", "blue", "white"]
    found = root.findall("image")
    assert [(i.get("id"), i.get("name")) for i in found] == [(str(i), name) for i, name in enumerate(names)]
    assert (found[0].get("height"), found[0].get("width")) == ("64", "96")
    for segment in result.segments:
        polygons = [
            [tuple(map(float, pair.split(","))) for pair in (p.get("points") or "").split(";")]
            for p in found[0].findall("polygon")
            if p.get("label") == segment.label
        ]
        assert np.array_equal(drawn(polygons, result.size), result.mask(segment))  # type: ignore[arg-type]


def test_labels_that_xml_cannot_hold(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = segmenter.segment(colours, 'a\x01b & "c" <d>')
    root = ElementTree.fromstring("".join(cvat_document([result.to_cvat("a.png")], result.vocabulary)))
    polygon = root.find("image/polygon")
    assert polygon is not None
    assert (polygon.get("label") or "").endswith('b & "c" <d>')


def test_parts_of_a_segment_are_a_group(segmenter: Segmenter) -> None:
    image = np.zeros((64, 96, 3), np.uint8)
    image[..., 2] = 255
    image[8:24, 8:24] = image[40:56, 60:80] = (255, 0, 0)
    result = segmenter.segment(image, "stuff: red; green; stuff: blue", SegmentOptions(overlap_threshold=0.0))
    red = [s for s in result.to_labelme("a.png")["shapes"] if s["label"] == "red"]
    assert len(red) == 2
    assert len({s["group_id"] for s in red} - {None}) == 1


def test_files_name_the_image_as_seen_from_them(label_bundle: Path, tmp_path: Path, colours: np.ndarray) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(colours).save(tmp_path / "photos/a.png")
    command = ["segment", str(tmp_path / "photos/a.png"), "--bundle", str(label_bundle), "--threads", "1", "-q"]
    assert cli.main([*command, "--vocab", WORDS, "--out", str(tmp_path / "o"), "--format", "labelme,cvat"]) == 0
    labelme = tmp_path / "o/labelme/a.json"
    assert (labelme.parent / json.loads(labelme.read_text())["imagePath"]).resolve() == tmp_path / "photos/a.png"
    assert ElementTree.parse(tmp_path / "o/cvat.xml").getroot().find("image") is not None
