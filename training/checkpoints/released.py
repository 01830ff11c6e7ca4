"""Puts a model together from the published files: ODISE heads, Stable Diffusion 1.x and CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from odise_rt.vocabulary import Vocabulary
from training.checkpoints.clip import load_clip
from training.checkpoints.clip_tokenizer import openai_clip_tokenizer_json
from training.checkpoints.odise_heads import load_odise_heads
from training.checkpoints.own_format import LoadedCheckpoint, check_tokenizer, uninitialised_model
from training.checkpoints.report import LoadReport
from training.checkpoints.stable_diffusion import load_stable_diffusion
from training.config import OdiseConfig
from training.models.odise import Odise


def load_released(
    config: OdiseConfig,
    *,
    stable_diffusion: Path,
    clip: Path,
    odise: Path | None = None,
    training_vocabulary: Sequence[str] | None = None,
    tokenizer_json: str | None = None,
) -> LoadedCheckpoint:
    """Read published files into a model.

    Args:
        config: the size and variant that the files have.
        stable_diffusion: a CompVis ``sd-v1-*.ckpt``, or a diffusers directory.
        clip: OpenAI's ``.pt`` or an open_clip checkpoint.
        odise: a released ``odise_*.pth``; without it the heads keep their fresh weights, to be trained.
        training_vocabulary: names and synonyms seen in training; the files do not hold them. By default COCO's 133
            names, the data of the released heads; the official code also counts its own synonyms of them as seen.
        tokenizer_json: the text tower's ``tokenizers`` file; by default that of OpenAI's CLIP.

    Raises:
        CheckpointError: a file is of another kind or size, or incomplete.
    """
    model = Odise(config) if odise is None else uninitialised_model(config)
    tokenizer_json = openai_clip_tokenizer_json() if tokenizer_json is None else tokenizer_json
    check_tokenizer(tokenizer_json, config, "the tokenizer")
    # A fresh model has its text encoder; only drop_sd_text() takes it away.
    assert model.sd_text is not None
    layers = (config.vae.layers_per_block, config.unet.layers_per_block)
    parts = load_stable_diffusion(stable_diffusion, model.vae, model.unet, model.sd_text, layers)
    parts.append(load_clip(clip, model.clip, config.clip))
    if odise is not None:
        parts.append(load_odise_heads(odise, model))
    model.refresh_null_text_embedding()
    if odise is None and model.mask_classifier.no_object_embedding is not None:
        _start_no_object_at_nothing(model)
    words = Vocabulary.builtin("coco").words if training_vocabulary is None else tuple(training_vocabulary)
    return LoadedCheckpoint(model.eval(), config, words, tokenizer_json, LoadReport(tuple(parts)))


@torch.no_grad()
def _start_no_object_at_nothing(model: Odise) -> None:
    """Training starts with CLIP's embedding of "" as that of "no object" (odise.md section 5.1)."""
    config = model.config.clip
    tokens = torch.zeros(1, config.context_length, dtype=torch.int64)
    tokens[0, 0], tokens[0, 1] = config.start_token, config.end_token
    embedding = model.mask_classifier.no_object_embedding
    assert embedding is not None
    embedding.copy_(model.clip_text(tokens)[0])
