"""What the page draws agrees with the result, in each mode."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from odise_rt import PanopticResult, Segmenter, SegmentOptions, Vocabulary, rle
from odise_rt.demo import views
from odise_rt.demo.views import download, ink, runs, shown_as, shown_instances, view
from odise_rt.options import Output
from odise_rt.visualize import segment_colours

WORDS = "red, crimson; green; blue; stuff: white"


def named(
    segmenter: Segmenter, image: np.ndarray, mode: Output, words: str = WORDS, **options: float
) -> PanopticResult:
    return segmenter.segment(image, Vocabulary.parse(words), SegmentOptions(outputs=(mode,), **options))  # type: ignore[arg-type]


def unroll(data: dict[str, list[int]], shape: tuple[int, int]) -> np.ndarray:
    return np.repeat(data["ids"], data["lengths"]).reshape(shape)


def test_panoptic_view(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours, "panoptic")
    drawn = view(result, "panoptic", 0.0, segmenter.bundle.training_vocabulary)
    np.testing.assert_array_equal(unroll(drawn["map"], result.size), result.segment_map)
    assert (drawn["map"]["height"], drawn["map"]["width"]) == (64, 96)
    regions = {region["label"]: region for region in drawn["regions"]}
    assert set(regions) == {"red", "green", "blue", "white"}
    assert [r["share"] for r in drawn["regions"]] == sorted((r["share"] for r in drawn["regions"]), reverse=True)
    assert {name: region["seen"] for name, region in regions.items()} == {
        "red": True,
        "green": True,
        "blue": False,
        "white": False,
    }
    assert not regions["white"]["thing"]
    for segment, colour in zip(result.segments, segment_colours(result), strict=True):
        region = regions[segment.label]
        assert region["id"] == segment.id
        assert region["score"] == pytest.approx(segment.score, abs=1e-4)
        assert region["share"] == pytest.approx(segment.area / (64 * 96))
        assert region["colour"] == "#{:02x}{:02x}{:02x}".format(*colour)
        x, y = region["place"]
        assert result.segment_map[int(y * 64), int(x * 96)] == segment.id
        best = region["names"][0]
        assert best["label"] == segment.label
        assert (best["score"], best["mask"], best["clip"]) == pytest.approx(
            (segment.score, segment.candidates[0].mask_score, segment.candidates[0].clip_score), abs=1e-4
        )
        assert len(region["names"]) == 4
    json.dumps(drawn)


def test_semantic_view_has_one_region_a_class_without_scores(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours, "semantic")
    assert result.semantic_map is not None
    drawn = view(result, "semantic", 0.0, ())
    owners = unroll(drawn["map"], result.size)
    assert owners.min() == 1, "every pixel has a class"
    for region in drawn["regions"]:
        expected = result.semantic_map == result.vocabulary.names.index(region["label"])
        np.testing.assert_array_equal(owners == region["id"], expected)
        assert region["score"] is None
        assert region["names"] == []
        assert region["share"] == pytest.approx(expected.mean())
    shown = shown_as(result, "semantic")
    assert all(math.isnan(s.score) for s in shown.segments)
    assert shown.overlay(colours).width > 640, "the legend leaves the missing score out"


def test_instance_view_draws_the_best_on_top_and_keeps_whole_masks(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours, "instance")
    assert result.instances is not None
    drawn = view(result, "instance", 0.2, ())
    chosen = shown_instances(result, 0.2)
    assert chosen
    assert all(instance.score >= 0.2 for instance in chosen)
    assert "white" not in {region["label"] for region in drawn["regions"]}, "stuff has no instances"
    owners = unroll(drawn["map"], result.size)
    taken = np.zeros(result.size, bool)
    by_id = {region["id"]: region for region in drawn["regions"]}
    for identifier, instance in enumerate(chosen, 1):
        region = by_id[identifier]
        assert (region["label"], region["score"]) == (instance.label, pytest.approx(instance.score, abs=1e-4))
        np.testing.assert_array_equal(unroll(region["mask"], result.size), instance.mask)
        np.testing.assert_array_equal(owners == identifier, instance.mask & ~taken)
        taken |= instance.mask
        assert region["names"][0]["label"] == instance.label


def test_one_mask_is_shown_under_its_best_name_only(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours, "instance", "red; green; blue; car")
    assert result.instances is not None
    masks = [(i.box, i.bits.tobytes()) for i in result.instances]
    assert len(set(masks)) < len(masks), "the case is not empty: pairs of mask and class"
    chosen = shown_instances(result, 0.0)
    assert len({(i.box, i.bits.tobytes()) for i in chosen}) == len(chosen)
    assert chosen[0] is result.instances[0]


def test_unknown_regions_are_marked(segmenter: Segmenter, colours: np.ndarray) -> None:
    modes: tuple[Output, ...] = ("panoptic", "semantic", "instance")
    for mode in modes:
        result = named(segmenter, colours, mode, "red; car", unknown=0.9)
        drawn = view(result, mode, 0.0, segmenter.bundle.training_vocabulary)
        unknown = [region for region in drawn["regions"] if region["label"] == "unknown"]
        assert unknown, mode
        for region in unknown:
            assert region["unknown"]
            assert not region["seen"]
            assert len(set(region["colour"][i : i + 2] for i in (1, 3, 5))) == 1, "grey"


def test_no_segment(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours, "panoptic", object_mask_threshold=1.0)
    drawn = view(result, "panoptic", 0.0, ())
    assert drawn["regions"] == []
    assert drawn["map"] == {"width": 96, "height": 64, "ids": [0], "lengths": [64 * 96]}


def test_classes_of_one_name_share_a_colour_in_a_comparison(segmenter: Segmenter, colours: np.ndarray) -> None:
    first = Vocabulary.parse(WORDS)
    other = named(segmenter, colours, "panoptic", "blue; car; green; crimson")
    left = view(named(segmenter, colours, "panoptic"), "panoptic", 0.0, ())
    right = view(other, "panoptic", 0.0, (), beside=first)
    alone = view(other, "panoptic", 0.0, ())
    colour = [{r["label"]: r["colour"] for r in drawn["regions"]} for drawn in (left, right, alone)]
    assert colour[0]["blue"] == colour[1]["blue"] != colour[2]["blue"]
    assert colour[0]["green"] == colour[1]["green"]
    assert colour[1]["crimson"] not in colour[0].values()


def test_runs_of_any_map() -> None:
    values = np.array([[1, 1, 0], [0, 2, 2]])
    assert runs(values) == {"ids": [1, 0, 2], "lengths": [2, 2, 2]}
    assert runs(np.zeros((3, 1), bool)) == {"ids": [0], "lengths": [3]}


@pytest.mark.parametrize(
    ("colour", "expected"),
    [((255, 255, 255), "#000000"), ((0, 0, 0), "#ffffff"), ((255, 255, 0), "#000000"), ((120, 0, 120), "#ffffff")],
)
def test_ink_is_readable(colour: tuple[int, int, int], expected: str) -> None:
    assert ink(colour) == expected


@pytest.mark.parametrize("mode", ["panoptic", "semantic", "instance"])
def test_download_agrees_with_what_is_shown(segmenter: Segmenter, colours: np.ndarray, mode: Output) -> None:
    result = named(segmenter, colours, mode)
    drawn = view(result, mode, 0.2, ())
    document = download(result, mode, 0.2, "picture.png")
    document = json.loads(json.dumps(document, allow_nan=False))
    assert (document["image"], document["mode"]) == ("picture.png", mode)
    assert [c["name"] for c in document["vocabulary"]] == ["red", "green", "blue", "white"]
    shown = {region["id"]: region for region in drawn["regions"]}
    assert {s["id"]: s["label"] for s in document["segments"]} == {i: r["label"] for i, r in shown.items()}
    for segment in document["segments"]:
        region = shown[segment["id"]]
        mask = region["mask"] if mode == "instance" else drawn["map"]
        expected = unroll(mask, result.size) == (1 if mode == "instance" else segment["id"])
        np.testing.assert_array_equal(rle.decode(segment["rle"]), expected)
        assert ("score" in segment) == (mode != "semantic")
        if mode != "semantic":
            assert [c["label"] for c in segment["candidates"]] == [n["label"] for n in region["names"]]


def test_colours_without_a_comparison_are_the_picture_s(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours, "panoptic")
    assert views.colours(result) == segment_colours(result)
