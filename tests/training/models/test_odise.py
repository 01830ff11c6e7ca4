from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from training.config import preset
from training.models.odise import Odise


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A smooth random picture ``(1, 3, height, width)`` in [0, 1]."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="bilinear")


@pytest.mark.parametrize("name", ["label_model", "caption_model"])
@pytest.mark.parametrize("size", [(64, 64), (100, 150)])
def test_pruned_and_official_structure_agree(name: str, size: tuple[int, int], request: pytest.FixtureRequest) -> None:
    model: Odise = request.getfixturevalue(name)
    picture = image(*size)
    pruned, pruned_clip = model.segment_features(picture)
    model.structure = "official"
    try:
        official, official_clip = model.segment_features(picture)
    finally:
        model.structure = "pruned"
    scale = official.mask_logits.abs().max()
    assert (pruned.mask_logits - official.mask_logits).abs().max() < 1e-4 * scale
    torch.testing.assert_close(pruned.mask_embedding, official.mask_embedding, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(pruned_clip, official_clip, atol=1e-5, rtol=1e-3)
    assert (pruned.object_logits is None) == (model.config.variant == "label")


def test_what_the_pruned_structure_leaves_out_is_dead(label_model: Odise) -> None:
    """Weights behind the last tap may be anything, even NaN."""
    picture = image(64, 64)
    before, _ = label_model.segment_features(picture)
    unet, decoder = label_model.unet, label_model.vae.decoder
    dead = [unet.conv_norm_out, unet.conv_out, unet.up_blocks[3].resnets[2], unet.up_blocks[3].attentions[2]]
    dead += [decoder.up_blocks[1].resnets[2], decoder.up_blocks[1].upsamplers, decoder.up_blocks[2]]
    dead += [decoder.up_blocks[3], decoder.conv_norm_out, decoder.conv_out, label_model.sd_text]
    parameters = [parameter for module in dead for parameter in module.parameters()]
    saved = [parameter.clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(float("nan"))
    try:
        after, _ = label_model.segment_features(picture)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
    assert torch.equal(before.mask_logits, after.mask_logits)


def test_batched_windows_equal_single_ones(label_model: Odise) -> None:
    windows = torch.cat([image(64, 64, seed) for seed in range(3)])
    constants = (label_model.noise, label_model.null_text_embedding)
    with torch.no_grad():
        together = label_model.unet_tap(windows, label_model.clip_image(windows), *constants)
        for index in range(3):
            one = windows[index : index + 1]
            alone = label_model.unet_tap(one, label_model.clip_image(one), *constants)
            for batched, single in zip(together, alone, strict=True):
                torch.testing.assert_close(batched[index : index + 1], single, atol=1e-4, rtol=1e-4)


def test_a_small_image_gets_smaller_levels(label_model: Odise) -> None:
    """The pyramid has the strides of the image, not of the enlarged window."""
    config = dataclasses.replace(label_model.config, window=128)
    model = Odise(config).eval()
    levels = model.pyramid(image(64, 64))
    assert {name: tuple(level.shape[2:]) for name, level in levels.items()} == {
        "s2": (16, 16),
        "s3": (8, 8),
        "s4": (4, 4),
        "s5": (2, 2),
    }


def test_auxiliary_predictions_end_in_the_final_one(label_model: Odise) -> None:
    with torch.no_grad():
        plain = label_model(image(64, 128))
        with_aux = label_model(image(64, 128), aux=True)
    assert len(with_aux.aux) == label_model.config.head.mask_decoder_layers
    torch.testing.assert_close(with_aux.mask_logits, plain.mask_logits, atol=1e-5, rtol=1e-4)
    assert plain.aux == []


@pytest.mark.parametrize("name", ["label_model", "caption_model"])
def test_every_trained_parameter_gets_a_gradient_and_no_frozen_one(name: str, request: pytest.FixtureRequest) -> None:
    model: Odise = request.getfixturevalue(name)
    model.train()
    assert not model.unet.training
    assert not model.clip.training
    prediction = model(image(64, 64), aux=True)
    counts = [2] * 3
    text = model.mask_classifier.project_text(torch.randn(6, model.config.clip.embed_dim))
    loss = torch.zeros(())
    for output in [prediction, *prediction.aux]:
        scale = model.mask_generator.mask_embedding.logit_scale
        loss = loss + model.mask_classifier(output.mask_embedding, text, counts, scale).square().mean()
        loss = loss + output.mask_logits.square().mean()
        if output.object_logits is not None:
            loss = loss + output.object_logits.square().mean()
    loss.backward()
    trained = model.trained_parameters()
    missing = [key for key, parameter in trained.items() if parameter.grad is None]
    leaked = [k for k, p in model.named_parameters() if k not in trained and p.grad is not None]
    model.zero_grad(set_to_none=True)
    model.eval()
    assert missing == []
    assert leaked == []


@pytest.mark.parametrize(("name", "count"), [("odise-sd1", 28_067_009), ("odise-sd1-caption", 28_066_755)])
def test_full_size_has_the_published_number_of_trained_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = Odise(preset(name))
    assert sum(parameter.numel() for parameter in model.trained_parameters().values()) == count


def test_closed_gates_give_the_empty_caption() -> None:
    model = Odise(dataclasses.replace(preset("odise-tiny"), name="closed")).eval()
    model.refresh_null_text_embedding()
    context, increment = model.implicit_captioner(torch.randn(2, 128), model.null_text_embedding)
    torch.testing.assert_close(context, model.null_text_embedding.expand(2, -1, -1))
    assert increment.abs().max() == 0
