"""Why a segment has its name: the best names with both classifiers' scores, and "unknown" where no word fits."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odise_rt import (
    OptionsError,
    PanopticResult,
    Segmenter,
    SegmentOptions,
    Vocabulary,
    VocabularyError,
    classification,
    cli,
)
from odise_rt import segmenter as segmenter_module
from odise_rt.batch import Job
from odise_rt.classification import Classifier, MaskEmbeddings, classify, clip_weights, name_queries
from odise_rt.results import Candidate, category_ids
from odise_rt.text_embeddings import EmbeddedVocabulary, normalise
from odise_rt.visualize import segment_colours
from tests.odise_rt.fake_bundle import make_facts

WORDS = "red, crimson; green; blue; white; stuff: sky; car"


def random_masks(seed: int, queries: int = 7) -> tuple[MaskEmbeddings, Classifier]:
    rng = np.random.default_rng(seed)
    masks = MaskEmbeddings(
        rng.standard_normal((queries, 5), np.float32), rng.standard_normal((queries, 8), np.float32), None
    )
    texts = [normalise(rng.standard_normal((9, c), np.float32)) for c in (5, 8)]
    words, no_object = EmbeddedVocabulary(*texts), np.eye(5, dtype=np.float32)[-1]
    weights = clip_weights(rng.random(6) < 0.5, 0.3, 0.7)
    return masks, Classifier(make_facts(), no_object, words, np.array([0, 1, 2, 4, 7, 8]), weights)


def test_segments_carry_their_best_names(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = segmenter.segment(colours, WORDS)
    assert result.segments
    for segment in result.segments:
        names = segment.candidates
        assert len(names) == 5
        assert names[0].label == segment.label
        assert names[0].class_index == segment.class_index
        assert names[0].score == segment.score
        assert [n.score for n in names] == sorted((n.score for n in names), reverse=True)
        assert [result.vocabulary[n.class_index].name for n in names] == [n.label for n in names]
        assert all(0 <= v <= 1 for n in names for v in (n.score, n.mask_score, n.clip_score))
        assert not segment.unknown


def test_candidates_are_those_of_the_whole_matrix() -> None:
    """However few masks are classified at a time, and whichever way the scores are looked up."""
    for seed in range(20):
        masks, classifier = random_masks(seed)
        whole = classify(masks, classifier)
        names = name_queries(masks, classifier, best=4)
        assert np.array_equal(names.probabilities, whole.probabilities)
        for query, row in enumerate(whole.probabilities):
            if row.argmax() == 6:
                assert not names.scores[query].any()
                continue
            order = np.argsort(-row[:-1], kind="stable")[:4]
            assert names.classes[query].tolist() == order.tolist()
            np.testing.assert_array_equal(names.scores[query], row[order])
            np.testing.assert_allclose(names.mask_scores[query], np.exp(whole.mask_log_probabilities[query, order]))
            np.testing.assert_allclose(names.clip_scores[query], np.exp(whole.clip_log_probabilities[query, order]))


def test_of_many_equal_words_the_first_are_candidates() -> None:
    masks, classifier = random_masks(0)
    order = np.random.default_rng(0).integers(0, 3, 400)
    words = EmbeddedVocabulary(classifier.words.mask_text[order], classifier.words.clip_text[order])
    weights, void = np.full(400, 0.7, np.float32), -masks.mask.sum(axis=0)
    many = Classifier(make_facts(), void, words, np.arange(400), weights)
    names = name_queries(masks, many, best=200, rank_all=True)
    for row, classes in zip(names.probabilities, names.classes, strict=True):
        assert len(np.unique(row[:-1])) < 20, "the words are told apart: the test tests nothing"
        assert classes.tolist() == np.argsort(-row[:-1], kind="stable")[:200].tolist()


@pytest.mark.parametrize("variant", ["label", "caption"])
def test_blocks_agree_with_the_whole(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    masks, classifier = random_masks(3, queries=11)
    if variant == "caption":
        masks = MaskEmbeddings(masks.mask, masks.clip, np.random.default_rng(4).standard_normal((11, 2), np.float32))
        classifier = dataclasses.replace(classifier, facts=make_facts(variant), no_object_embedding=None)
    whole = name_queries(masks, classifier, unknown=0.4)
    monkeypatch.setattr(classification, "BLOCK_BYTES", 4 * 9 * 2)  # two masks at a time
    blocks = name_queries(masks, classifier, unknown=0.4)
    np.testing.assert_allclose(blocks.probabilities, whole.probabilities, atol=1e-6)
    assert np.array_equal(blocks.classes, whole.classes)
    np.testing.assert_allclose(blocks.mask_scores, whole.mask_scores, atol=1e-6)


def test_memory_beside_the_probabilities_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 masks and 20,000 words: one array of all pairs (16 MB) is the result, and there is no second one."""
    rng = np.random.default_rng(0)
    queries, count = 200, 20_000
    masks = MaskEmbeddings(
        rng.standard_normal((queries, 5), np.float32), rng.standard_normal((queries, 8), np.float32), None
    )
    words = EmbeddedVocabulary(*(normalise(rng.standard_normal((count, c), np.float32)) for c in (5, 8)))
    monkeypatch.setattr(classification, "BLOCK_BYTES", 1 << 20)
    no_object, weights = np.eye(5, dtype=np.float32)[-1], np.full(count, 0.7, np.float32)
    classifier = Classifier(make_facts(), no_object, words, np.arange(count), weights)
    tracemalloc.start()
    names = name_queries(masks, classifier, unknown=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < names.probabilities.nbytes + 10 * classification.BLOCK_BYTES


def test_equal_scores_keep_the_order_of_the_words(segmenter: Segmenter, colours: np.ndarray) -> None:
    """Forty words that the text encoder cannot tell apart: the first is the label and the first candidate."""
    words = Vocabulary.from_lists([f"thing{i}" for i in range(40)])
    for segment in segmenter.segment(colours, words).segments:
        assert [c.class_index for c in segment.candidates] == [0, 1, 2, 3, 4]
        assert segment.label == "thing0"


@pytest.mark.parametrize(("explain", "count"), [(0, 0), (1, 1), (3, 3), (100, 6)])
def test_number_of_names(segmenter: Segmenter, colours: np.ndarray, explain: int, count: int) -> None:
    result = segmenter.segment(colours, WORDS, SegmentOptions(explain=explain))
    assert {len(s.candidates) for s in result.segments} == {count}


def test_dict_has_candidates_when_asked(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = segmenter.segment(colours, WORDS)
    assert all("candidates" not in s for s in result.to_dict()["segments"])
    data = json.loads(json.dumps(result.to_dict(explain=True)))
    first = data["segments"][0]["candidates"][0]
    assert first.keys() == {"label", "class_index", "score", "mask_score", "clip_score"}
    assert first["score"] == pytest.approx(result.segments[0].score, abs=1e-6)


# ---- unknown ---------------------------------------------------------------------------------------------------------


def test_unknown_is_what_does_not_reach_the_probability(segmenter: Segmenter, colours: np.ndarray) -> None:
    masks = segmenter.find_masks(colours)
    named = segmenter.name_masks(masks, WORDS)
    limit = sorted(s.score for s in named.segments)[2]
    result = segmenter.name_masks(masks, WORDS, SegmentOptions(unknown=limit))
    assert np.array_equal(result.segment_map, named.segment_map)
    for before, after in zip(named.segments, result.segments, strict=True):
        assert after.unknown == (before.score < limit)
        assert after.label == ("unknown" if after.unknown else before.label)
        assert after.score == before.score
        assert after.candidates == before.candidates
    assert [s.unknown for s in result.segments].count(True) == 2
    assert result.vocabulary.names == (*named.vocabulary.names, "unknown")
    assert all(result.vocabulary[s.class_index].name == s.label for s in result.segments)


def test_unknown_has_the_probability_of_the_best_word() -> None:
    best_words = set()
    for seed in range(20):
        masks, classifier = random_masks(seed)
        whole = classify(masks, classifier).probabilities
        found = name_queries(masks, classifier, unknown=0.9).probabilities
        best = whole[:, :-1].max(axis=1, keepdims=True)
        named = best >= 0.9
        best_words |= set(whole[~named[:, 0], :-1].argmax(axis=1).tolist())
        words_and_unknown = np.concatenate([np.where(named, whole[:, :-1], 0), np.where(named, 0, best)], axis=1)
        assert np.array_equal(found, np.concatenate([words_and_unknown, whole[:, -1:]], axis=1))
    assert best_words == set(range(6)), "of every class"


def test_zero_names_all_and_one_names_none(segmenter: Segmenter, colours: np.ndarray) -> None:
    assert not any(s.unknown for s in segmenter.segment(colours, WORDS, SegmentOptions(unknown=0)).segments)
    result = segmenter.segment(colours, WORDS, SegmentOptions(unknown=1, outputs=("semantic", "instance")))
    assert all(s.unknown and s.isthing for s in result.segments)
    assert result.semantic_map is not None
    assert set(np.unique(result.semantic_map)) == {6}
    assert result.instances
    assert {i.label for i in result.instances} == {"unknown"}
    assert len({i.area for i in result.instances}) > 1


def test_unknown_regions_stay_apart(segmenter: Segmenter, colours: np.ndarray) -> None:
    """All four areas are nearest to the same stuff word: named they are one region, unknown they are four."""
    masks = segmenter.find_masks(colours)
    named = segmenter.name_masks(masks, "stuff: sky")
    assert [s.label for s in named.segments] == ["sky"]
    assert named.segments[0].score == max(c.score for c in named.segments[0].candidates)
    unknown = segmenter.name_masks(masks, "stuff: sky", SegmentOptions(unknown=1.0))
    assert len(unknown.segments) == 4
    assert sum(s.area for s in unknown.segments) == named.segments[0].area
    assert len(set(segment_colours(unknown))) == 4
    assert all(red == green == blue for red, green, blue in segment_colours(unknown))


def test_thresholds_move_without_the_network(
    segmenter: Segmenter, colours: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = segmenter.find_masks(colours)
    segmenter.prepare(WORDS)
    kept = [a.copy() for a in (masks.mask_logits, masks.embeddings.mask, masks.embeddings.clip)]
    monkeypatch.setattr(segmenter._stages, "use", lambda name: pytest.fail(f"{name} was run"))
    counts = []
    for limit in np.linspace(0, 1, 11):
        options = SegmentOptions(unknown=float(limit), overlap_threshold=0.5, outputs=("semantic", "instance"))
        counts.append(sum(s.unknown for s in segmenter.name_masks(masks, WORDS, options).segments))
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[-1]
    for before, after in zip(kept, (masks.mask_logits, masks.embeddings.mask, masks.embeddings.clip), strict=True):
        assert np.array_equal(before, after)


def test_unknown_in_the_formats_of_others(segmenter: Segmenter, colours: np.ndarray) -> None:
    result = segmenter.segment(colours, WORDS, SegmentOptions(unknown=1.0))
    coco = result.to_coco_panoptic()
    assert [c["name"] for c in coco["categories"]][-1] == "unknown"
    assert {s["category_id"] for s in coco["annotation"]["segments_info"]} == {7}
    assert {s["isthing"] for s in coco["annotation"]["segments_info"]} == {1}
    assert {s["label"] for s in result.to_huggingface()} == {"unknown"}
    assert all(s["unknown"] for s in result.to_dict()["segments"])
    legend = np.asarray(result.overlay(colours))
    assert legend.shape[1] > 640


@pytest.mark.parametrize("words", ["cat; unknown", "Unknown , mystery; cat"])
def test_class_of_that_name_goes_without_the_option_alone(
    segmenter: Segmenter, colours: np.ndarray, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter.segment(colours, words)
    segmenter.segment(colours, "mystery, unknown", SegmentOptions(unknown=0.5))
    monkeypatch.setattr(segmenter, "find_masks", lambda *_: pytest.fail("the network was run"))
    with pytest.raises(VocabularyError, match="give the class another name"):
        segmenter.segment(colours, words, SegmentOptions(unknown=0.5))
    with pytest.raises(VocabularyError, match="give the class another name"):
        Job(Vocabulary.parse(words), SegmentOptions(unknown=0.5), ("json",), Path())


def test_ids_of_a_data_set_are_kept() -> None:
    coco = Vocabulary.builtin("coco").with_unknown
    assert category_ids(coco)[:-1] == category_ids(Vocabulary.builtin("coco"))
    assert category_ids(coco)[-1] == 201
    assert category_ids(Vocabulary.parse("cat; dog").with_unknown) == (1, 2, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1.5},
        {"unknown": float("nan")},
        {"unknown": "0.5"},
        {"explain": -1},
        {"explain": 101},
        {"explain": True},
    ],
)
def test_values_outside_their_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(OptionsError, match=next(iter(change))):
        SegmentOptions(**change)  # type: ignore[arg-type]


def test_command_line(
    label_bundle: Path, tmp_path: Path, colours: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(colours).save(tmp_path / "a.png")
    command = ["segment", str(tmp_path / "a.png"), "--bundle", str(label_bundle), "--threads", "1", "-q"]
    command += ["--vocab", WORDS, "--out", str(tmp_path / "o"), "--format", "json,coco"]
    assert cli.main([*command, "--explain", "--unknown", "1"]) == 0
    printed = capsys.readouterr().out
    assert "unknown" in printed
    assert "CLIP" in printed
    data = json.loads((tmp_path / "o/a.json").read_text())
    assert {len(s["candidates"]) for s in data["segments"]} == {5}
    assert {s["label"] for s in data["segments"]} == {"unknown"}
    assert data["facts"]["options"]["unknown"] == 1.0
    categories = json.loads((tmp_path / "o/panoptic.json").read_text())["categories"]
    assert categories[-1]["name"] == "unknown"


def test_a_result_without_candidates_still_serialises(segmenter: Segmenter, colours: np.ndarray) -> None:
    result: PanopticResult = segmenter.segment(colours, "red", SegmentOptions(explain=0))
    assert all(s["candidates"] == [] for s in result.to_dict(explain=True)["segments"])


def test_instances_of_one_mask_share_its_best_names(
    segmenter: Segmenter, colours: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be as many instances as masks times words, each with up to a hundred names."""
    made: list[int] = []
    candidates = segmenter_module._candidates

    def counted(names: classification.MaskNames, query: int, words: Vocabulary) -> tuple[Candidate, ...]:
        made.append(query)
        return candidates(names, query, words)

    monkeypatch.setattr(segmenter_module, "_candidates", counted)
    result = segmenter.segment(colours, WORDS, SegmentOptions(explain=3, outputs=("instance",)))
    queries = set(made)
    assert result.instances
    assert len(result.instances) > 2 * len(queries), "nothing was shared: the test tested nothing"
    assert max(map(made.count, queries)) <= 2, "once for its segment, once for its instances"
    assert {len({name.class_index for name in i.candidates}) for i in result.instances} == {3}, "of no object, too"
