"""The five graphs as data."""

from __future__ import annotations

import json

import numpy as np
import pytest

from odise_rt.errors import BackendError, BundleError
from odise_rt.specs import IMAGE_STAGES, STAGES, ModelFacts, StageSpec, TensorSpec, stage_specs
from tests.odise_rt.fake_bundle import make_facts


def test_there_are_five_stages_in_running_order() -> None:
    assert tuple(stage_specs(make_facts())) == STAGES
    assert (*IMAGE_STAGES, "clip_text") == STAGES


def test_bundles_of_this_schema_version_have_these_graphs() -> None:
    """The contract with every bundle there is; whatever changes here needs another schema version."""
    sizes = {"queries": 9, "pyramid_channels": 10, "classification_dim": 11, "clip_embed_dim": 12, "context_length": 13}
    facts = make_facts("caption", **sizes, null_text_length=14, null_text_dim=15)
    pyramid = {"s2": 4, "s3": 8, "s4": 16, "s5": 32}
    windows = {"windows": ("N", 3, "s", "s")}
    constants = {"noise": (1, 4, 8, 8), "null_text_embedding": (1, 14, 15)}
    graphs = {
        "clip_image": (windows, {"image_embedding": ("N", 12)}),
        "unet_tap": (
            windows | {"image_embedding": ("N", 12)} | constants,
            {name: ("N", 10, f"s/{stride}", f"s/{stride}") for name, stride in pyramid.items()},
        ),
        "mask_decoder": (
            {name: (1, 10, f"H/{stride}", f"W/{stride}") for name, stride in pyramid.items()},
            {"mask_logits": (1, 9, "H/4", "W/4"), "mask_embedding": (1, 9, 11), "object_logits": (1, 9, 2)},
        ),
        "clip_mask": (
            {"image": (1, 3, "h", "w"), "mask_logits": (1, "Q", "mh", "mw")},
            {"mask_clip_embedding": (1, "Q", 12)},
        ),
        "clip_text": ({"tokens": ("L", 13)}, {"text_embedding": ("L", 12), "mask_text_embedding": ("L", 11)}),
    }
    specs = stage_specs(facts)
    found = {s.name: tuple({t.name: t.shape for t in side} for side in (s.inputs, s.outputs)) for s in specs.values()}
    assert found == graphs
    types = {t.name: t.dtype for s in specs.values() for t in (*s.inputs, *s.outputs)}
    assert {name for name, dtype in types.items() if dtype != "float32"} == {"tokens"}
    assert types["tokens"] == "int64"


def test_only_the_caption_variant_has_object_logits() -> None:
    for variant, expected in (("label", False), ("caption", True)):
        outputs = {t.name for t in stage_specs(make_facts(variant))["mask_decoder"].outputs}
        assert ("object_logits" in outputs) is expected


def test_facts_and_specs_survive_json() -> None:
    facts = make_facts("caption")
    data = json.loads(json.dumps(facts.to_dict()))
    assert data == facts.to_dict()
    assert ModelFacts.from_dict(data) == facts
    for name, spec in stage_specs(facts).items():
        data = json.loads(json.dumps(spec.to_dict()))
        assert data == spec.to_dict()
        assert StageSpec.from_dict(name, data) == spec


def test_shapes_follow_the_symbols() -> None:
    specs = stage_specs(make_facts())
    assert specs["unet_tap"].symbols == ("N", "s")
    assert specs["unet_tap"].input_shapes(N=6, s=64)["windows"] == (6, 3, 64, 64)
    shapes = specs["mask_decoder"].input_shapes(H=128, W=192)
    assert shapes == {"s2": (1, 4, 32, 48), "s3": (1, 4, 16, 24), "s4": (1, 4, 8, 12), "s5": (1, 4, 4, 6)}
    with pytest.raises(ValueError, match="H=100 is not a multiple"):
        specs["mask_decoder"].input_shapes(H=100, W=192)


