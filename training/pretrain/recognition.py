"""Measure what can be recognised of the pictures that the small diffusion model draws.

``python -m training.pretrain.recognition --diffusion runs/diffusion --checkpoint training/pretrained/odise-tiny``

The checkpoint's CLIP is shown one picture for each noun of Sticker World, and has to find the noun among all of them
("a photo of a {}."). The same is asked of true close-ups and of what the autoencoder leaves of these: no sample can be
expected to do better. Top-1 and top-5 go to ``recognition.json`` in the diffusion folder, with the nouns that were
found and those that were not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextModel

from odise_rt.command_line import CommandParser, command, real_number, whole_number
from odise_rt.errors import CheckpointError, first_line
from odise_rt.prompts import PHOTO
from training.checkpoints.own_format import LoadedCheckpoint, load_checkpoint
from training.config import OdiseConfig
from training.data.sticker_world.nouns import all_nouns
from training.pretrain.closeups import CloseUpSampler
from training.pretrain.diffusion import CLOSE_UPS, MAX_SAMPLER_STEPS, DiffusionTrainer, sd_tokens, to_latents
from training.pretrain.session import parse_options, write_atomically
from training.pretrain.tokenizer import encode_texts, with_markers
from training.run_state import UNREADABLE

TOP = 5


def load_diffusion(folder: Path, config: OdiseConfig, tokenizer: Tokenizer, device: str) -> DiffusionTrainer:
    """UNet and text encoder that ``training.pretrain.diffusion`` saved, ready to draw.

    Raises:
        CheckpointError: They are not there, are damaged, or are of another size than the configuration's.
    """
    if not (folder / "unet").is_dir():  # diffusers would look for it on its hub, and tell of the network
        raise CheckpointError(f"{folder / 'unet'} does not exist: train it with python -m training.pretrain.diffusion")
    trainer = DiffusionTrainer(config, tokenizer, device, seed=0)
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    for name, module in (("unet", trainer.unet), ("text_encoder", trainer.text)):
        try:
            saved = kinds[name].from_pretrained(folder / name, local_files_only=True, low_cpu_mem_usage=False)
            module.load_state_dict(saved.state_dict())
        except UNREADABLE as exc:
            raise CheckpointError(
                f"{folder / name} cannot be read: {first_line(exc)}; train it with "
                "python -m training.pretrain.diffusion"
            ) from exc
        module.eval().requires_grad_(False)
    return trainer


class Judge:
    """Tells which of all nouns a picture shows."""

    def __init__(self, checkpoint: LoadedCheckpoint, device: str) -> None:
        self.model, config = checkpoint.model, checkpoint.config
        prompts = [PHOTO.format(noun.name) for noun in all_nouns()]
        tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
        tokens = encode_texts(tokenizer, prompts, config.clip.context_length)
        with torch.no_grad():
            self.texts = F.normalize(self.model.text_encoder(tokens.to(device)), dim=-1)

    @torch.no_grad()
    def ranks(self, pictures: Tensor, nouns: Tensor) -> Tensor:
        """How many nouns come before the right one: int64 (N,) for pictures (N, 3, s, s) in [0, 1] and nouns (N,)."""
        embeddings = F.normalize(self.model.clip_image_encoder(pictures), dim=-1)
        similarity = (embeddings @ self.texts.T).cpu()
        right = similarity.gather(1, nouns[:, None])
        return (similarity > right).sum(1)


def measure(
    trainer: DiffusionTrainer,
    checkpoint: LoadedCheckpoint,
    sampler: CloseUpSampler,
    steps: int,
    guidance: float,
    seed: int,
    batch: int = 64,
) -> dict[str, Any]:
    """Shares of nouns that CLIP finds, and which.

    Args:
        trainer: Draws.
        checkpoint: Its autoencoder decodes, its CLIP judges.
        sampler: Draws the true close-ups.
        steps: DDIM steps.
        guidance: Weight of the prompt.
        seed: Of samples and close-ups.
        batch: Pictures at a time.

    Returns:
        ``drawn``, ``decoded`` (true close-ups through the autoencoder) and ``true``, each with ``top1`` and ``top5``;
        ``chance``; ``found``, the nouns that the first guess at a drawn picture names, and ``missed``.
    """
    nouns, vae = all_nouns(), checkpoint.model.vae
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    judge = Judge(checkpoint, str(trainer.device))
    ranks: dict[str, list[Tensor]] = {"drawn": [], "decoded": [], "true": []}
    rng = np.random.default_rng([seed, 9])
    for start in tqdm(range(0, len(nouns), batch), desc="recognition"):
        which = np.arange(start, min(start + batch, len(nouns)))
        index = torch.from_numpy(which)
        tokens = sd_tokens(tokenizer, [PHOTO.format(nouns[i].name) for i in which], checkpoint.config)
        drawn = trainer.sample(vae, tokens, steps, guidance, seed + start)
        true = sampler.sample(which, checkpoint.config.window, rng, **CLOSE_UPS["calm"]).images
        with torch.no_grad():
            latents = to_latents(vae, true) / vae.config.scaling_factor
            decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        for name, pictures in (("drawn", drawn), ("decoded", decoded), ("true", true)):
            ranks[name].append(judge.ranks(pictures, index))
    found = torch.cat(ranks["drawn"]) == 0
    return {
        **{
            name: {f"top{k}": round((torch.cat(values) < k).float().mean().item(), 4) for k in (1, TOP)}
            for name, values in ranks.items()
        },
        "chance": {f"top{k}": round(k / len(nouns), 4) for k in (1, TOP)},
        "found": [noun.name for noun, right in zip(nouns, found.tolist(), strict=True) if right],
        "missed": [noun.name for noun, right in zip(nouns, found.tolist(), strict=True) if not right],
    }


@command("nothing was written")
def main(arguments: list[str] | None = None) -> int:
    """Draw, judge and write; returns the exit status."""
    parser = CommandParser(prog="python -m training.pretrain.recognition", description=__doc__)
    parser.add_argument("--diffusion", type=Path, required=True, help="Folder of unet/ and text_encoder/.")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="Checkpoint folder whose autoencoder decodes and whose CLIP judges.",
    )
    parser.add_argument("--sampler-steps", type=whole_number(1, MAX_SAMPLER_STEPS), default=30, help="DDIM steps.")
    parser.add_argument("--guidance", type=real_number(0), default=4.0, help="Weight of the prompt.")
    options = parse_options(parser, arguments)
    checkpoint = load_checkpoint(options.checkpoint)
    checkpoint.model.to(options.device).eval()
    tokenizer = with_markers(checkpoint.tokenizer_json, checkpoint.config, options.checkpoint)
    trainer = load_diffusion(options.diffusion, checkpoint.config, tokenizer, options.device)
    sampler = CloseUpSampler(options.seed, options.font, device=options.device)
    found = measure(trainer, checkpoint, sampler, options.sampler_steps, options.guidance, options.seed)
    settings = {"sampler_steps": options.sampler_steps, "guidance": options.guidance, "seed": options.seed}
    path = options.diffusion / "recognition.json"
    write_atomically(path, (json.dumps({"settings": settings, **found}, indent=2) + "\n").encode())
    for name in ("drawn", "decoded", "true", "chance"):
        print(f"{name:8s} top-1 {found[name]['top1']:.1%}, top-{TOP} {found[name][f'top{TOP}']:.1%}")
    print(f"{path} is written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
