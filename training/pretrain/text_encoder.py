"""Give a checkpoint that was saved without it a diffusion text encoder again.

``python -m training.pretrain.text_encoder --checkpoint training/pretrained/odise-tiny --scenes runs/frozen
--out runs/odise-tiny-captions``

The small checkpoint that ships leaves the text encoder out, as only its output for "" is used. Conditioning on captions
(``training.ablation``) and sampling need a whole one. It is trained anew, with the loss of latent diffusion (Rombach et
al. 2022, eq. 3) and against the checkpoint's own UNet and autoencoder, which stay as they are. OUT is the same
checkpoint with the text encoder; ``OUT-session`` beside it keeps state and log, ``metrics.json`` (what a right caption
is worth in the loss) and ``samples.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from odise_rt.command_line import CommandParser, command, real_number, whole_number
from odise_rt.errors import CheckpointError
from training.checkpoints.own_format import load_checkpoint, save_checkpoint
from training.pretrain.closeups import CloseUpSampler
from training.pretrain.diffusion import (
    MAX_SAMPLER_STEPS,
    SAMPLE_PROMPTS,
    CaptionedLatents,
    DiffusionTrainer,
    cache_close_ups,
    cache_scenes,
    save_grid,
    sd_tokens,
)
from training.pretrain.scene_bank import SceneBank
from training.pretrain.session import Session, add_world_arguments, parse_options, write_atomically
from training.pretrain.tokenizer import with_markers


@torch.no_grad()
def caption_losses(
    trainer: DiffusionTrainer, held_out: CaptionedLatents, rounds: int = 8, batch: int = 25
) -> dict[str, float]:
    """Error of the predicted noise when the UNet is told the caption, "", or the caption of another picture.

    Noise, steps and pictures are the same for all three.

    Args:
        trainer: UNet and text encoder.
        held_out: Latents (N, 4, h, h) and tokens (N, T) that were not trained on.
        rounds: Batches for each.
        batch: Pictures in each.

    Returns:
        Mean squared errors by "right", "empty" and "other".
    """
    count = len(held_out.tokens)
    told = {
        "right": held_out.tokens,
        "empty": trainer.empty.expand(count, -1),
        "other": held_out.tokens.roll(max(1, count // 2), 0),
    }
    found = {}
    for name, tokens in told.items():
        cache = CaptionedLatents(held_out.latents, tokens)
        losses = [
            trainer.loss(cache, batch, np.random.default_rng([8, index]), caption_dropout=0.0)
            for index in range(rounds)
        ]
        found[name] = torch.stack(losses).mean().item()
    return found


@command("the same command goes on from the last saved state")
def main(arguments: list[str] | None = None) -> int:
    """Cache latents, train, measure, sample and save; returns the exit status."""
    parser = CommandParser(prog="python -m training.pretrain.text_encoder", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="Checkpoint folder without a text encoder.")
    add_world_arguments(parser, sized=False)
    parser.add_argument("--out", type=Path, required=True, help="Checkpoint folder to write.")
    parser.add_argument("--steps", type=whole_number(1), default=1200, help="Training steps in all.")
    parser.add_argument("--batch", type=whole_number(1), default=24, help="Windows a step.")
    parser.add_argument(
        "--window-rounds", type=whole_number(0), default=6, help="Close-ups of each noun in the cache; needs the font."
    )
    parser.add_argument("--windows", type=whole_number(1), default=1200, help="Windows of scenes in the cache.")
    parser.add_argument(
        "--held-out", type=whole_number(1), default=200, help="Windows of other scenes, for metrics.json."
    )
    parser.add_argument("--rate", type=real_number(0, above=True), default=2e-3, help="Peak learning rate.")
    parser.add_argument(
        "--sampler-steps", type=whole_number(1, MAX_SAMPLER_STEPS), default=30, help="DDIM steps of samples.png."
    )
    parser.add_argument("--guidance", type=real_number(0), default=4.0, help="Weight of the prompt.")
    options = parse_options(parser, arguments)
    _train(options)
    return 0


def _train(options: argparse.Namespace) -> None:
    loaded = load_checkpoint(options.checkpoint)
    if loaded.model.sd_text is not None:
        raise CheckpointError(f"{options.checkpoint} has its diffusion text encoder: use it as it is")
    scenes = SceneBank(options.scenes, loaded.config.window)
    if len(scenes) < options.windows + options.held_out:
        raise CheckpointError(
            f"{options.scenes} has {len(scenes)} scenes: expected at least {options.windows} for training and "
            f"{options.held_out} to measure on; draw more, or lower --windows"
        )
    config, model = loaded.config, loaded.model.to(options.device)
    tokenizer = with_markers(loaded.tokenizer_json, config, options.checkpoint)
    trainer = DiffusionTrainer(config, tokenizer, options.device, options.seed)
    trainer.unet = model.unet.eval().requires_grad_(False)
    folder = options.out.with_name(options.out.name + "-session")
    session = Session(
        folder,
        {"text_encoder": trainer.text},
        options.rate,
        options.steps,
        weight_decay=0.01,
        average=0.99,
        orthogonal=("layers",),
    )
    session.resume()
    rng = np.random.default_rng([options.seed, 7])
    far = cache_scenes(model.vae, scenes, tokenizer, config, options.windows + options.held_out, rng)
    windows = options.windows
    cache = CaptionedLatents(far.latents[:windows], far.tokens[:windows])
    held_out = CaptionedLatents(far.latents[windows:], far.tokens[windows:])
    if options.window_rounds:
        sampler = CloseUpSampler(options.seed, options.font, device=options.device)
        near = cache_close_ups(model.vae, sampler, tokenizer, config, config.window, options.window_rounds, rng)
        cache = CaptionedLatents(torch.cat([near.latents, cache.latents]), torch.cat([near.tokens, cache.tokens]))
    for step in session.iterate("text encoder"):
        session.descend(trainer.loss(cache, options.batch, np.random.default_rng([options.seed, 5, step])))
    session.use_average()
    trainer.text.eval().requires_grad_(False)
    losses = caption_losses(trainer, held_out)
    write_atomically(folder / "metrics.json", json.dumps(losses, indent=2).encode())
    prompts = sd_tokens(tokenizer, list(SAMPLE_PROMPTS), config)
    pictures = trainer.sample(model.vae, prompts, options.sampler_steps, options.guidance, 0)
    save_grid(pictures, folder / "samples.png", captions=SAMPLE_PROMPTS)
    # The stored context of "" is left as it is: the UNet learned with that one, and so did the heads.
    model.sd_text = trainer.text
    save_checkpoint(
        options.out,
        model,
        tokenizer_json=loaded.tokenizer_json,
        training_vocabulary=loaded.training_vocabulary,
    )
    print("error of the predicted noise by caption:", {name: round(loss, 4) for name, loss in losses.items()})
    print(f"samples: {folder / 'samples.png'}")


if __name__ == "__main__":
    raise SystemExit(main())
