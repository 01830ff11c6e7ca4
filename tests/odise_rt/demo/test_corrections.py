"""Names and omissions by hand: where they count, what becomes of the segments, and what files say of them."""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import numpy as np
import pytest

from odise_rt import PanopticResult, Segmenter, SegmentOptions, Vocabulary
from odise_rt.demo.corrections import Corrections, with_words
from odise_rt.demo.views import download, on_top, shown_as, view
from odise_rt.options import Output
from odise_rt.results import Instance

WORDS = "red, crimson; green; blue; stuff: white; stuff: car"


def named(segmenter: Segmenter, image: np.ndarray, mode: Output = "panoptic", **options: float) -> PanopticResult:
    return segmenter.segment(image, Vocabulary.parse(WORDS), SegmentOptions(outputs=(mode,), **options))  # type: ignore[arg-type]


def place(result: PanopticResult, label: str, mode: Output = "panoptic") -> tuple[float, float]:
    regions = view(result, mode, 0.2, ())["regions"]
    x, y = next(region["place"] for region in regions if region["label"] == label)
    return x, y


def labels(result: PanopticResult) -> list[str]:
    return sorted(segment.label for segment in result.segments)


def test_any_word_of_the_vocabulary_names_a_segment(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = dataclasses.replace(named(segmenter, colours))
    few = tuple(dataclasses.replace(s, candidates=s.candidates[:1]) for s in result.segments)
    result = dataclasses.replace(result, segments=few)
    for word, label in (("blue", "blue"), ("CAR ", "car"), ("crimson", "red")):
        there = place(result, "green")
        shown = shown_as(result, "panoptic", 0.0, Corrections(((*there, word),)))
        segment = shown.segments[shown.segment_map[int(there[1] * 64), int(there[0] * 96)] - 1]
        assert (segment.label, segment.score, segment.corrected) == (label, 1.0, True)
        assert shown.vocabulary[segment.class_index].name == label
        assert segment.isthing == (label != "car")


def test_its_own_name_takes_a_correction_back(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours)
    there = place(result, "green")
    shown = shown_as(result, "panoptic", 0.0, Corrections(((*there, "blue"), (*there, "green"))))
    assert shown.segments == result.segments
    nothing = Corrections(((*there, "no word of these"),))
    assert shown_as(result, "panoptic", 0.0, nothing).segments == result.segments


@pytest.mark.parametrize("mode", ["panoptic", "instance"])
def test_a_word_of_one_s_own_is_a_class_of_the_files(segmenter: Segmenter, colours: np.ndarray, mode: Output) -> None:
    result = named(segmenter, colours, mode)
    made = Corrections(((*place(result, "red", mode), "grassland"),), ("fire engine", "grassland", "blue"))
    shown = shown_as(result, mode, 0.2, made)
    assert shown.vocabulary.names == (*result.vocabulary.names, "fire engine", "grassland")
    assert "grassland" in labels(shown)
    document = download(result, mode, 0.2, "a.png", made)
    assert [c["name"] for c in document["vocabulary"]][-1] == "grassland"
    (segment,) = [s for s in document["segments"] if s["label"] == "grassland"]
    assert (segment["score"], segment["corrected"]) == (1.0, True)
    assert view(result, mode, 0.2, (), corrections=made)["words"][-1] == "grassland"


def test_added_words_follow_the_ids_of_a_data_set() -> None:
    coco = with_words(Vocabulary.builtin("coco"), ("Person", "stuff", "wombat", "wombat"))
    assert [(c.name, c.id) for c in coco.classes[-2:]] == [("stuff", 201), ("wombat", 202)]
    assert with_words(coco, ("person",)) is coco


def test_stuff_is_one_segment_whoever_named_it(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours)
    places = [place(result, label) for label in ("white", "red", "green")]
    made = Corrections(tuple((*there, "white") for there in places[1:]))
    shown = shown_as(result, "panoptic", 0.0, made)
    assert labels(shown) == ["blue", "white"]
    white = next(s for s in shown.segments if s.label == "white")
    assert (white.score, white.corrected, white.isthing) == (1.0, True, False)
    assert (
        white.area
        == (shown.segment_map == white.id).sum()
        == sum(s.area for s in result.segments[:]) - next(s.area for s in result.segments if s.label == "blue")
    )
    assert [s.id for s in shown.segments] == [1, 2]
    assert white.candidates == next(s for s in result.segments if s.label == "white").candidates
    region = next(r for r in view(result, "panoptic", 0.0, (), corrections=made)["regions"] if r["label"] == "white")
    assert sorted(map(tuple, region["parts"])) == sorted(places), "all of it can be named anew"


def test_things_of_one_name_stay_apart(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours)
    made = Corrections(((*place(result, "green"), "blue"),))
    assert labels(shown_as(result, "panoptic", 0.0, made)) == ["blue", "blue", "red", "white"]


@pytest.mark.parametrize("mode", ["panoptic", "instance"])
def test_what_is_left_out_is_in_no_file(segmenter: Segmenter, colours: np.ndarray, mode: Output) -> None:
    result = named(segmenter, colours, mode)
    there = place(result, "green", mode)
    made = Corrections(((*there, None),))
    shown = shown_as(result, mode, 0.2, made)
    assert labels(shown) == [label for label in labels(shown_as(result, mode, 0.2)) if label != "green"]
    assert [s.id for s in shown.segments] == list(range(1, len(shown.segments) + 1))
    assert np.unique(shown.segment_map).tolist() == list(range(len(shown.segments) + 1))
    assert not shown.segment_map[int(there[1] * 64), int(there[0] * 96)]
    assert "green" not in [s["label"] for s in download(result, mode, 0.2, "a.png", made)["segments"]]
    assert "green" not in [r["label"] for r in view(result, mode, 0.2, (), corrections=made)["regions"]]
    for mask in shown.segments:
        assert shown.mask(mask).sum() == mask.area


def overlapping(result: PanopticResult) -> PanopticResult:
    """Three objects: a large one that hides a small one, and a third below part of it."""

    def instance(label: str, score: float, box: tuple[int, int, int, int]) -> Instance:
        left, top, right, bottom = box
        bits = np.packbits(np.ones((bottom - top, right - left), bool))
        index = result.vocabulary.names.index(label)
        return Instance(label, index, score, (bottom - top) * (right - left), box, result.size, bits)

    found = (
        instance("red", 0.9, (0, 0, 40, 40)),
        instance("green", 0.8, (10, 10, 20, 20)),
        instance("blue", 0.7, (30, 30, 60, 60)),
    )
    return dataclasses.replace(result, instances=found)


def test_files_have_what_is_seen_of_each_object(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = overlapping(named(segmenter, colours, "instance"))
    shown = shown_as(result, "instance")
    assert [s.label for s in shown.segments] == ["red", "blue", "green"], "what is hidden comes last"
    assert [s.area for s in shown.segments] == [1600, 900, 100], "of the whole masks"
    seen = on_top(shown)
    assert [(s.id, s.label, s.area, s.box) for s in seen.segments] == [
        (1, "red", 1600, (0, 0, 40, 40)),
        (2, "blue", 800, (30, 30, 60, 60)),
    ]


def test_what_comes_to_light_can_be_named_in_turn(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = overlapping(named(segmenter, colours, "instance"))
    there = (15.5 / 96, 15.5 / 64)
    shown = shown_as(result, "instance", 0.0, Corrections(((*there, None), (*there, "white"))))
    assert [(s.label, s.isthing) for s in shown.segments] == [("white", True), ("blue", True)]
    shown = shown_as(result, "instance", 0.0, Corrections(((*there, None), (*there, None), (*there, None))))
    assert [s.label for s in shown.segments] == ["blue"]


def test_other_tools_are_told_which_names_are_by_hand(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = named(segmenter, colours)
    shown = on_top(shown_as(result, "panoptic", 0.0, Corrections(((*place(result, "green"), "car"),))))
    assert {s["description"] for s in shown.to_labelme("a.png")["shapes"] if s["label"] == "car"} == {"corrected"}
    sources = {p.get("label"): p.get("source") for p in ElementTree.fromstring(shown.to_cvat("a.png"))}
    assert sources["car"] == "manual"
    assert set(sources.values()) == {"manual", "auto"}
    infos = shown.coco_annotation(1, "a.png")["segments_info"]
    assert [info["score"] for info in infos if info.get("corrected")] == [1.0]
