"""Train the small latent text-to-image diffusion model.

``python -m training.pretrain.diffusion --scenes runs/frozen --tokenizer runs/tokenizer.json --out runs/diffusion``

diffusers' ``UNet2DConditionModel`` and a CLIP-style text encoder learn together to predict the noise in latents of the
autoencoder in ``OUT/vae`` (Rombach et al. 2022): scaled-linear schedule of 1000 steps, a tenth of the captions left out
for guidance. Latents are computed once. The first part of the training sees close-ups of half a window's side, a
quarter of the cost, the rest close-ups and scenes of a whole window.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from odise_rt.command_line import CommandParser, command, real_number, whole_number
from odise_rt.errors import CheckpointError, first_line
from training.checkpoints.own_format import is_checkpoint, load_checkpoint, read_tokenizer
from training.config import OdiseConfig, preset
from training.data.sticker_world.nouns import all_nouns
from training.models.frozen import build_sd_text, build_unet
from training.pretrain.closeups import CloseUpSampler, caption
from training.pretrain.scene_bank import SceneBank
from training.pretrain.session import Session, add_world_arguments, parse_options, save_picture
from training.pretrain.tokenizer import encode_texts, with_markers
from training.run_state import UNREADABLE

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MAX_SAMPLER_STEPS = 999
"""Most steps of a sampler, of the thousand of :data:`SCHEDULE`; diffusers counts from the second."""
CAPTION_DROPOUT = 0.1
CLOSE_UPS: dict[str, dict[str, Any]] = {
    "varied": {"scale_range": (0.45, 1.05), "distractor_share": 0.15},
    "calm": {
        "scale_range": (0.65, 1.0),
        "distractor_share": 0.0,
        "split_share": 0.1,
        "turn": 6.0,
        "any_way_share": 0.0,
    },
}
"""How ``CloseUpSampler.sample`` draws: any way round and half hidden, or large, whole and upright."""
SAMPLE_PROMPTS = (
    *("a photo of a dog.", "a photo of a red apple.", "a photo of a bus.", "a photo of a crown."),
    *("a photo of a sunflower.", "a photo of a penguin.", "a photo of a soccer ball.", "a photo of a grass."),
    *("a photo of a pizza.", "a photo of a owl.", "a photo of a christmas tree.", "a photo of a sauropod."),
    *("a pear in front of a brick wall", "a zebra on the grass", "a car on the sand", "a balloon under a clear sky"),
)


CAPTION_STRIP = 34
"""Pixels for two lines under a sample."""


@dataclass(frozen=True)
class CaptionedLatents:
    """A cache of what the autoencoder makes of captioned pictures."""

    latents: Tensor
    """float32 (N, 4, h, h), already times the scaling factor."""
    tokens: Tensor
    """int64 (N, T)."""


@torch.no_grad()
def to_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled posterior means (N, 4, H/8, W/8) of pictures in [0, 1]."""
    latents: Tensor = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    return latents


