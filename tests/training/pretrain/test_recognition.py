"""What a CLIP recognises of drawn pictures: a perfect painter is found, noise is not, and missing folders are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from odise_rt.errors import CheckpointError
from training.checkpoints.own_format import LoadedCheckpoint, load_checkpoint
from training.config import OdiseConfig
from training.data.sticker_world.nouns import all_nouns
from training.pretrain import recognition
from training.pretrain.closeups import CloseUpSampler
from training.pretrain.diffusion import DiffusionTrainer

SHIPPED = Path(__file__).parents[3] / "training/pretrained/odise-tiny"


@pytest.fixture(scope="module")
def shipped() -> LoadedCheckpoint:
    loaded = load_checkpoint(SHIPPED)
    loaded.model.eval()
    return loaded


@pytest.mark.font
def test_the_judge_finds_what_close_ups_show(shipped: LoadedCheckpoint, sampler: CloseUpSampler) -> None:
    judge = recognition.Judge(shipped, "cpu")
    which = np.arange(0, len(all_nouns()), 12)
    close = sampler.sample(which, 128, np.random.default_rng(0), (0.7, 1.0), 0.0, 0.0)
    ranks = judge.ranks(close.images, close.nouns)
    assert (ranks == 0).float().mean() > 0.6
    wrong = judge.ranks(close.images.roll(1, 0), close.nouns)
    assert (wrong == 0).float().mean() < 0.2


@pytest.mark.font
def test_painters_are_told_apart(
    shipped: LoadedCheckpoint, sampler: CloseUpSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognition, "all_nouns", lambda: all_nouns()[:24])

    class Painter:
        """Draws noise, or what the close-ups show."""

        device = "cpu"

        def __init__(self, able: bool) -> None:
            self.able = able

        def sample(self, vae: Any, tokens: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
            if not self.able:
                return torch.rand(len(tokens), 3, 128, 128, generator=torch.Generator().manual_seed(seed))
            return sampler.sample(np.arange(len(tokens)), 128, np.random.default_rng(seed), (0.8, 1.0), 0.0, 0.0).images

    good, bad = (
        recognition.measure(Painter(able), shipped, sampler, 2, 4.0, 0)  # type: ignore[arg-type]
        for able in (True, False)
    )
    assert good["true"] == bad["true"]
    assert good["true"]["top5"] > 0.8
    assert good["drawn"]["top1"] > 0.6 > 0.3 > bad["drawn"]["top1"]
    assert good["decoded"]["top5"] > bad["drawn"]["top5"]
    assert len(good["found"]) + len(good["missed"]) == 24
    assert good["chance"] == {"top1": round(1 / 24, 4), "top5": round(5 / 24, 4)}


@pytest.mark.font
def test_the_command_writes_what_it_found(
    tiny: OdiseConfig,
    sampler: CloseUpSampler,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recognition, "all_nouns", lambda: all_nouns()[:6])
    monkeypatch.setattr(recognition, "CloseUpSampler", lambda *arguments, **options: sampler)
    trainer = DiffusionTrainer(tiny, tokenizer, "cpu", seed=3)
    trainer.unet.save_pretrained(tmp_path / "unet")
    trainer.text.save_pretrained(tmp_path / "text_encoder")
    again = recognition.load_diffusion(tmp_path, tiny, tokenizer, "cpu")
    assert torch.equal(again.unet.conv_in.weight, trainer.unet.conv_in.weight)
    arguments = ["--diffusion", str(tmp_path), "--checkpoint", str(SHIPPED), "--sampler-steps", "2"]
    assert recognition.main(arguments) == 0
    found = json.loads((tmp_path / "recognition.json").read_text())
    assert found["settings"] == {"sampler_steps": 2, "guidance": 4.0, "seed": 0}
    assert f"true     top-1 {found['true']['top1']:.1%}" in capsys.readouterr().out


def test_a_folder_without_a_model_is_one_error(
    tiny: OdiseConfig, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match="unet does not exist: train it"):
        recognition.load_diffusion(tmp_path, tiny, tokenizer, "cpu")
    assert recognition.main(["--diffusion", str(tmp_path), "--checkpoint", str(SHIPPED)]) == 1
    error = capsys.readouterr().err
    assert "train it with python -m training.pretrain.diffusion" in error
    assert error.count("\n") == 1
