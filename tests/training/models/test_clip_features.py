"""The variant on CLIP's image tokens: same stages, own checkpoint, gradients where they belong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from export.sources import from_checkpoint
from odise_rt.errors import ConfigError, ExportError
from odise_rt.windows import window_grid
from training.checkpoints.own_format import load_checkpoint, save_checkpoint
from training.config import preset
from training.frozen_features import frozen_features, pyramid_from_features
from training.initialization import tokenizer_for
from training.models.clip_features import ClipFeatureOdise, clip_depths, clip_taps
from training.models.diffusion_features import feature_taps
from training.models.feature_pyramid import FeaturePyramid
from training.models.odise import Odise
from training.models.variants import build_odise
from training.torch_stages import torch_segmenter

SIDE = 64


@pytest.fixture(scope="module")
def clip_model() -> Odise:
    tiny = preset("odise-tiny")
    head = dataclasses.replace(tiny.head, queries=5, pixel_decoder_layers=1, mask_decoder_layers=3)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = dataclasses.replace(tiny, head=head, window=SIDE, features="clip", conditioning="empty")
    return build_odise(config).eval()


def test_depths_are_spread_and_every_level_sees_the_last() -> None:
    tiny, full = preset("odise-tiny"), preset("odise-sd1")
    assert clip_depths(tiny) == (2, 3, 4, 5)
    assert clip_depths(full) == (6, 12, 18, 24)
    levels = {level: [t.module for t in clip_taps(full) if t.level == level] for level in ("s2", "s3", "s4", "s5")}
    assert levels["s2"] == ["clip.visual.6", "clip.visual.12", "clip.visual.24"]
    assert levels["s4"] == ["clip.visual.18", "clip.visual.24"]
    assert levels["s5"] == ["clip.visual.24"]


def test_live_and_cached_levels_agree_and_nothing_of_the_diffusion_model_is_read(clip_model: Odise) -> None:
    assert isinstance(clip_model, ClipFeatureOdise)
    images = torch.rand(2, 3, SIDE, 2 * SIDE)
    with torch.no_grad():
        for network in (clip_model.vae, clip_model.unet, clip_model.implicit_captioner):
            for parameter in network.parameters():
                parameter.fill_(float("nan"))
        live = clip_model.pyramid(images)
        cached = pyramid_from_features(
            clip_model, frozen_features(clip_model, images), window_grid(SIDE, 2 * SIDE, SIDE)
        )
    assert {name: tuple(level.shape[2:]) for name, level in live.items()} == {
        "s2": (16, 32),
        "s3": (8, 16),
        "s4": (4, 8),
        "s5": (2, 4),
    }
    for name, level in live.items():
        assert level.isfinite().all()
        torch.testing.assert_close(cached[name], level, atol=1e-5, rtol=1e-4)


def test_trained_parts_get_gradients_and_the_captioner_does_not(clip_model: Odise) -> None:
    prediction = clip_model.train()(torch.rand(1, 3, SIDE, SIDE), aux=True)
    loss = sum(output.mask_embedding.square().mean() for output in [prediction, *prediction.aux])
    torch.as_tensor(loss).backward()
    trained = clip_model.trained_parameters()
    assert {name.split(".")[0] for name in trained} == {"feature_pyramid", "mask_generator", "mask_classifier"}
    pyramid = [name for name in trained if name.startswith("feature_pyramid")]
    assert all(trained[name].grad is not None for name in pyramid)
    leaked = [
        n for n, p in clip_model.named_parameters() if n not in trained and (p.requires_grad or p.grad is not None)
    ]
    assert leaked == []


@pytest.mark.parametrize("name", ["odise-tiny", "odise-sd1"])
def test_size_is_comparable_to_that_of_the_diffusion_projections(name: str) -> None:
    config = preset(name)
    counts = []
    for taps in (feature_taps(config), clip_taps(config)):
        with torch.device("meta"):
            pyramid = FeaturePyramid(taps, config.head.pyramid_channels, config.head.norm_groups)
        counts.append(sum(parameter.numel() for parameter in pyramid.parameters()))
    assert 0.7 < counts[1] / counts[0] < 1.4, counts


def test_a_checkpoint_keeps_the_variant_and_export_refuses_it(tmp_path: Path) -> None:
    config = dataclasses.replace(preset("odise-tiny"), features="clip", conditioning="empty")
    torch.manual_seed(1)
    model = build_odise(config)
    path = save_checkpoint(
        tmp_path / "clip", model, tokenizer_json=tokenizer_for(config), training_vocabulary=(), include_sd_text=False
    )
    loaded = load_checkpoint(path)
    assert isinstance(loaded.model, ClipFeatureOdise)
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], p) for name, p in model.trained_parameters().items())
    with pytest.raises(ExportError, match="features 'clip'"):
        from_checkpoint(path)


def test_segmenting_with_a_model_that_needs_captions_is_refused() -> None:
    with torch.device("meta"):
        model = Odise(dataclasses.replace(preset("odise-tiny"), conditioning="caption"))
    with pytest.raises(ConfigError, match="is measured by"), torch_segmenter(model, "", ()):
        pass
