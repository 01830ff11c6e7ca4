"""Train a small CLIP on Sticker World.

``python -m training.pretrain.clip --scenes runs/frozen --tokenizer runs/tokenizer.json --out runs/clip``

Contrastive training (Radford et al. 2021) of ``open_clip.model.CLIP`` on captioned pictures of every noun, the ones no
mask names included. Three kinds of samples a step:

* Close-ups, half of their patches dropped (FLIP, Li et al. 2023), against their captions.
* Mosaics: close-ups of 64 and 32 pixels side by side in one 128-pixel picture. A region token for each tile attends to
  the class token and to patches inside the tile, as ODISE's mask classifier will have it do (paper section 3.3), and
  meets the tile's caption. The tiles are ours, so this needs no box or mask annotation.
* Scenes, half of their patches dropped, against their captions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save as serialize
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from odise_rt.errors import OdiseError
from training.config import ClipConfig, preset
from training.data.sticker_world.nouns import all_nouns
from training.pretrain.closeups import PHOTO_TEMPLATE, CloseUps, CloseUpSampler, caption
from training.pretrain.scene_bank import SceneBank
from training.pretrain.session import Session, write_atomically
from training.pretrain.tokenizer import encode_texts

WEIGHTS_FILE = "model.safetensors"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def build_clip(config: ClipConfig) -> CLIP:
    """An untrained CLIP of the shapes of ``config``."""
    return CLIP(
        config.embed_dim,
        CLIPVisionCfg(
            layers=config.layers,
            width=config.width,
            head_width=config.head_width,
            patch_size=config.patch_size,
            image_size=config.image_size,
        ),
        CLIPTextCfg(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
        ),
        quick_gelu=config.quick_gelu,
    )


def normalise(images: Tensor) -> Tensor:
    """OpenAI's normalisation of (N, 3, H, W) in [0, 1]."""
    mean, std = (torch.tensor(value, device=images.device)[None, :, None, None] for value in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def encode_images(model: CLIP, images: Tensor, visible: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    """Embeddings of pictures, or of regions of them.

    Args:
        model: The CLIP.
        images: (N, 3, S, S) in [0, 1].
        visible: Optional bool (N, Q, P): patches that each region token may attend to. Region tokens start as copies of
            the class token and attend to it and to their patches; nothing attends to them.
        kept: Optional int64 (N, k): the only patches to process (patch dropout); not together with ``visible``.

    Returns:
        Unnormalised (N, 1 + Q, D): the class token's embedding, then the regions'.
    """
    visual: Any = model.visual
    patches = visual.conv1(normalise(images)).flatten(2).transpose(1, 2)
    positions = visual.positional_embedding
    patches = patches + positions[1:]
    if kept is not None:
        patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
    class_token = (visual.class_embedding + positions[0]).expand(len(images), 1, -1)
    regions = 0 if visible is None else visible.shape[1]
    x = visual.ln_pre(torch.cat([class_token.expand(-1, regions + 1, -1), patches], 1))
    mask = None
    if visible is not None:
        everything = visible.new_ones(len(images), 1 + patches.shape[1], 1 + patches.shape[1])
        region_rows = torch.cat([visible.new_ones(len(images), regions, 1), visible], -1)
        mask = torch.cat([region_rows, everything], 1)[:, None]
    for block in visual.transformer.resblocks:
        heads = block.attn.num_heads
        joint = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in joint.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(query, key[:, :, regions:], value[:, :, regions:], attn_mask=mask)
        x = x + block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    tokens = torch.cat([x[:, regions : regions + 1], x[:, :regions]], 1)
    return visual.ln_post(tokens) @ visual.proj


def encode_tokens(model: CLIP, tokens: Tensor) -> Tensor:
    """Unnormalised text embeddings (L, D) of token ids (L, T); trailing padding is cut, which changes nothing."""
    length = int(tokens.argmax(-1).max()) + 1
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ model.text_projection


@dataclass(frozen=True)
class Mosaics:
    """Pictures put together from close-ups."""

    images: Tensor
    """(N, 3, S, S)."""
    visible: Tensor
    """bool (N, Q, P): patches of each tile that its region token sees."""
    nouns: Tensor
    """int64 (N, Q): noun of each region; Q is 12, the ten tiles and the grounds of the large ones."""
    ground: Tensor
    """int64 (N, Q): texture of each region's tile."""


def draw_mosaics(
    sampler: CloseUpSampler, nouns: np.ndarray, config: ClipConfig, rng: np.random.Generator, scatter: bool = True
) -> Mosaics:
    """Lay close-ups in mosaics of four quarters, two of which are divided again into four.

    Each tile gives a region, and the two large tiles another one of what is left beside the thing: the ground.

    Args:
        sampler: Draws the tiles.
        nouns: Integer (N, 10): two half-side tiles and eight quarter-side tiles for each mosaic.
        config: Sizes of picture and patch.
        rng: Source of every choice.
        scatter: Hide a random part of each tile's patches, as the irregular masks of real segments do.
    """
    count, side, grid = len(nouns), config.image_size, config.image_size // config.patch_size
    big = sampler.sample(nouns[:, :2].ravel(), side // 2, rng, split_share=0.0)
    small = sampler.sample(nouns[:, 2:].ravel(), side // 4, rng)
    images = torch.empty(count, 3, side, side, device=sampler.device)
    visible = torch.zeros(count, 12, grid, grid, dtype=torch.bool)
    grounds = big.ground.view(count, 2).clone()
    for row in range(count):
        quarters = rng.permutation(4)
        for tile in range(10):
            if tile < 2:
                top, left, size = int(quarters[tile]) // 2 * 2, int(quarters[tile]) % 2 * 2, 2
                source, index = big, row * 2 + tile
            else:
                quarter, part = int(quarters[2 + (tile - 2) // 4]), (tile - 2) % 4
                top, left, size = quarter // 2 * 2 + part // 2, quarter % 2 * 2 + part % 2, 1
                source, index = small, row * 8 + tile - 2
            pixels, cells = side // 4, grid // 4
            images[row, :, top * pixels : (top + size) * pixels, left * pixels : (left + size) * pixels] = (
                source.images[index]
            )
            rows, columns = slice(top * cells, (top + size) * cells), slice(left * cells, (left + size) * cells)
            box = _tile_mask(source, index, size * cells, rng, scatter)
            visible[row, tile, rows, columns] = box
            if tile < 2 and box.all():  # Nothing of the ground is left: look at the thing once more.
                visible[row, 10 + tile, rows, columns] = box
                grounds[row, tile] = big.nouns[index]
            elif tile < 2:
                visible[row, 10 + tile, rows, columns] = ~box
    shown = torch.cat([big.nouns.view(count, 2), small.nouns.view(count, 8), grounds], 1)
    ground = torch.cat([big.ground.view(count, 2), small.ground.view(count, 8), grounds], 1)
    visible = _roughened(visible, shown >= len(sampler.things), rng, scatter)
    return Mosaics(images, visible.flatten(2).to(sampler.device), shown, ground)


def _roughened(visible: Tensor, is_stuff: Tensor, rng: np.random.Generator, scatter: bool) -> Tensor:
    """Make regions (N, Q, g, g) as untidy as those of real masks.

    A real mask sees every patch that it touches, so regions of stuff see the rims of the things that stand in them:
    they grow by a patch, a fifth of the regions of things too. Then up to half of the patches are hidden, never all.
    """
    shape = tuple(visible.shape)
    wider = F.max_pool2d(visible.float(), 3, 1, 1) > 0
    share = torch.where(is_stuff, 0.8, 0.2) if scatter else is_stuff.float()
    grown = torch.where((torch.from_numpy(rng.random(shape[:2])) < share)[..., None, None], wider, visible)
    if not scatter:
        return grown
    kept = torch.from_numpy(rng.random(shape) < rng.uniform(0.5, 1.0, (*shape[:2], 1, 1)))
    holed = grown & kept
    return torch.where(holed.flatten(2).any(-1)[..., None, None], holed, grown)


def _tile_mask(source: CloseUps, index: int, cells: int, rng: np.random.Generator, scatter: bool) -> Tensor:
    """Cells of one tile's region: a loose box about the thing, or, in a texture, any box if ``scatter``."""
    mask = torch.zeros(cells, cells, dtype=torch.bool)
    left, top, right, bottom = (source.boxes[index].cpu().numpy() * cells).tolist()
    if source.nouns[index] == source.ground[index] and scatter:
        wide, high = rng.uniform(0.3, 1.0, 2) * cells
        left, top = rng.uniform(0, cells - wide), rng.uniform(0, cells - high)
        right, bottom = left + wide, top + high
    mask[int(top) : max(int(np.ceil(bottom)), int(top) + 1), int(left) : max(int(np.ceil(right)), int(left) + 1)] = True
    return mask


def contrast(images: Tensor, texts: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Symmetric contrastive loss in which every pair marked ``same`` (bool (N, N)) is a positive."""
    logits = scale.exp().clamp(max=100.0) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = same.float() / same.sum(-1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


class ClipTrainer:
    """The training step and the evaluation."""

    def __init__(
        self, config: ClipConfig, tokenizer: Tokenizer, scenes: SceneBank, sampler: CloseUpSampler, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.tokenizer, self.scenes, self.sampler, self.seed = config, tokenizer, scenes, sampler, seed
        self.model = build_clip(config).to(sampler.device)

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        return encode_texts(self.tokenizer, texts, self.config.context_length).to(self.sampler.device)

    def _kept(self, count: int, share: float, rng: np.random.Generator) -> Tensor:
        patches = (self.config.image_size // self.config.patch_size) ** 2
        order = np.argsort(rng.random((count, patches)), 1)[:, : int(share * patches)]
        return torch.from_numpy(np.ascontiguousarray(order)).to(self.sampler.device)

    def _scene_batch(self, count: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """Whole scenes and native windows of them, with a caption each."""
        side = self.config.image_size
        pictures, captions = [], []
        for index in rng.integers(len(self.scenes), size=count):
            picture = torch.from_numpy(self.scenes.images[index]).permute(2, 0, 1).float()[None] / 255
            crop = int(rng.integers(side, picture.shape[-1] + 1)) if rng.random() < 0.5 else picture.shape[-1]
            row, column = (int(rng.integers(picture.shape[-1] - crop + 1)) for _ in range(2))
            picture = picture[..., row : row + crop, column : column + crop]
            pictures.append(F.interpolate(picture, (side, side), mode="bilinear", antialias=True))
            choices = self.scenes.captions[index]
            captions.append(choices[int(rng.integers(len(choices)))])
        return torch.cat(pictures).to(self.sampler.device), captions

    def text_loss(self, step: int, count: int) -> Tensor:
        """Contrast of captions alone: two wordings for each of ``count`` nouns belong together."""
        rng = np.random.default_rng([self.seed, 3, step])
        nouns = all_nouns()
        things = len(self.sampler.things)
        shown = rng.permutation(len(nouns))[:count]
        ground = rng.integers(things, len(nouns), (2, count))
        sides = [
            encode_tokens(
                self.model,
                self._tokens([caption(nouns[a], nouns[b], rng) for a, b in zip(shown, row, strict=True)]),
            )
            for row in ground
        ]
        identity = torch.eye(count, dtype=torch.bool, device=self.sampler.device)
        return contrast(sides[0], sides[1], identity, self.model.logit_scale)

    def loss(self, step: int, mosaics: int, close_ups: int, scenes: int) -> tuple[Tensor, dict[str, float]]:
        """Losses of one step; the step's number and the seed decide everything drawn."""
        rng = np.random.default_rng([self.seed, 1, step])
        nouns = all_nouns()
        order = np.concatenate([rng.permutation(len(nouns)) for _ in range(1 + (mosaics * 10 + close_ups) // 200)])
        tiles = order[: mosaics * 10].reshape(mosaics, 10)
        # There are few kinds of stuff: make one small tile of each mosaic and a large one of every other mosaic stuff.
        tiles[:, 9] = rng.choice(self.sampler.stuff, mosaics)
        tiles[::2, 1] = rng.choice(self.sampler.stuff, len(tiles[::2]))
        mosaic = draw_mosaics(self.sampler, tiles, self.config, rng)
        close = self.sampler.sample(
            order[mosaics * 10 : mosaics * 10 + close_ups], self.config.image_size, rng, (0.22, 1.1)
        )
        regions = encode_images(self.model, mosaic.images, mosaic.visible)[:, 1:].flatten(0, 1)
        whole = encode_images(self.model, close.images, kept=self._kept(close_ups, 0.5, rng))[:, 0]
        shown = torch.cat([mosaic.nouns.flatten(), close.nouns])
        ground = torch.cat([mosaic.ground.flatten(), close.ground])
        captions = [caption(nouns[a], nouns[b], rng) for a, b in zip(shown.tolist(), ground.tolist(), strict=True)]
        pictures, scene_captions = self._scene_batch(scenes, rng)
        scene_embeddings = encode_images(self.model, pictures, kept=self._kept(scenes, 0.5, rng))[:, 0]
        texts = encode_tokens(self.model, self._tokens(captions))
        scene_texts = encode_tokens(self.model, self._tokens(scene_captions))
        same = (shown[:, None] == shown[None]).to(self.sampler.device)
        region_loss = contrast(torch.cat([regions, whole]), texts, same, self.model.logit_scale)
        identity = torch.eye(scenes, dtype=torch.bool, device=same.device)
        scene_loss = contrast(scene_embeddings, scene_texts, identity, self.model.logit_scale)
        logged = {
            "region_loss": region_loss.item(),
            "scene_loss": scene_loss.item(),
            "scale": self.model.logit_scale.exp().item(),
        }
        return region_loss + 0.3 * scene_loss, logged

    @torch.no_grad()
    def evaluate(self, rounds: int = 2) -> dict[str, float]:
        """Zero-shot top-1 over all nouns: close-ups by the class token, mosaic tiles by region tokens."""
        self.model.eval()
        nouns = all_nouns()
        texts = encode_tokens(self.model, self._tokens([PHOTO_TEMPLATE.format(noun.name) for noun in nouns]))
        texts = F.normalize(texts, dim=-1)
        unseen = torch.tensor([noun.unseen for noun in nouns])
        hits: dict[str, list[Tensor]] = {}

        def count(kind: str, embeddings: Tensor, truth: Tensor) -> None:
            right = (F.normalize(embeddings, dim=-1) @ texts.T).argmax(-1).cpu() == truth
            for name, where in (("seen", ~unseen[truth]), ("unseen", unseen[truth])):
                hits.setdefault(f"{kind}_{name}", []).append(right[where].float())

        for number in range(rounds):
            rng = np.random.default_rng([self.seed, 2, number])
            for part in np.array_split(rng.permutation(len(nouns)), 5):
                close = self.sampler.sample(part, self.config.image_size, rng, (0.25, 1.0))
                count("close_up", encode_images(self.model, close.images)[:, 0], close.nouns)
            order = rng.permutation(len(nouns))[:270].reshape(-1, 10)
            mosaic = draw_mosaics(self.sampler, order, self.config, rng, scatter=False)
            embeddings = encode_images(self.model, mosaic.images, mosaic.visible)[:, 1:]
            count("big_tile", embeddings[:, :2].flatten(0, 1), mosaic.nouns[:, :2].flatten())
            count("small_tile", embeddings[:, 2:10].flatten(0, 1), mosaic.nouns[:, 2:10].flatten())
            count("ground", embeddings[:, 10:].flatten(0, 1), mosaic.nouns[:, 10:].flatten())
        self.model.train()
        return {name: torch.cat(values).mean().item() for name, values in hits.items()}


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate and save; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.pretrain.clip", description=__doc__)
    parser.add_argument("--scenes", type=Path, required=True, help="Sticker World drawn with --classes all")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of model.safetensors, log and checkpoint")
    parser.add_argument("--config", default="odise-tiny")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--text-steps", type=int, default=120, help="first steps, on captions alone")
    parser.add_argument("--mosaics", type=int, default=12, help="mosaics (ten tiles each) a step")
    parser.add_argument("--close-ups", type=int, default=10, help="close-ups a step")
    parser.add_argument("--scene-batch", type=int, default=10, help="scenes a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--evaluate-every", type=int, default=150)
    parser.add_argument("--evaluate-rounds", type=int, default=4, help="pictures of each noun in the last evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--font", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        config = preset(options.config).clip
        trainer = ClipTrainer(
            config,
            Tokenizer.from_file(str(options.tokenizer)),
            SceneBank(options.scenes),
            CloseUpSampler(options.seed, options.font, device=options.device),
            options.seed,
        )
        session = Session(
            options.out,
            {"clip": trainer.model},
            options.rate,
            options.steps,
            warmup=50,
            weight_decay=0.05,
            average=0.99,
            orthogonal=("resblocks",),
        )
        session.resume()
        for step in session.iterate("clip"):
            if step < options.text_steps:
                session.descend(trainer.text_loss(step, 100))
                continue
            loss, logged = trainer.loss(step, options.mosaics, options.close_ups, options.scene_batch)
            session.descend(loss, **logged)
            if (step + 1) % options.evaluate_every == 0:
                scores = trainer.evaluate(rounds=1)
                session.log(**scores)
                print({name: round(value, 3) for name, value in scores.items()}, flush=True)
                save_weights(options.out, trainer.model)
        session.use_average()
        scores = trainer.evaluate(rounds=options.evaluate_rounds)
        session.log(**scores)
        save_weights(options.out, trainer.model)
        write_atomically(options.out / "metrics.json", json.dumps(scores, indent=2).encode())
        print("zero-shot top-1:", {name: round(value, 3) for name, value in scores.items()})
    except OdiseError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0


def save_weights(folder: Path, model: CLIP) -> None:
    """Write the open_clip state dict as ``model.safetensors``."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, serialize(weights))


if __name__ == "__main__":
    raise SystemExit(main())
