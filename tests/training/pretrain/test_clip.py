"""The contrastive training: our forward passes against open_clip, region tokens, mosaics, the loss, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F

from odise_rt.errors import CheckpointError
from training.config import ClipConfig, preset
from training.data.sticker_world.nouns import all_nouns
from training.models.frozen import build_clip
from training.pretrain.clip import ClipTrainer, contrast, main, start_from
from training.pretrain.clip_forward import encode_images, encode_tokens, normalise
from training.pretrain.closeups import CloseUpSampler, caption
from training.pretrain.regions import draw_collages, draw_mosaics
from training.pretrain.scene_bank import SceneBank
from training.pretrain.tokenizer import encode_texts


@pytest.fixture(scope="module")
def model(clip_config: ClipConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_clip(clip_config).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_images_are_encoded_as_open_clip_does(model: torch.nn.Module, images: torch.Tensor) -> None:
    expected = model.encode_image(normalise(images))
    torch.testing.assert_close(encode_images(model, images)[:, 0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_texts_are_encoded_as_open_clip_does(model: torch.nn.Module, tokenizer: Tokenizer) -> None:
    tokens = encode_texts(tokenizer, ["a dog", "a photo of a big red fire engine.", ""], 32)
    torch.testing.assert_close(encode_tokens(model, tokens), model.encode_text(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_region_tokens_see_only_their_patches_and_change_nothing_else(
    model: torch.nn.Module, images: torch.Tensor
) -> None:
    visible = torch.zeros(2, 3, 256, dtype=torch.bool)
    visible[:, 0, :40] = True
    visible[:, 1] = True
    both = encode_images(model, images, visible)
    torch.testing.assert_close(both[:, 0], encode_images(model, images)[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[:, 2], both[:, 0], rtol=1e-4, atol=1e-5)  # all patches: the class token's view
    assert (both[:, 1] - both[:, 2]).abs().max() > 1e-3
    alone = encode_images(model, images, visible[:, :1])
    torch.testing.assert_close(alone[:, 1], both[:, 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_patch_dropout_keeps_positions(model: torch.nn.Module, images: torch.Tensor) -> None:
    everything = torch.arange(255, -1, -1).expand(2, -1)
    torch.testing.assert_close(
        encode_images(model, images, kept=everything), encode_images(model, images), rtol=1e-4, atol=1e-5
    )
    half = encode_images(model, images, kept=everything[:, ::2])
    assert (half - encode_images(model, images)).abs().max() > 1e-3


def test_the_loss_counts_every_pair_of_the_same_noun_as_a_match() -> None:
    embeddings = torch.eye(4)[[0, 0, 1, 2]]
    scale = torch.tensor(math.log(100.0))
    same = torch.tensor([0, 0, 1, 2])[:, None] == torch.tensor([0, 0, 1, 2])[None]
    assert contrast(embeddings, embeddings, same, scale).item() == pytest.approx(0.5 * math.log(2), abs=1e-4)
    assert contrast(embeddings, embeddings, torch.eye(4, dtype=torch.bool), scale) >= 0.5 * math.log(2) - 1e-4
    assert contrast(embeddings, -embeddings, same, scale) > 50


def test_the_scale_is_capped_at_a_hundred() -> None:
    embeddings = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(3)), dim=-1)
    same = torch.eye(5, dtype=torch.bool)
    capped, huge = (contrast(embeddings, embeddings, same, torch.tensor(math.log(s))) for s in (100.0, 5000.0))
    assert capped.item() == pytest.approx(huge.item())


@pytest.mark.font
def test_mosaics_cover_the_picture_once_and_regions_stay_in_their_tiles(
    sampler: CloseUpSampler, clip_config: ClipConfig
) -> None:
    rng = np.random.default_rng(0)
    mosaic = draw_mosaics(sampler, np.arange(30).reshape(3, 10), clip_config, rng)
    assert mosaic.images.shape == (3, 3, 128, 128)
    assert mosaic.visible.shape == (3, 12, 256)
    assert (mosaic.visible.sum(2) >= 1).all(), "every region sees something"
    assert mosaic.nouns[:, :10].tolist() == np.arange(30).reshape(3, 10).tolist()
    neat = draw_mosaics(sampler, np.arange(30).reshape(3, 10), clip_config, rng, scatter=False).visible
    assert (neat[:, :10].sum(1) <= 1).all(), "without scatter, the regions of things do not overlap"
    assert (neat[:, :2].sum(2) <= 64).all()
    assert (neat[:, 2:10].sum(2) <= 16).all()


@pytest.mark.font
def test_the_ground_of_a_large_tile_is_what_the_thing_leaves(sampler: CloseUpSampler, clip_config: ClipConfig) -> None:
    nouns = np.arange(100).reshape(10, 10)
    mosaic = draw_mosaics(sampler, nouns, clip_config, np.random.default_rng(5), scatter=False)
    grounds = 0
    for row in range(10):
        for tile in range(2):
            thing, ground = (mosaic.visible[row, index].view(16, 16) for index in (tile, 10 + tile))
            if mosaic.nouns[row, 10 + tile] != mosaic.ground[row, tile]:
                assert mosaic.nouns[row, 10 + tile] == mosaic.nouns[row, tile], "a thing that fills its tile"
                continue
            grounds += 1
            inner = -F.max_pool2d(-thing[None].float(), 3, 1, 1)[0] > 0
            assert not (inner & ground).any(), "the ground reaches only the rim of the thing"
            assert (thing & ground).any(), "but it does reach the rim, as real masks do"
    assert grounds > 5


@pytest.mark.font
def test_collages_know_where_their_things_and_grounds_are(sampler: CloseUpSampler, clip_config: ClipConfig) -> None:
    collage = draw_collages(sampler, 6, clip_config, np.random.default_rng(6), scatter=False)
    assert collage.images.shape == (6, 3, 128, 128)
    assert collage.visible.shape == (6, 9, 256)
    assert collage.visible.any(-1).all()
    things, grounds = collage.nouns[:, :6], collage.nouns[:, 6:]
    assert (grounds >= 258).all()
    assert (things < 258).float().mean() > 0.7, "few things are hidden by others"
    hidden = things >= 258
    floor = grounds[:, :1].expand(-1, 6)
    assert torch.equal(things[hidden], floor[hidden]), "a hidden thing's region shows the floor instead"
    assert torch.equal(collage.visible[:, :6][hidden], collage.visible[:, 6:7].expand(-1, 6, -1)[hidden])
    assert (collage.visible[:, :6][~hidden].sum(-1) < 150).all()
    overlap = collage.visible[:, :6] & collage.visible[:, 6:].any(1, keepdim=True)
    assert overlap[~hidden].any(-1).all(), "grounds hold the rims of things"
    holed = draw_collages(sampler, 6, clip_config, np.random.default_rng(6)).visible
    assert holed.sum() < collage.visible.sum()
    assert holed.any(-1).all()


@pytest.mark.font
def test_collages_lay_their_grounds_below_things(sampler: CloseUpSampler, clip_config: ClipConfig) -> None:
    things = np.arange(12).reshape(4, 3)
    grounds = np.array(sampler.stuff[:12]).reshape(4, 3)
    images, boxes, layers = sampler.collage(things, grounds, 128, np.random.default_rng(8))
    bare = sampler.collage(things[:, :0], grounds, 128, np.random.default_rng(8))[2]
    hidden = layers < 0
    assert 0.02 < hidden.float().mean() < 0.8
    assert torch.equal(layers[~hidden], bare[~hidden]), "things hide the grounds and do not move them"
    assert images.shape == (4, 3, 128, 128)
    assert boxes.shape == (4, 3, 4)
    assert (boxes[..., 2:] > boxes[..., :2]).all()
    assert set(bare.unique().tolist()) <= {0, 1, 2}
    for layer in bare:
        rows = torch.arange(128)[:, None].expand_as(layer).float()
        if (layer == 1).any():
            assert rows[layer == 1].mean() < rows[layer == 0].mean(), "the background lies behind the floor"


@pytest.mark.font
def test_close_ups_show_the_noun_inside_its_box(sampler: CloseUpSampler) -> None:
    nouns = np.arange(0, 258, 8)
    rng = np.random.default_rng(1)
    close = sampler.sample(nouns, 64, rng, (0.4, 0.6), distractor_share=0.0)
    assert close.images.shape == (33, 3, 64, 64)
    assert close.images.min() >= 0
    assert close.images.max() <= 1
    size = (close.boxes[:, 2:] - close.boxes[:, :2]).amax(1)
    assert (size > 0.25).all()
    assert (size < 0.9).all()
    again = sampler.sample(nouns, 64, np.random.default_rng(1), (0.4, 0.6), distractor_share=0.0)
    torch.testing.assert_close(again.images, close.images, rtol=0, atol=0)


def test_captions_of_close_ups_name_the_noun() -> None:
    rng = np.random.default_rng(2)
    nouns = all_nouns()
    car = next(noun for noun in nouns if noun.name == "automobile")
    texts = [caption(car, nouns[-1], rng) for _ in range(200)]
    assert all("automobile" in text or "car" in text for text in texts)
    assert {"a photo of a automobile.", "a photo of a car."} <= set(texts)


@pytest.mark.font
def test_text_warm_up_and_image_steps_lower_their_losses(
    sampler: CloseUpSampler, clip_config: ClipConfig, tokenizer: Tokenizer, scenes_root: Path
) -> None:
    trainer = ClipTrainer(clip_config, tokenizer, SceneBank(scenes_root), sampler, seed=0)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), 1e-3)
    before = trainer.text_loss(0, 24).item()
    for _ in range(12):
        optimizer.zero_grad()
        loss = trainer.text_loss(0, 24)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * before
    first = trainer.loss(0, 1, 1, 2, 2)[0].item()
    for _ in range(12):
        optimizer.zero_grad()
        loss, logged = trainer.loss(0, 1, 1, 2, 2)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first
    assert set(logged) == {"region_loss", "scene_loss", "scale"}


@pytest.mark.slow
@pytest.mark.font
def test_the_command_trains_evaluates_and_saves(
    sampler: CloseUpSampler, tokenizer: Tokenizer, scenes_root: Path, tmp_path: Path
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "clip"
    arguments = ["--scenes", str(scenes_root), "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(out)]
    sizes = [
        "--mosaics",
        "1",
        "--collages",
        "1",
        "--close-ups",
        "1",
        "--scene-batch",
        "2",
        "--evaluate-rounds",
        "1",
        "--text-steps",
        "1",
    ]
    assert main([*arguments, *sizes, "--steps", "3"]) == 0
    weights = load_file(out / "model.safetensors")
    assert weights["visual.conv1.weight"].shape == (128, 3, 8, 8)
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"close_up_seen", "close_up_unseen", "big_tile_seen", "small_tile_unseen"} <= set(metrics)
    assert all(0 <= value <= 1 for value in metrics.values())


def test_the_command_reports_missing_scenes(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = ["--scenes", str(tmp_path / "none"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--steps", "1"]) == 1
    assert "captions_train.json" in capsys.readouterr().err


def test_training_goes_on_from_the_clip_of_a_checkpoint_with_the_same_tokenizer(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = build_clip(preset("odise-tiny").clip)
    shipped = Path(__file__).parents[3] / "training/pretrained/odise-tiny"
    start_from(shipped, model, shipped / "tokenizer.json")
    stored = load_file(shipped / "model.safetensors")
    torch.testing.assert_close(model.visual.conv1.weight, stored["clip.visual.conv1.weight"].float(), rtol=0, atol=0)
    tokenizer.save(str(tmp_path / "other.json"))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        start_from(shipped, model, tmp_path / "other.json")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizers file"):
        start_from(shipped, model, tmp_path / "absent.json")
    small = build_clip(preset("odise-reference").clip)
    with pytest.raises(CheckpointError, match="does not fit --config"):
        start_from(shipped, small, shipped / "tokenizer.json")
