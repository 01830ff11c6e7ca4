"""A text encoder for a checkpoint that lacks one: only that is new, and it is refused where it makes no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from training.checkpoints.own_format import load_checkpoint
from training.config import OdiseConfig
from training.pretrain import diffusion, text_encoder

SHIPPED = Path(__file__).parents[3] / "training/pretrained/odise-tiny"


def arguments(checkpoint: Path, scenes: Path, out: Path) -> list[str]:
    return [
        *("--checkpoint", str(checkpoint), "--scenes", str(scenes), "--out", str(out), "--steps", "2", "--batch", "2"),
        *("--window-rounds", "0", "--windows", "2", "--held-out", "2", "--sampler-steps", "1"),
    ]


def test_only_the_text_encoder_is_new(scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "whole"
    assert text_encoder.main(arguments(SHIPPED, scenes_root, out)) == 0
    before, after = load_checkpoint(SHIPPED), load_checkpoint(out)
    assert before.model.sd_text is None
    assert after.model.sd_text is not None
    weights = after.model.state_dict()
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert after.training_vocabulary == before.training_vocabulary
    assert (tmp_path / "whole-session/samples.png").exists()
    losses = json.loads((tmp_path / "whole-session/metrics.json").read_text())
    assert losses.keys() == {"right", "empty", "other"}
    assert all(0.0 < loss < 3.0 for loss in losses.values())
    assert text_encoder.main(arguments(out, scenes_root, tmp_path / "again")) == 1
    assert "has its diffusion text encoder" in capsys.readouterr().err


def test_too_few_scenes_are_refused_before_any_work(
    scenes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*arguments(SHIPPED, scenes_root, tmp_path / "out"), "--windows", "600"]
    assert text_encoder.main(few) == 1
    assert "has 4 scenes: expected at least 600 for training and 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_losses_by_caption_differ_only_in_what_the_unet_is_told(tokenizer: Tokenizer, tiny: OdiseConfig) -> None:
    trainer = diffusion.DiffusionTrainer(tiny, tokenizer, "cpu", seed=0)
    latents = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    same = diffusion.CaptionedLatents(latents, diffusion.sd_tokens(tokenizer, [""] * 4, tiny))
    losses = text_encoder.caption_losses(trainer, same, rounds=1, batch=3)
    assert losses["right"] == losses["empty"] == losses["other"]
    tokens = diffusion.sd_tokens(tokenizer, ["a dog", "a cat", "a red car", "grass"], tiny)
    losses = text_encoder.caption_losses(trainer, diffusion.CaptionedLatents(latents, tokens), rounds=1, batch=3)
    assert len(set(losses.values())) == 3
