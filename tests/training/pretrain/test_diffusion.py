"""Autoencoder and latent diffusion model: normalised latents, cached captions, sampling, the two commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer
from transformers import CLIPTextModel

from odise_rt.errors import CheckpointError, DatasetError
from training.config import OdiseConfig
from training.models.frozen import build_vae
from training.pretrain import diffusion, vae
from training.pretrain.__main__ import plan
from training.pretrain.closeups import CloseUpSampler
from training.pretrain.scene_bank import SceneBank


@pytest.fixture(scope="module")
def autoencoder(tiny: OdiseConfig) -> AutoencoderKL:
    torch.manual_seed(0)
    return build_vae(tiny.vae).eval().requires_grad_(False)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@torch.no_grad()
def test_latents_become_standard_and_reconstructions_stay(tiny: OdiseConfig) -> None:
    torch.manual_seed(1)
    model = build_vae(tiny.vae).eval().requires_grad_(False)
    images = torch.rand(6, 3, 64, 64)
    before = model.encode(images * 2 - 1).latent_dist
    expected = model.decode(before.mean).sample
    vae.normalise_latents(model, images)
    after = model.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(model.decode(after.mean).sample, expected, rtol=1e-3, atol=1e-4)
    scaled = after.mean * model.config.scaling_factor
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=1e-3)
    # A sample's spread shrinks or grows with the mean's.
    scale = after.mean.std((0, 2, 3)) / before.mean.std((0, 2, 3))
    torch.testing.assert_close(after.std.mean((0, 2, 3)), before.std.mean((0, 2, 3)) * scale, rtol=1e-3, atol=1e-4)


def test_the_reconstruction_loss_punishes_blur_more_than_its_pixels() -> None:
    target = torch.zeros(1, 3, 8, 8)
    target[..., ::2] = 1.0
    flat = torch.full_like(target, 0.5)
    assert vae.reconstruction_loss(target, target) == 0
    assert vae.reconstruction_loss(flat, target) == pytest.approx(0.5 + 0.5 * 1.0)


def test_scene_bank_reads_pictures_and_captions(scenes_root: Path) -> None:
    bank = SceneBank(scenes_root)
    assert bank.images.shape == (4, 128, 128, 3)
    assert [len(captions) for captions in bank.captions] == [5] * 4
    assert len(SceneBank(scenes_root, limit=2)) == 2


def test_scene_bank_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"captions_train\.json"):
        SceneBank(tmp_path)
    (tmp_path / "annotations").mkdir()
    content = {"images": [{"id": 7, "file_name": "x.jpg"}], "annotations": [{"image_id": 7, "caption": "a dog"}]}
    (tmp_path / "annotations/captions_train.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"x\.jpg \(image id 7\)"):
        SceneBank(tmp_path)


@pytest.mark.font
def test_caches_hold_latents_and_padded_captions(
    autoencoder: AutoencoderKL, sampler: CloseUpSampler, tokenizer: Tokenizer, tiny: OdiseConfig, scenes_root: Path
) -> None:
    rng = np.random.default_rng(0)
    near = diffusion.cache_close_ups(autoencoder, sampler, tokenizer, tiny, 32, 1, rng)
    assert near.latents.shape == (272, 4, 4, 4)
    assert near.tokens.shape == (272, 32)
    assert (near.tokens[:, 0] == 4094).all()
    assert (near.tokens[:, -1] == 4095).all()
    far = diffusion.cache_scenes(autoencoder, SceneBank(scenes_root), tokenizer, tiny, 3, rng)
    assert far.latents.shape == (3, 4, 16, 16)


def test_the_step_is_reproducible_and_the_sampler_obeys_the_prompt(
    autoencoder: AutoencoderKL, tokenizer: Tokenizer, tiny: OdiseConfig, tmp_path: Path
) -> None:
    trainer = diffusion.DiffusionTrainer(tiny, tokenizer, "cpu", seed=0)
    tokens = diffusion.sd_tokens(tokenizer, ["a dog", "a cat"], tiny)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    cache = diffusion.CaptionedLatents(latents, tokens)
    losses = [trainer.loss(cache, 4, np.random.default_rng(9)).item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert 0.5 < losses[0] < 2.5
    assert torch.equal(cache.tokens, diffusion.sd_tokens(tokenizer, ["a dog", "a cat"], tiny)), "dropout uses a copy"
    pictures = trainer.sample(autoencoder, tokens, 2, 3.0, seed=0)
    assert pictures.shape == (2, 3, 128, 128)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    swapped = trainer.sample(autoencoder, tokens.flip(0), 2, 3.0, seed=0)
    assert not torch.equal(pictures, swapped)
    diffusion.save_grid(pictures, tmp_path / "grid.png", columns=2)
    assert size_of(tmp_path / "grid.png") == (256, 128)
    diffusion.save_grid(pictures, tmp_path / "grid.png", columns=1, captions=["a dog", "a cat " * 9])
    assert size_of(tmp_path / "grid.png") == (128, 2 * (128 + diffusion.CAPTION_STRIP))
    with Image.open(tmp_path / "grid.png") as grid:
        strip = np.asarray(grid)[128 : 128 + diffusion.CAPTION_STRIP]
    assert strip.min() < 100, "the caption is written"
    assert strip.max() == 255


def test_noisy_steps_may_be_drawn_more_often(tokenizer: Tokenizer, tiny: OdiseConfig) -> None:
    plain = diffusion.DiffusionTrainer(tiny, tokenizer, "cpu", seed=0)
    coarse = diffusion.DiffusionTrainer(tiny, tokenizer, "cpu", seed=0, coarse_weight=1.0)
    np.testing.assert_allclose(plain.probabilities, 1 / 1000)
    kept = coarse.schedule.alphas_cumprod.numpy()
    ratio = (1 - kept[900]) / (1 - kept[100])  # 1 / (1 + SNR) of both steps
    assert coarse.probabilities[900] / coarse.probabilities[100] == pytest.approx(ratio, rel=1e-5)
    assert coarse.probabilities.sum() == pytest.approx(1.0)
    seen: list[torch.Tensor] = []
    tokens = diffusion.sd_tokens(tokenizer, ["a dog"], tiny)
    cache = diffusion.CaptionedLatents(torch.zeros(1, 4, 8, 8), tokens)
    for trainer in (plain, coarse):
        trainer.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        trainer.loss(cache, 200, np.random.default_rng(9))
    # Means of 200 steps, uniform and by weight.
    expected = [float((np.arange(1000) * trainer.probabilities).sum()) for trainer in (plain, coarse)]
    assert [steps.float().mean().item() for steps in seen] == pytest.approx(expected, abs=50)
    assert expected[1] > expected[0] + 80


@pytest.mark.font
def test_calm_close_ups_are_upright_and_whole(sampler: CloseUpSampler) -> None:
    rng = np.random.default_rng(0)
    things = rng.integers(len(sampler.things), size=64)
    calm = sampler.sample(things, 64, rng, **diffusion.CLOSE_UPS["calm"])
    varied = sampler.sample(things, 64, rng, **diffusion.CLOSE_UPS["varied"])
    sides = [(found.boxes[:, 2:] - found.boxes[:, :2]).amax(1) for found in (calm, varied)]
    assert sides[0].min() > 0.55
    assert sides[0].min() > sides[1].min()


def test_an_autoencoder_comes_from_a_folder_or_a_checkpoint(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[3] / "training/pretrained/odise-tiny"
    loaded = diffusion.load_vae(shipped)
    assert not loaded.training
    loaded.save_pretrained(tmp_path / "vae")
    again = diffusion.load_vae(tmp_path / "vae")
    for name, value in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(CheckpointError, match="holds no autoencoder: train one first"):
        diffusion.load_vae(tmp_path)


@pytest.mark.slow
@pytest.mark.font
def test_both_commands_train_and_save_diffusers_folders(
    sampler: CloseUpSampler, tokenizer: Tokenizer, scenes_root: Path, tmp_path: Path
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    scenes = ["--scenes", str(scenes_root)]
    assert vae.main([*scenes, "--out", str(tmp_path / "vae"), "--steps", "2", "--batch", "4", "--side", "32"]) == 0
    assert (tmp_path / "vae/reconstructions.png").exists()
    small = ["--steps", "2", "--batch", "1", "--small-rounds", "1", "--window-rounds", "0", "--windows", "2"]
    arguments = [*scenes, "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path)]
    assert diffusion.main([*arguments, *small, "--sampler-steps", "2"]) == 0
    for name, kind in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        assert kind.from_pretrained(tmp_path / name, local_files_only=True, low_cpu_mem_usage=False) is not None
    assert size_of(tmp_path / "samples.png") == (8 * 128, 2 * (128 + diffusion.CAPTION_STRIP))


@pytest.mark.slow
@pytest.mark.font
def test_an_autoencoder_that_is_half_written_is_not_finished(
    sampler: CloseUpSampler, scenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = next(stage for stage in plan(tmp_path) if stage.command == "vae")
    out = stage.done.parent
    arguments = ["--scenes", str(scenes_root), "--out", str(out), "--steps", "1", "--batch", "2", "--side", "32"]

    def begin(self: AutoencoderKL, folder: Path) -> None:
        self.save_config(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(vae, "FULL_SIDE_SHARE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "save_pretrained", begin)
        assert vae.main(arguments) == 130
    assert (out / "config.json").exists()
    assert not stage.done.exists()
    assert vae.main(arguments) == 0
    assert stage.done.exists()
    assert diffusion.load_vae(out) is not None


def test_the_diffusion_command_asks_for_the_autoencoder_first(
    tokenizer: Tokenizer, scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = ["--scenes", str(scenes_root), "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path)]
    assert diffusion.main(arguments) == 1
    assert "training.pretrain.vae" in capsys.readouterr().err
