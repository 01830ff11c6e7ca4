"""Options are checked where they are given, and completed from the model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from odise_rt import OptionsError, SegmentOptions
from odise_rt.specs import MAX_EDGE
from tests.odise_rt.fake_bundle import make_facts


def test_defaults_are_the_models() -> None:
    facts = make_facts(overlap_threshold=0.6, clip_weight_seen=0.2)
    resolved = SegmentOptions().resolve(facts)
    assert resolved.outputs == ("panoptic",)
    assert resolved.object_mask_threshold == 0.0
    assert resolved.overlap_threshold == 0.6
    assert (resolved.clip_weight_seen, resolved.clip_weight_unseen) == (0.2, 0.7)
    assert (resolved.short_edge, resolved.long_edge) == (64, 160)
    assert resolved.instances_per_image == 100


def test_published_defaults() -> None:
    facts = make_facts()
    assert (facts.object_mask_threshold, facts.overlap_threshold, facts.clip_visible_threshold) == (0.0, 0.8, 0.5)


def test_given_values_win_even_when_zero() -> None:
    options = SegmentOptions(overlap_threshold=0, clip_weight_seen=0.0, clip_weight_unseen=1, short_edge=32)
    resolved = options.resolve(make_facts())
    assert (resolved.overlap_threshold, resolved.clip_weight_seen, resolved.clip_weight_unseen) == (0, 0, 1)
    assert resolved.short_edge == 32


def test_one_given_edge_moves_the_other() -> None:
    assert SegmentOptions(short_edge=500).resolve(make_facts()).long_edge == 500
    assert SegmentOptions(long_edge=40).resolve(make_facts()).short_edge == 40
    square = SegmentOptions(short_edge=MAX_EDGE, long_edge=MAX_EDGE).resolve(make_facts())
    assert (square.short_edge, square.long_edge) == (MAX_EDGE, MAX_EDGE)


def test_panoptic_is_always_computed() -> None:
    assert SegmentOptions(outputs=("instance", "semantic")).outputs == ("panoptic", "semantic", "instance")
    assert SegmentOptions(outputs="semantic").outputs == ("panoptic", "semantic")  # type: ignore[arg-type]


def test_resolved_options_are_json() -> None:
    data = SegmentOptions(outputs=("instance",)).resolve(make_facts()).to_dict()
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize(
    "change",
    [
        {"overlap_threshold": 1.01},
        {"overlap_threshold": -0.1},
        {"object_mask_threshold": float("nan")},
        {"clip_weight_seen": "0.3"},
        {"clip_weight_unseen": True},
        {"short_edge": 0},
        {"short_edge": 64.0},
        {"short_edge": MAX_EDGE + 1},
        {"short_edge": 300, "long_edge": 200},
        {"max_pixels": 0},
        {"max_pixels": None},
        {"windows_per_batch": -1},
        {"windows_per_batch": True},
        {"explain": True},
        {"explain": 3.0},
        {"instances_per_image": 0},
        {"outputs": ("depth",)},
        {"outputs": None},
        {"outputs": 3},
        {"outputs": b""},
        {"unknown": 10**400},
    ],
)
def test_values_outside_their_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(OptionsError) as caught:
        SegmentOptions(**change)
    assert next(iter(change)) in str(caught.value) or "long_edge" in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    given: dict[str, Any] = {
        "short_edge": np.int64(64),
        "max_pixels": np.int32(9),
        "explain": np.int8(3),
        "overlap_threshold": np.float32(0.5),
        "unknown": np.float64(0.25),
    }
    resolved = SegmentOptions(**given).resolve(make_facts()).to_dict()
    for name, value in given.items():
        assert resolved[name] == value
        assert type(resolved[name]) in (int, float)
