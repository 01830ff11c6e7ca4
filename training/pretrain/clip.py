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

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP
from safetensors.torch import save as serialize
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from odise_rt.command_line import CommandParser, command, real_number, whole_number
from odise_rt.errors import CheckpointError
from odise_rt.prompts import PHOTO
from training.checkpoints.own_format import load_checkpoint, read_tokenizer
from training.config import ClipConfig, preset
from training.data.sticker_world.nouns import all_nouns
from training.models.frozen import build_clip
from training.pretrain.clip_forward import encode_images, encode_tokens
from training.pretrain.closeups import CloseUpSampler, caption
from training.pretrain.regions import draw_collages, draw_mosaics
from training.pretrain.scene_bank import SceneBank
from training.pretrain.session import Session, add_world_arguments, parse_options, write_atomically
from training.pretrain.tokenizer import encode_texts, with_markers

WEIGHTS_FILE = "model.safetensors"


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

    def loss(
        self, step: int, mosaics: int, collages: int, close_ups: int, scenes: int
    ) -> tuple[Tensor, dict[str, float]]:
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
        collage = draw_collages(self.sampler, collages, self.config, rng)
        regions = [
            encode_images(self.model, part.images, part.visible)[:, 1:].flatten(0, 1) for part in (mosaic, collage)
        ]
        whole = encode_images(self.model, close.images, kept=self._kept(close_ups, 0.5, rng))[:, 0]
        shown = torch.cat([mosaic.nouns.flatten(), collage.nouns.flatten(), close.nouns])
        ground = torch.cat([mosaic.ground.flatten(), collage.ground.flatten(), close.ground])
        captions = [caption(nouns[a], nouns[b], rng) for a, b in zip(shown.tolist(), ground.tolist(), strict=True)]
        pictures, scene_captions = self._scene_batch(scenes, rng)
        scene_embeddings = encode_images(self.model, pictures, kept=self._kept(scenes, 0.5, rng))[:, 0]
        texts = encode_tokens(self.model, self._tokens(captions))
        scene_texts = encode_tokens(self.model, self._tokens(scene_captions))
        same = (shown[:, None] == shown[None]).to(self.sampler.device)
        region_loss = contrast(torch.cat([*regions, whole]), texts, same, self.model.logit_scale)
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
        texts = encode_tokens(self.model, self._tokens([PHOTO.format(noun.name) for noun in nouns]))
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
            collage = draw_collages(self.sampler, 25, self.config, rng, scatter=False)
            embeddings = encode_images(self.model, collage.images, collage.visible)[:, 1:]
            is_thing = collage.nouns < len(self.sampler.things)
            count("collage_thing", embeddings[is_thing], collage.nouns[is_thing])
            count("collage_stuff", embeddings[~is_thing], collage.nouns[~is_thing])
        self.model.train()
        return {name: torch.cat(values).mean().item() for name, values in hits.items()}


@command("the same command goes on from the last saved state")
def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate and save; returns the exit status."""
    parser = CommandParser(prog="python -m training.pretrain.clip", description=__doc__)
    add_world_arguments(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of training.pretrain.tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of model.safetensors, log and checkpoint.")
    parser.add_argument("--steps", type=whole_number(1), default=2200, help="Training steps in all.")
    parser.add_argument("--text-steps", type=whole_number(0), default=120, help="First steps, on captions alone.")
    parser.add_argument("--mosaics", type=whole_number(1), default=7, help="Mosaics (twelve regions each) a step.")
    parser.add_argument("--collages", type=whole_number(1), default=8, help="Collages (nine regions each) a step.")
    parser.add_argument("--close-ups", type=whole_number(1), default=8, help="Close-ups a step.")
    parser.add_argument("--scene-batch", type=whole_number(1), default=8, help="Scenes a step.")
    parser.add_argument(
        "--start", type=Path, help="Checkpoint folder whose CLIP is trained further. Default: a fresh one."
    )
    parser.add_argument("--freeze-text", action="store_true", help="Train the image tower only, against fixed texts.")
    parser.add_argument("--rate", type=real_number(0, above=True), default=2e-3, help="Peak learning rate.")
    parser.add_argument("--evaluate-every", type=whole_number(1), default=150, help="Steps between evaluations.")
    parser.add_argument(
        "--evaluate-rounds", type=whole_number(1), default=4, help="Pictures of each noun in the last evaluation."
    )
    options = parse_options(parser, arguments)
    model_config = preset(options.config)
    config = model_config.clip
    trainer = ClipTrainer(
        config,
        with_markers(read_tokenizer(options.tokenizer), model_config, options.tokenizer),
        SceneBank(options.scenes, config.image_size),
        CloseUpSampler(options.seed, options.font, device=options.device),
        options.seed,
    )
    if options.start is not None:
        start_from(options.start, trainer.model, options.tokenizer)
    if options.freeze_text:
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(name.startswith("visual."))
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
        loss, logged = trainer.loss(step, options.mosaics, options.collages, options.close_ups, options.scene_batch)
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
    return 0


def start_from(checkpoint: Path, model: CLIP, tokenizer: Path) -> None:
    """Copy the CLIP of a checkpoint of this repository.

    Raises:
        CheckpointError: It has other shapes, or another tokenizer, so that its texts would be read wrongly.
    """
    loaded = load_checkpoint(checkpoint)
    if json.loads(loaded.tokenizer_json) != json.loads(read_tokenizer(tokenizer)):
        raise CheckpointError(
            f"{checkpoint} has another tokenizer than {tokenizer}: name the one inside the checkpoint"
        )
    try:
        model.load_state_dict(loaded.model.clip.state_dict())
    except RuntimeError as exc:
        raise CheckpointError(f"the CLIP of {checkpoint} does not fit --config: {exc}") from exc


def save_weights(folder: Path, model: CLIP) -> None:
    """Write the open_clip state dict as ``model.safetensors``."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, serialize(weights))


if __name__ == "__main__":
    raise SystemExit(main())
