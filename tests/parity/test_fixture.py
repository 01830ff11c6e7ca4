"""The fixture itself: its size, its storage format, and that the recorded facts hang together."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from tests.parity.closed_form import read_rules
from tests.parity.quantised import decode, encode, rounded, spread, spread_keeping_signs, spread_positive
from tests.parity.recorded import CONTENT, FIXTURE, MANIFEST, VARIANTS, from_fixture

rng = np.random.default_rng(0)


def test_takes_at_most_four_megabytes() -> None:
    assert sum(path.stat().st_size for path in FIXTURE.iterdir() if path.is_file()) <= 4_000_000


@pytest.mark.parametrize("bits", [9, 16, 17, 20, 24])
def test_quantisation_errs_by_half_a_step(bits: int) -> None:
    values = rng.normal(size=(3, 5, 7)).astype(np.float32)
    steps = spread(values, bits, phase=0.3)
    back = decode(encode(values, steps), steps, values.shape)
    assert back.dtype == np.float32
    # float32 itself rounds the sum of offset and steps.
    assert np.abs(back - values.astype(np.float64)).max() <= 0.5 * steps.step + np.abs(values).max() * 2**-24
    assert np.array_equal(back, rounded(values, steps))


def test_quantisation_keeps_zeros_of_a_relu() -> None:
    values = np.maximum(rng.normal(size=1001), 0).astype(np.float32)
    steps = spread_positive(values, 16)
    back = decode(encode(values, steps), steps, values.shape)
    assert np.array_equal(back == 0, values == 0)
    assert np.abs(back - values).max() <= 0.51 * steps.step


def test_quantisation_keeps_signs() -> None:
    values = np.concatenate([rng.normal(size=1000), [1e-7, -1e-7]]).astype(np.float32)
    steps = spread_keeping_signs(values, 12)
    back = decode(encode(values, steps), steps, values.shape)
    assert np.array_equal(np.sign(back), np.sign(values))
    assert np.abs(back - values).max() <= 0.51 * steps.step


def test_stated_precision_holds_for_every_tensor() -> None:
    """Signed 16-bit steps are the coarsest: half a step of twice the largest magnitude."""
    with zipfile.ZipFile(FIXTURE / CONTENT) as archive:
        tensors = json.loads(archive.read(MANIFEST))["tensors"]
    errors = {name: entry["relative_error"] for name, entry in tensors.items() if "steps" in entry}
    assert len(errors) == 20
    assert max(errors.values()) < 1.6e-5
    assert max(errors[name] for name in errors if name.startswith("pixdec.")) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_results_hang_together(variant: str) -> None:
    recorded = from_fixture(variant)
    segments = recorded.json("segments_info_json")
    panoptic = recorded["panoptic_seg"]
    assert recorded["input.image"].shape == (3, 250, 330)
    assert panoptic.shape == recorded["sem_seg.argmax"].shape == (250, 330)
    assert set(np.unique(panoptic)) - {0} == {segment["id"] for segment in segments}
    assert len(recorded.json("labels_json")) == recorded["final.mask_cls"].shape[1] - 1 == 12
    assert recorded.expected("text_head.null_embed") is not None or variant == "caption"
    assert recorded.expected("no such tensor") is None


def test_weight_rules_cover_four_files() -> None:
    rules = read_rules()
    counts = {table: len(entries) for table, entries in rules.items()}
    assert counts == {"odise_label": 224, "odise_caption": 225, "stable_diffusion": 971, "clip": 62}
    fan = next(rule for rule in rules["clip"] if rule.name == "visual.conv1.weight")
    weight = fan.tensor("clip::")
    assert weight.shape == (128, 3, 14, 14)
    assert weight.std().item() == pytest.approx((3 * 14 * 14) ** -0.5, rel=0.02)
    assert not np.array_equal(weight, fan.tensor("odise::"))