def test_arrays_are_checked_against_the_spec() -> None:
    spec = stage_specs(make_facts())["clip_mask"]
    good = {"image": np.zeros((1, 3, 5, 7), np.float32), "mask_logits": np.zeros((1, 6, 2, 3), np.float32)}
    assert spec.check(good) == {"h": 5, "w": 7, "Q": 6, "mh": 2, "mw": 3}
    assert spec.check(good | {"image": np.zeros((1, 3, 1, 1), np.float32)})["h"] == 1
    bad = [
        {"image": good["image"]},
        good | {"mask_logits": good["mask_logits"].astype(np.float64)},
        good | {"mask_logits": good["mask_logits"][0]},
        good | {"image": np.zeros((1, 4, 5, 7), np.float32)},
        good | {"image": np.zeros((2, 3, 5, 7), np.float32)},
        good | {"image": np.zeros((1, 3, 0, 7), np.float32)},
    ]
    for arrays in bad:
        with pytest.raises(BackendError, match="clip_mask"):
            spec.check(arrays)


def test_one_symbol_has_one_value() -> None:
    spec = stage_specs(make_facts())["mask_decoder"]
    levels = {n: np.zeros(s, np.float32) for n, s in spec.input_shapes(H=64, W=64).items()}
    levels["s5"] = np.zeros((1, 4, 3, 2), np.float32)
    with pytest.raises(BackendError, match="s5"):
        spec.check(levels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "both"}, "variant"),
        ({"window": 50}, "multiple of size_divisor"),
        ({"size_divisor": 20}, "size_divisor"),
        ({"test_short_edge": 900}, "above test_long_edge"),
        ({"mask_prompt": "a photo"}, "one '{}'"),
        ({"clip_prompt": "a photo of {x"}, "one '{}'"),
        ({"clip_prompt": "a photo of {} and {}"}, "one '{}'"),
        ({"context_length": 2}, "no room"),
        ({"level_strides": (2, 4, 8, 16)}, "level_strides"),
        ({"clip_visible_threshold": 0.99}, "clip_visible_threshold is 0.99, this version knows 0.5"),
    ],
)
def test_facts_that_contradict_themselves_are_refused(change: dict[str, object], message: str) -> None:
    assert make_facts(test_short_edge=160, test_long_edge=160, context_length=3)
    with pytest.raises(BundleError, match=message):
        make_facts(**change)


@pytest.mark.parametrize("name", [n for n, v in make_facts().to_dict().items() if isinstance(v, int | float)])
def test_numbers_outside_their_range_are_named(name: str) -> None:
    for value in (-1, -0.5, 10**12, 10**400, float("nan"), float("inf"), "0.5", None, True):
        with pytest.raises(BundleError, match=f"facts.*: {name} is") as caught:
            ModelFacts.from_dict(make_facts().to_dict() | {name: value})
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "change",
    [
        {"queries": 0},
        {"clip_logit_scale": 100.1},
        {"instances_per_image": 0},
        {"overlap_threshold": 1.1},
        {"clip_weight_seen": float("nan")},
    ],
)
def test_facts_made_here_are_in_their_range_as_well(change: dict[str, object]) -> None:
    with pytest.raises(BundleError, match=f"facts.*: {next(iter(change))} is"):
        make_facts(**change)


@pytest.mark.parametrize(
    "change", [{"window": "64"}, {"window": True}, {"clip_weight_seen": float("nan")}, {"extra": 1}, {"variant": 3}]
)
def test_facts_of_wrong_type_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(BundleError, match="export the bundle again"):
        ModelFacts.from_dict(make_facts().to_dict() | change)


def test_missing_fact_is_named() -> None:
    data = make_facts().to_dict()
    del data["queries"]
    with pytest.raises(BundleError, match="queries"):
        ModelFacts.from_dict(data)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"name": "x", "dtype": "float64", "shape": [1]},
        {"name": "x", "dtype": "float32", "shape": [1.5, "N"]},
        {"name": "x", "dtype": "float32", "shape": [True, 1]},
        {"name": 1, "dtype": "float32", "shape": []},
        {"name": "x", "dtype": "float32", "shape": "N"},
    ],
)
def test_malformed_tensor_specs_are_refused(data: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        TensorSpec.from_dict(data)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("tensors", [None, 3, "tokens", [], {}])
def test_stages_without_a_list_of_tensors_are_refused(side: str, tensors: object) -> None:
    data = stage_specs(make_facts())["clip_text"].to_dict() | {side: tensors}
    with pytest.raises(BundleError, match=f"'clip_text' has no list of {side}"):
        StageSpec.from_dict("clip_text", data)
