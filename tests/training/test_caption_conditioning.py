"""Captions reach the UNet as the diffusion model knows them, in training and in evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from odise_rt.errors import CheckpointError, DatasetError
from odise_rt.windows import window_grid
from training.caption_conditioning import CaptionContexts, CaptionedBackend
from training.checkpoints.own_format import load_checkpoint
from training.data.coco_panoptic import CocoPanoptic
from training.frozen_features import frozen_features, pyramid_from_features
from training.models.odise import Odise

SIDE = 64


@pytest.fixture(scope="module")
def parts(mini_frozen: Path) -> tuple[Odise, str]:
    torch.set_num_threads(1)
    loaded = load_checkpoint(mini_frozen)
    return loaded.model, loaded.tokenizer_json


def contexts_of(parts: tuple[Odise, str], captions: dict[int, str], remembered: int = 9) -> CaptionContexts:
    return CaptionContexts(*parts, captions, remembered)


def test_the_empty_caption_is_the_models_own(parts: tuple[Odise, str]) -> None:
    contexts = contexts_of(parts, {1: "", 2: "A Dog!"})
    torch.testing.assert_close(contexts([1]), parts[0].null_text_embedding, atol=1e-6, rtol=1e-5)
    config = parts[0].config.sd_text
    ids = contexts.tokens("A Dog!")[0].tolist()
    assert len(ids) == config.context_length
    assert ids[0] == config.start_token
    assert ids[7:] == [config.end_token] * (config.context_length - 7), "six bytes, then end tokens"
    assert contexts.tokens("long " * 50)[0, -1] == config.end_token
    assert not torch.allclose(contexts([2]), contexts([1]))


def test_contexts_are_remembered_and_bounded(parts: tuple[Odise, str]) -> None:
    contexts = contexts_of(parts, {number: f"picture {number}" for number in range(5)}, remembered=2)
    batch = contexts([0, 1, 2, 0])
    assert batch.shape[0] == 4
    assert torch.equal(batch[0], batch[3])
    assert len(contexts._known) == 2
    torch.testing.assert_close(contexts([1])[0], batch[1])
    with pytest.raises(DatasetError, match="image id 9 has no caption"):
        contexts([9])


def test_every_window_of_a_picture_gets_its_caption(parts: tuple[Odise, str]) -> None:
    model = parts[0]
    contexts = contexts_of(parts, {1: "a cat", 2: "a very red house"})([1, 2])
    images = torch.rand(2, 3, SIDE, 2 * SIDE)
    grid = window_grid(SIDE, 2 * SIDE, SIDE)
    with torch.no_grad():
        both = pyramid_from_features(model, frozen_features(model, images), grid, contexts)
        for index in range(2):
            one = pyramid_from_features(
                model, frozen_features(model, images[index : index + 1]), grid, contexts[index : index + 1]
            )
            torch.testing.assert_close(both["s4"][index], one["s4"][0], atol=1e-4, rtol=1e-3)
        plain = pyramid_from_features(model, frozen_features(model, images), grid)
    assert not torch.allclose(plain["s4"], both["s4"], atol=1e-3)
    assert torch.equal(plain["s2"], both["s2"]), "the VAE's levels do not depend on it"


def test_evaluation_tells_the_stage_what_training_told_the_step(parts: tuple[Odise, str], mini_data: Path) -> None:
    model, tokenizer_json = parts
    data = CocoPanoptic.from_root(mini_data, "val")
    contexts = CaptionContexts(model, tokenizer_json, data.first_captions())
    backend = CaptionedBackend(model, contexts)
    backend.tell(data[0])
    windows = torch.rand(2, 3, SIDE, SIDE)
    arrays = {
        "windows": windows.numpy(),
        "image_embedding": model.clip_image(windows).detach().numpy(),
        "noise": model.noise.numpy(),
        "null_text_embedding": model.null_text_embedding.numpy(),
    }
    told = backend.load(None, "unet_tap").run(arrays)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = pyramid_from_features(
            model, frozen_features(model, windows[:1]), window_grid(SIDE, SIDE, SIDE), contexts([data[0].image_id])
        )
    np.testing.assert_allclose(told["s4"][:1], expected["s4"].numpy(), atol=1e-4)


def test_what_is_missing_is_named(parts: tuple[Odise, str], mini_data: Path, mini_frozen: Path) -> None:
    bare = load_checkpoint(mini_frozen).model
    bare.drop_sd_text()
    with pytest.raises(CheckpointError, match="without the diffusion model's text encoder"):
        CaptionContexts(bare, parts[1], {})
    with pytest.raises(DatasetError, match="without captions"):
        CocoPanoptic.from_root(mini_data, "val", with_captions=False).first_captions()