def cache_close_ups(
    vae: AutoencoderKL,
    sampler: CloseUpSampler,
    tokenizer: Tokenizer,
    config: OdiseConfig,
    side: int,
    rounds: int,
    rng: np.random.Generator,
    style: str = "varied",
) -> CaptionedLatents:
    """Latents of ``rounds`` close-ups of every noun with a caption each, drawn in a style of ``CLOSE_UPS``."""
    nouns = all_nouns()
    latents, captions = [torch.empty(0, 4, side // 8, side // 8)], []
    for _ in tqdm(range(rounds), desc=f"latents of close-ups, {side} px"):
        for part in np.array_split(rng.permutation(len(nouns)), 17):
            close = sampler.sample(part, side, rng, **CLOSE_UPS[style])
            latents.append(to_latents(vae, close.images).cpu())
            pairs = zip(close.nouns.tolist(), close.ground.tolist(), strict=True)
            captions += [caption(nouns[shown], nouns[ground], rng) for shown, ground in pairs]
    return CaptionedLatents(torch.cat(latents), sd_tokens(tokenizer, captions, config))


def cache_scenes(
    vae: AutoencoderKL,
    scenes: SceneBank,
    tokenizer: Tokenizer,
    config: OdiseConfig,
    count: int,
    rng: np.random.Generator,
) -> CaptionedLatents:
    """Latents of windows: half of them whole scenes made smaller, half native crops, with a caption of the scene."""
    device = next(vae.parameters()).device
    latents, captions = [], []
    for index in tqdm(rng.permutation(len(scenes))[:count], desc="latents of scenes"):
        picture = torch.from_numpy(scenes.images[index]).permute(2, 0, 1)[None].to(device).float() / 255
        if rng.random() < 0.5:
            picture = F.interpolate(picture, (config.window, config.window), mode="bilinear", antialias=True)
        room = picture.shape[-1] - config.window
        row, column = (int(rng.integers(room + 1)) for _ in range(2))
        picture = picture[..., row : row + config.window, column : column + config.window]
        latents.append(to_latents(vae, picture).cpu())
        captions.append(scenes.captions[index][int(rng.integers(len(scenes.captions[index])))])
    return CaptionedLatents(torch.cat(latents), sd_tokens(tokenizer, captions, config))


def sd_tokens(tokenizer: Tokenizer, texts: list[str], config: OdiseConfig) -> Tensor:
    """Ids for the diffusion model's text encoder, padded with the end marker."""
    return encode_texts(tokenizer, texts, config.sd_text.context_length, pad=config.sd_text.end_token)


class DiffusionTrainer:
    """UNet and text encoder with their training step and sampler.

    Args:
        config: Sizes of the networks.
        tokenizer: Of the captions.
        device: Where to train.
        seed: Decides the first weights.
        coarse_weight: Exponent g of the weight 1 / (1 + SNR)^g of a step's error (Choi et al. 2022, "P2", k = 1),
            drawn as the steps' probabilities, which has the same expectation as weighing uniform steps and less
            variance. 0 is the plain loss; 1 spends less on fine texture and more on what is where, which is what a
            caption tells.
        compiled: Train through ``torch.compile``.
    """

    def __init__(
        self,
        config: OdiseConfig,
        tokenizer: Tokenizer,
        device: str,
        seed: int,
        coarse_weight: float = 0.0,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.device = config, torch.device(device)
        self.unet: Any = build_unet(config.unet, config.latent_side).to(device).train().requires_grad_(True)
        self.text: Any = build_sd_text(config.sd_text).to(device).train().requires_grad_(True)
        self.schedule = DDPMScheduler(**SCHEDULE)
        self.empty = sd_tokens(tokenizer, [""], config)
        kept = self.schedule.alphas_cumprod
        # SNR = kept / (1 - kept), so 1 / (1 + SNR) is what a step has lost.
        weights = (1 - kept) ** coarse_weight
        self.probabilities: np.ndarray = (weights.double() / weights.double().sum()).numpy()
        # A shape at a time: with dynamic shapes inductor fails on this UNet (torch 2.13, CPU).
        self.denoise: Any = torch.compile(self.unet, dynamic=False) if compiled else self.unet

    def loss(
        self,
        cache: CaptionedLatents,
        batch: int,
        rng: np.random.Generator,
        caption_dropout: float = CAPTION_DROPOUT,
    ) -> Tensor:
        """Squared error of the predicted noise on a random batch, a share of whose captions is left out."""
        index = torch.from_numpy(rng.integers(len(cache.latents), size=batch))
        latents, tokens = cache.latents[index].to(self.device), cache.tokens[index].clone()
        tokens[torch.from_numpy(rng.random(batch) < caption_dropout)] = self.empty
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        steps = torch.from_numpy(rng.choice(len(self.probabilities), size=batch, p=self.probabilities)).to(self.device)
        noisy = self.schedule.add_noise(latents, noise, steps)
        context = self.text(tokens.to(self.device)).last_hidden_state
        return F.mse_loss(self.denoise(noisy, steps, context).sample, noise)

    @torch.no_grad()
    def sample(self, vae: AutoencoderKL, tokens: Tensor, steps: int, guidance: float, seed: int) -> Tensor:
        """Pictures for prompts: DDIM with classifier-free guidance; (N, 3, window, window) in [0, 1]."""
        scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        scheduler.set_timesteps(steps)
        count, side = len(tokens), self.config.latent_side
        both = torch.cat([self.empty.expand(count, -1), tokens]).to(self.device)
        context = self.text(both).last_hidden_state
        latents = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed)).to(self.device)
        for step in scheduler.timesteps:
            free, guided = self.unet(torch.cat([latents, latents]), step, context).sample.chunk(2)
            latents = scheduler.step(free + guidance * (guided - free), step, latents).prev_sample
        pictures: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
        return (pictures / 2 + 0.5).clamp(0, 1)


def save_grid(pictures: Tensor, path: Path, columns: int = 8, captions: Sequence[str] = ()) -> None:
    """Write pictures as one PNG.

    Args:
        pictures: (N, 3, s, s) in [0, 1]; N must be a multiple of ``columns``.
        path: of the PNG.
        columns: Pictures side by side.
        captions: N texts to write under the pictures, or none.
    """
    side, strip = pictures.shape[-1], CAPTION_STRIP if captions else 0
    tiles = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    grid = Image.new("RGB", (columns * side, len(tiles) // columns * (side + strip)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for index, tile in enumerate(tiles):
        left, top = index % columns * side, index // columns * (side + strip)
        grid.paste(Image.fromarray(tile), (left, top))
        if captions:
            text = "\n".join(textwrap.wrap(captions[index], max(8, side // 6)))
            draw.multiline_text((left + side / 2, top + side + 3), text, "black", font, anchor="ma", align="center")
    save_picture(grid, path)


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a folder in diffusers' layout, or of a checkpoint of this project, ready to use.

    Raises:
        CheckpointError: It is not there, or is damaged.
    """
    if is_checkpoint(folder):
        vae = load_checkpoint(folder).model.vae
    elif (folder / "config.json").exists():
        try:
            vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
        except UNREADABLE as exc:
            raise CheckpointError(
                f"{folder} cannot be read as an autoencoder ({first_line(exc)}): train it again"
            ) from exc
    else:
        raise CheckpointError(
            f"{folder} holds no autoencoder: train one first with python -m training.pretrain.vae, or name a "
            "checkpoint that has one with --vae"
        )
    return vae.eval().requires_grad_(False)


@command("the same command goes on from the last saved state")
def main(arguments: list[str] | None = None) -> int:
    """Cache latents, train, sample and save; returns the exit status."""
    parser = CommandParser(prog="python -m training.pretrain.diffusion", description=__doc__)
    add_world_arguments(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of training.pretrain.tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="Folder that unet/, text_encoder/, samples.png go to.")
    parser.add_argument(
        "--vae", type=Path, help="Autoencoder, or checkpoint whose autoencoder to use. Default: OUT/vae."
    )
    parser.add_argument("--steps", type=whole_number(1), default=1600, help="Training steps in all.")
    parser.add_argument(
        "--batch", type=whole_number(1), default=24, help="Whole windows a step; twice as many small close-ups."
    )
    parser.add_argument(
        "--small-rounds", type=whole_number(1), default=16, help="Small close-ups of each noun in the cache."
    )
    parser.add_argument(
        "--window-rounds", type=whole_number(0), default=8, help="Whole-window close-ups of each noun in the cache."
    )
    parser.add_argument("--windows", type=whole_number(1), default=600, help="Windows of scenes in the cache.")
    parser.add_argument(
        "--close-ups",
        choices=sorted(CLOSE_UPS),
        default="varied",
        help="varied: turned, cut and half hidden; calm: large, whole and upright, learnt in fewer steps.",
    )
    parser.add_argument(
        "--small-share", type=real_number(0, 1), default=0.55, help="Share of the steps on small close-ups."
    )
    parser.add_argument("--rate", type=real_number(0, above=True), default=2e-3, help="Peak learning rate.")
    parser.add_argument(
        "--coarse-weight",
        type=real_number(0, 100),
        default=0.0,
        help="1 draws noisy steps more often (P2 weighting); 0: all alike.",
    )
    parser.add_argument("--compile", action="store_true", help="Train through torch.compile; needs a C++ compiler.")
    parser.add_argument("--sample-every", type=whole_number(1), default=300, help="Steps between samples.")
    parser.add_argument(
        "--sampler-steps", type=whole_number(1, MAX_SAMPLER_STEPS), default=30, help="DDIM steps of samples.png."
    )
    parser.add_argument("--guidance", type=real_number(0), default=4.0, help="Weight of the prompt.")
    options = parse_options(parser, arguments)
    config = preset(options.config)
    tokenizer = with_markers(read_tokenizer(options.tokenizer), config, options.tokenizer)
    vae = load_vae(options.vae or options.out / "vae").to(options.device)
    trainer = DiffusionTrainer(config, tokenizer, options.device, options.seed, options.coarse_weight, options.compile)
    session = Session(
        options.out / "session",
        {"unet": trainer.unet, "text_encoder": trainer.text},
        options.rate,
        options.steps,
        weight_decay=0.01,
        average=0.99,
        orthogonal=("block", "layers"),
    )
    session.resume()
    prompts = sd_tokens(tokenizer, list(SAMPLE_PROMPTS), config)
    if session.step < options.steps:
        small, windows = _caches(options, config, tokenizer, vae)
    for step in session.iterate("diffusion"):
        rng = np.random.default_rng([options.seed, 5, step])
        first = step < options.small_share * options.steps
        batch = 2 * options.batch if first else options.batch
        session.descend(trainer.loss(small if first else windows, batch, rng))
        if (step + 1) % options.sample_every == 0 and step + 1 < options.steps:
            pictures = trainer.sample(vae, prompts, 20, options.guidance, 0)
            save_grid(pictures, options.out / "samples_latest.png", captions=SAMPLE_PROMPTS)
    session.use_average()
    trainer.unet.eval()
    trainer.text.eval()
    trainer.unet.save_pretrained(options.out / "unet")
    trainer.text.save_pretrained(options.out / "text_encoder")
    trainer.schedule.save_pretrained(options.out / "scheduler")
    pictures = trainer.sample(vae, prompts, options.sampler_steps, options.guidance, 0)
    save_grid(pictures, options.out / "samples.png", captions=SAMPLE_PROMPTS)
    print(f"{options.out}: unet, text_encoder, scheduler and samples.png are written")
    return 0


def _caches(
    options: argparse.Namespace, config: OdiseConfig, tokenizer: Tokenizer, vae: AutoencoderKL
) -> tuple[CaptionedLatents, CaptionedLatents]:
    """Latents of small close-ups, and of whole windows."""
    rng = np.random.default_rng([options.seed, 6])
    sampler = CloseUpSampler(options.seed, options.font, device=options.device)
    half = config.window // 2
    small = cache_close_ups(vae, sampler, tokenizer, config, half, options.small_rounds, rng, options.close_ups)
    near = cache_close_ups(
        vae, sampler, tokenizer, config, config.window, options.window_rounds, rng, options.close_ups
    )
    far = cache_scenes(vae, SceneBank(options.scenes, config.window), tokenizer, config, options.windows, rng)
    tokens = torch.cat([near.tokens, far.tokens])
    return small, CaptionedLatents(torch.cat([near.latents, far.latents]), tokens)


if __name__ == "__main__":
    raise SystemExit(main())
