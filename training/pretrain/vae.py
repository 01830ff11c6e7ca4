"""Train the small autoencoder of the latent diffusion model.

``python -m training.pretrain.vae --scenes runs/frozen --out runs/diffusion/vae``

diffusers' ``AutoencoderKL`` learns to reproduce crops of scenes and close-ups: small crops for most of the steps, whole
windows for the last tenth. Afterwards each latent channel is shifted and scaled inside the two 1x1 convolutions around
the latent, so that ``scaling_factor * mean`` has mean 0 and deviation 1, as the noise schedule expects.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from odise_rt.command_line import CommandParser, command, real_number, whole_number
from odise_rt.errors import OptionsError
from training.config import preset
from training.data.sticker_world.nouns import all_nouns
from training.models.frozen import build_vae
from training.pretrain.closeups import CloseUpSampler
from training.pretrain.scene_bank import SceneBank
from training.pretrain.session import Session, add_world_arguments, parse_options, save_picture

KL_WEIGHT = 1e-5
EDGE_WEIGHT = 0.5
FULL_SIDE_SHARE = 0.1
"""Last share of the steps, trained on whole windows."""
RECONSTRUCTIONS = "reconstructions.png"
"""The file that is written last: where it is, the autoencoder is whole."""


def crops(scenes: SceneBank, sampler: CloseUpSampler, count: int, side: int, rng: np.random.Generator) -> Tensor:
    """Three quarters native crops of scenes, the rest close-ups; (count, 3, side, side) in [0, 1]."""
    near = count // 4
    pictures = []
    for index in rng.integers(len(scenes), size=count - near):
        room = scenes.images.shape[1] - side
        row, column = (int(rng.integers(room + 1)) for _ in range(2))
        pictures.append(torch.from_numpy(scenes.images[index, row : row + side, column : column + side]))
    native = torch.stack(pictures).permute(0, 3, 1, 2).to(sampler.device).float() / 255
    if near == 0:
        return native
    close = sampler.sample(rng.integers(len(all_nouns()), size=near), side, rng).images
    return torch.cat([native, close])


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the pixels and of their differences to right and lower neighbours."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold a shift and a scale of each latent channel into ``quant_conv`` and ``post_quant_conv``.

    Args:
        vae: Changed in place; what it reconstructs stays the same.
        images: (N, 3, H, W) in [0, 1] on which the statistics are taken.
    """
    mean = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(8)])
    channels = mean.shape[1]
    shift = mean.mean((0, 2, 3))
    scale = mean.std((0, 2, 3)) * vae.config.scaling_factor
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift
    post.weight *= scale[None, :, None, None]
    quant.weight[:channels] /= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
    quant.bias[channels:] -= 2 * scale.log()


@torch.no_grad()
def save_reconstructions(vae: AutoencoderKL, images: Tensor, path: Path) -> float:
    """Write pictures above their reconstructions as a PNG; returns the PSNR in dB."""
    output = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
    both = torch.stack([images, output]).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    save_picture(Image.fromarray((both * 255).round().to(torch.uint8).cpu().numpy()), path)
    return float(-10 * F.mse_loss(output, images).log10())


@command("the same command goes on from the last saved state")
def main(arguments: list[str] | None = None) -> int:
    """Train, normalise and save; returns the exit status."""
    parser = CommandParser(prog="python -m training.pretrain.vae", description=__doc__)
    add_world_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="Diffusers folder to write.")
    parser.add_argument("--steps", type=whole_number(1), default=1400, help="Training steps in all.")
    parser.add_argument("--batch", type=whole_number(1), default=8, help="Crops a step.")
    parser.add_argument("--side", type=whole_number(1), default=64, help="Pixels of the small crops.")
    parser.add_argument("--rate", type=real_number(0, above=True), default=2e-3, help="Peak learning rate.")
    options = parse_options(parser, arguments)
    config = preset(options.config)
    torch.manual_seed(options.seed)
    stride = config.window // config.latent_side
    if options.side % stride or options.side > config.window:
        raise OptionsError(f"--side is {options.side}: expected a multiple of {stride} and at most {config.window}")
    scenes = SceneBank(options.scenes, config.window)
    sampler = CloseUpSampler(options.seed, options.font, device=options.device)
    vae = build_vae(config.vae).to(options.device).train().requires_grad_(True)
    session = Session(
        options.out,
        {"vae": vae},
        options.rate,
        options.steps,
        warmup=50,
        weight_decay=0.01,
        average=0.99,
        orthogonal=("block",),
    )
    session.resume()
    for step in session.iterate("vae"):
        rng = np.random.default_rng([options.seed, 3, step])
        torch.manual_seed(int(rng.integers(2**62)))
        whole = step >= (1 - FULL_SIDE_SHARE) * options.steps
        side, batch = (config.window, max(2, options.batch // 4)) if whole else (options.side, options.batch)
        target = crops(scenes, sampler, batch, side, rng) * 2 - 1
        posterior = vae.encode(target).latent_dist
        output = vae.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / target[0].numel()
        loss = reconstruction_loss(output, target)
        session.descend(loss + KL_WEIGHT * divergence, kl=divergence.item(), mse=F.mse_loss(output, target).item())
    session.use_average()
    vae.eval()
    rng = np.random.default_rng([options.seed, 4])
    normalise_latents(vae, crops(scenes, sampler, 64, config.window, rng))
    vae.save_pretrained(options.out)
    quality = save_reconstructions(vae, crops(scenes, sampler, 8, config.window, rng), options.out / RECONSTRUCTIONS)
    print(f"{options.out}: reconstruction PSNR {quality:.1f} dB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
