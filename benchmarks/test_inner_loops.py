"""Micro-benchmarks of the runtime's own inner loops: everything of a segmentation that no engine runs.

    pytest benchmarks
    pytest benchmarks --run-json out/bench/kernels.json -k merge

Sizes are those of the full-size model (100 masks) and of the bundled one (30), on pictures of 256, 512 and 1024 pixels.
The inputs are made up of smooth blobs, because the merge works by regions: its time depends on what masks look like.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from odise_rt.classification import Classifier, MaskEmbeddings, classify, clip_weights
from odise_rt.postprocessing import MaskResizer, find_instances, merge_panoptic, semantic_map
from odise_rt.preprocessing import prepare
from odise_rt.specs import ModelFacts
from odise_rt.text_embeddings import EmbeddedVocabulary, normalise
from odise_rt.vocabulary import Vocabulary
from odise_rt.windows import Stitcher, cut_windows, window_grid

QUERIES, CLIP_DIM, MASK_DIM = 100, 768, 256


def _facts() -> ModelFacts:
    return ModelFacts(
        variant="label",
        window=512,
        size_divisor=64,
        clip_image_size=336,
        clip_embed_dim=CLIP_DIM,
        context_length=77,
        start_token=49406,
        end_token=49407,
        pad_token=0,
        null_text_length=77,
        null_text_dim=768,
        queries=QUERIES,
        pyramid_channels=512,
        hidden_dim=256,
        classification_dim=MASK_DIM,
        test_short_edge=1024,
        test_long_edge=2560,
        mask_logit_scale=14.3,
        clip_logit_scale=100.0,
        clip_weight_seen=0.3,
        clip_weight_unseen=0.7,
        mask_prompt="{}",
        clip_prompt="a photo of a {}.",
    )


def blob_masks(queries: int, cells: int) -> np.ndarray:
    """float32 (queries, cells, cells) logits: one soft disc a mask, of a size and place of its own."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:cells, 0:cells].astype(np.float32) / cells
    centre_y, centre_x, radius = rng.uniform(0, 1, (3, queries, 1, 1)).astype(np.float32)
    return (12 * (0.05 + 0.3 * radius - np.hypot(y - centre_y, x - centre_x)) / 0.1).astype(np.float32)


def class_probabilities(queries: int, classes: int) -> np.ndarray:
    """float32 (queries, classes + 1), peaked; rows sum to 1."""
    values = np.random.default_rng(4).gamma(0.05, size=(queries, classes + 1)).astype(np.float32) + 1e-8
    return values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_prepare(benchmark: Any, side: int) -> None:
    benchmark.extra_info.update(label=f"resize to {side} x {side}, scale and pad", size=[side, side])
    pixels = np.random.default_rng(0).integers(0, 256, (side + 100, side + 100, 3), dtype=np.uint8)
    benchmark(prepare, pixels, (side, side), 64)


@pytest.mark.parametrize("side", [1024, 2048])
def test_windows(benchmark: Any, side: int) -> None:
    benchmark.extra_info.update(label=f"cut {side} x {side} into windows of 512", size=[side, side])
    canvas = np.random.default_rng(0).random((1, 3, side, side), dtype=np.float32)
    grid = window_grid(side, side, 512)
    benchmark(cut_windows, canvas, grid)


@pytest.mark.parametrize("side", [1024, 2048])
def test_stitch(benchmark: Any, side: int) -> None:
    benchmark.extra_info.update(label=f"stitch features of {side} x {side}, 128 channels", size=[side, side])
    grid = window_grid(side, side, 512)
    strides = {"s2": 4, "s3": 8, "s4": 16, "s5": 32}
    features = {
        n: np.random.default_rng(0).random((len(grid), 128, 512 // k, 512 // k), np.float32) for n, k in strides.items()
    }

    def stitch() -> dict[str, np.ndarray]:
        stitcher = Stitcher(grid, strides)
        stitcher.add(features)
        return stitcher.finish()

    benchmark(stitch)


@pytest.mark.parametrize("words", [100, 1_000, 10_000])
def test_classify(benchmark: Any, words: int) -> None:
    benchmark.extra_info.update(label=f"classify {QUERIES} masks with {words:,} words", words=words)
    rng = np.random.default_rng(1)
    masks = MaskEmbeddings(
        rng.standard_normal((QUERIES, MASK_DIM), np.float32), rng.standard_normal((QUERIES, CLIP_DIM), np.float32), None
    )
    text = EmbeddedVocabulary(
        normalise(rng.standard_normal((words, MASK_DIM), np.float32)),
        normalise(rng.standard_normal((words, CLIP_DIM), np.float32)),
    )
    no_object = rng.standard_normal(MASK_DIM, np.float32)
    weights = clip_weights(np.arange(words) % 5 > 0, 0.3, 0.7)
    benchmark(classify, masks, Classifier(_facts(), no_object, text, np.arange(words), weights))


@pytest.mark.parametrize("words", [100, 10_000])
def test_seen(benchmark: Any, words: int) -> None:
    benchmark.extra_info.update(label=f"which of {words:,} words were seen in training", words=words)
    vocabulary = Vocabulary.from_lists([f"word {i}" for i in range(words)])
    training = frozenset(f"word {i}" for i in range(0, 1000, 3))
    vocabulary.seen(training)
    benchmark(vocabulary.seen, training)


@pytest.mark.parametrize(("queries", "side"), [(30, 256), (100, 512), (100, 1024)])
def test_merge(benchmark: Any, queries: int, side: int) -> None:
    benchmark.extra_info.update(label=f"panoptic merge of {queries} masks at {side} x {side}", size=[side, side])
    masks, probabilities = blob_masks(queries, side // 4), class_probabilities(queries, 133)
    resizer = MaskResizer((side // 4, side // 4), (side, side), (side, side))
    benchmark(merge_panoptic, masks, probabilities, np.arange(133) < 80, resizer, 0.0, 0.8)


@pytest.mark.parametrize("side", [512])
def test_semantic(benchmark: Any, side: int) -> None:
    benchmark.extra_info.update(label=f"semantic map of {QUERIES} masks at {side} x {side}", size=[side, side])
    masks, probabilities = blob_masks(QUERIES, side // 4), class_probabilities(QUERIES, 133)
    resizer = MaskResizer((side // 4, side // 4), (side, side), (side, side))
    benchmark(semantic_map, masks, probabilities, resizer)


@pytest.mark.parametrize("side", [512])
def test_instances(benchmark: Any, side: int) -> None:
    benchmark.extra_info.update(label=f"100 instances of {QUERIES} masks at {side} x {side}", size=[side, side])
    masks, probabilities = blob_masks(QUERIES, side // 4), class_probabilities(QUERIES, 133)
    resizer = MaskResizer((side // 4, side // 4), (side, side), (side, side))
    benchmark(find_instances, masks, probabilities, np.arange(133) < 80, resizer, 100)
