"""Close-ups drawn on the fly: one thing on a texture, or a texture alone, in batches of tensors.

The frozen models need many captioned pictures of single nouns; drawing them with ``grid_sample`` from a bank of sprites
and textures costs less than reading files, and no two are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from odise_rt.prompts import PHOTO
from training.data.sticker_world.captions import stuff_phrase
from training.data.sticker_world.nouns import Noun, all_nouns, plural, with_article
from training.data.sticker_world.sprites import find_font, load_sprites
from training.data.sticker_world.textures import draw_texture

MIP_SIDES = (128, 64, 32)
LARGEST_SIDE = MIP_SIDES[0]
"""Pixels of the largest close-up."""
TEXTURE_SIDE = 256
COLLAGE_LOG_SCALES = (math.log(36 / 256), math.log(130 / 256))
"""Range of the longer side of a thing in a collage, as in the scenes, of which it is drawn log-uniformly."""


@dataclass(frozen=True)
class CloseUps:
    """A batch of close-ups."""

    images: Tensor
    """float32 (N, 3, s, s) in [0, 1]."""
    nouns: Tensor
    """int64 (N,): index into ``all_nouns()`` of what is shown."""
    ground: Tensor
    """int64 (N,): index of the texture behind it (equal to ``nouns`` for stuff)."""
    boxes: Tensor
    """float32 (N, 4): left, top, right, bottom of the shown noun as shares of the side; the whole tile for stuff."""


def caption(noun: Noun, ground: Noun, rng: np.random.Generator) -> str:
    """A caption for a close-up: mostly "a photo of a dog.", sometimes bare or with the ground."""
    names = noun.names
    name = noun.name if len(names) == 1 or rng.random() < 0.55 else names[int(rng.integers(1, len(names)))]
    draw = rng.random()
    if draw < 0.5:
        return PHOTO.format(name)  # as mask classification asks
    if draw < 0.7:
        return name
    if draw < 0.75:
        return plural(name)
    if draw < 0.85 or not noun.is_thing:
        return f"{rng.choice(['a picture of', 'a close view of', 'there is'])} {with_article(name)}"
    return f"{with_article(name)} {stuff_phrase(ground, rng)}"


def _mip(sprite: np.ndarray, side: int) -> np.ndarray:
    """A sprite fitted into a square with a clear margin; float32 (4, side, side), premultiplied."""
    picture = Image.fromarray(sprite)
    factor = (side - 4) / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    values = np.asarray(square, np.float32) / 255
    return np.concatenate([values[..., :3] * values[..., 3:], values[..., 3:]], axis=-1).transpose(2, 0, 1)


class CloseUpSampler:
    """Draws close-ups of any noun.

    Args:
        seed: Decides the bank of textures.
        font: Noto Color Emoji file, or None to search for it.
        variants: Pictures of each texture in the bank.
        device: Where the banks live and the pictures are drawn.
    """

    def __init__(
        self, seed: int, font: Path | None = None, variants: int = 20, device: torch.device | str = "cpu"
    ) -> None:
        self.nouns = all_nouns()
        self.device = torch.device(device)
        sprites = load_sprites(find_font(font))
        self.things = [index for index, noun in enumerate(self.nouns) if noun.is_thing]
        self.stuff = [index for index, noun in enumerate(self.nouns) if not noun.is_thing]
        pictures = [sprites[self.nouns[index].name] for index in self.things]
        self._mips = {
            side: torch.from_numpy(np.stack([_mip(sprite, side) for sprite in pictures])).to(self.device)
            for side in MIP_SIDES
        }
        self._shadows = {side: F.avg_pool2d(mips[:, 3:], 9, 1, 4) for side, mips in self._mips.items()}
        shapes = np.array([sprite.shape[:2] for sprite in pictures], np.float32)
        self._extent = torch.from_numpy(shapes / shapes.max(axis=1, keepdims=True)).to(self.device)
        rng = np.random.default_rng([seed, 7])
        bank = np.stack(
            [
                np.stack([draw_texture(self.nouns[i].name, rng, TEXTURE_SIDE) for _ in range(variants)])
                for i in self.stuff
            ]
        )
        full = torch.from_numpy(bank.astype(np.uint8)).permute(0, 1, 4, 2, 3)
        half = F.avg_pool2d(full.flatten(0, 1).float(), 2).to(torch.uint8)
        self._textures = (full, half.unflatten(0, full.shape[:2]))

    def _ground(self, kinds: Tensor, side: int, rng: np.random.Generator) -> Tensor:
        """Crops of textures, (N, 3, side, side) in [0, 1]; ``kinds`` index the stuff."""
        crops = []
        for kind in kinds.tolist():
            bank = self._textures[int(rng.random() < (0.5 if side > 64 else 0.75))]
            picture = bank[kind, int(rng.integers(bank.shape[1]))]
            room = picture.shape[-1] - side
            row, column = (int(rng.integers(room + 1)) for _ in range(2))
            crop = picture[:, row : row + side, column : column + side]
            crops.append(crop.flip(-1) if rng.random() < 0.5 else crop)
        return torch.stack(crops).to(self.device).float() / 255

    def _paste(
        self,
        canvas: Tensor,
        things: Tensor,
        scale: Tensor,
        centre: Tensor,
        rng: np.random.Generator,
        turn: float = 16.0,
        any_way_share: float = 0.15,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Paste one thing into each picture; returns the pictures, the things' boxes, and which pixels they hide.

        Things are turned by ``turn`` degrees (standard deviation), a share of them by anything up to a right angle.
        """
        count, side = len(canvas), canvas.shape[-1]
        wanted = 0.8 * side * float(scale.max())
        mip_side = min((mip for mip in MIP_SIDES if mip >= wanted), default=MIP_SIDES[0])
        sprites = self._mips[mip_side][things]
        angle = np.where(rng.random(count) < 1 - any_way_share, rng.normal(0, turn, count), rng.uniform(-90, 90, count))
        radians = torch.from_numpy(np.deg2rad(angle)).float().to(self.device)
        stretch = torch.from_numpy(rng.uniform(0.88, 1.14, count)).float().to(self.device)
        flip = torch.from_numpy(np.where(rng.random(count) < 0.5, -1.0, 1.0)).float().to(self.device)
        cos, sin = radians.cos(), radians.sin()
        across = flip / (scale * stretch)
        down = stretch / scale
        shift = -(2 * centre - 1)
        rows = [
            torch.stack([across * cos, across * sin, across * (cos * shift[:, 0] + sin * shift[:, 1])], -1),
            torch.stack([-down * sin, down * cos, down * (-sin * shift[:, 0] + cos * shift[:, 1])], -1),
        ]
        theta = torch.stack(rows, 1)
        grid = F.affine_grid(theta, [count, 4, side, side], align_corners=False)
        layer = F.grid_sample(sprites, grid, align_corners=False)
        offset = torch.tensor([-0.05, -0.07], device=self.device) / scale[:, None]
        shadow_grid = grid + torch.stack([offset[:, 0] * flip, offset[:, 1]], -1)[:, None, None]
        shadow = F.grid_sample(self._shadows[mip_side][things], shadow_grid, align_corners=False)
        strength = torch.from_numpy(rng.uniform(0.0, 0.5, (count, 1, 1, 1))).float().to(self.device)
        light = torch.from_numpy(rng.uniform(0.82, 1.12, (count, 1, 1, 1))).float().to(self.device)
        alpha = layer[:, 3:]
        canvas = canvas * (1 - strength * shadow)
        canvas = canvas * (1 - alpha) + (layer[:, :3] * light).clamp(max=1) * alpha.gt(0)
        half = scale[:, None] * self._extent[things].flip(-1) / 2
        turned = torch.stack(
            [half[:, 0] * cos.abs() + half[:, 1] * sin.abs(), half[:, 0] * sin.abs() + half[:, 1] * cos.abs()], -1
        )
        return canvas, torch.cat([centre - turned, centre + turned], -1).clamp(0, 1), alpha[:, 0] >= 0.5

    def sample(
        self,
        nouns: np.ndarray,
        side: int,
        rng: np.random.Generator,
        scale_range: tuple[float, float] = (0.42, 1.12),
        distractor_share: float = 0.4,
        split_share: float = 0.25,
        turn: float = 16.0,
        any_way_share: float = 0.15,
    ) -> CloseUps:
        """Draw one picture for each entry of ``nouns``.

        Args:
            nouns: Integer (N,), indices into ``all_nouns()``.
            side: Pixels of a picture, at most :data:`LARGEST_SIDE`.
            rng: Source of every choice.
            scale_range: Longer side of a thing as a share of the picture's, drawn log-uniformly.
            distractor_share: Share of pictures that show part of another thing at the border.
            split_share: Share of pictures of things with a second texture above the first.
            turn: Standard deviation of the shown things' angles, in degrees.
            any_way_share: Share of shown things turned by anything up to 90 degrees either way instead.

        Returns:
            The pictures and what they show.
        """
        count, things = len(nouns), len(self.things)
        is_thing = nouns < things
        grounds = np.where(is_thing, rng.integers(len(self.stuff), size=count), nouns - things)
        canvas = self._ground(torch.from_numpy(grounds), side, rng)
        split = rng.random(count) < split_share * is_thing
        if split.any():
            other = self._ground(torch.from_numpy(rng.integers(len(self.stuff), size=int(split.sum()))), side, rng)
            rows = torch.arange(side, device=self.device) / side
            upper = rows[None] < torch.from_numpy(rng.uniform(0.2, 0.8, (int(split.sum()), 1))).to(self.device)
            chosen = torch.from_numpy(np.flatnonzero(split)).to(self.device)
            canvas[chosen] = torch.where(upper[:, None, :, None], other, canvas[chosen])
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0], device=self.device).repeat(count, 1)
        distracted = rng.random(count) < distractor_share
        on_top = distracted & (rng.random(count) < 0.4)

        def distract(which: np.ndarray) -> None:
            rows = torch.from_numpy(np.flatnonzero(which)).to(self.device)
            if len(rows):
                around = rng.uniform(0, 2 * math.pi, len(rows))
                centre = 0.5 + rng.uniform(0.5, 0.75, (len(rows), 1)) * np.stack([np.cos(around), np.sin(around)], -1)
                size = rng.uniform(*scale_range, len(rows)) * 0.8
                thing = torch.from_numpy(rng.integers(things, size=len(rows))).to(self.device)
                place = torch.from_numpy(centre).float().to(self.device)
                canvas[rows] = self._paste(
                    canvas[rows], thing, torch.from_numpy(size).float().to(self.device), place, rng
                )[0]

        distract(distracted & ~on_top)
        shown = torch.from_numpy(np.flatnonzero(is_thing)).to(self.device)
        if len(shown):
            scale = (
                torch.from_numpy(np.exp(rng.uniform(math.log(scale_range[0]), math.log(scale_range[1]), len(shown))))
                .float()
                .to(self.device)
            )
            room = (1 - scale).abs().clamp(min=0.12)[:, None] / 2
            centre = 0.5 + room * torch.from_numpy(rng.uniform(-1, 1, (len(shown), 2))).float().to(self.device)
            thing = torch.from_numpy(nouns[is_thing]).to(self.device)
            canvas[shown], boxes[shown], _ = self._paste(canvas[shown], thing, scale, centre, rng, turn, any_way_share)
        distract(on_top)
        return CloseUps(
            self._develop(canvas, rng),
            torch.from_numpy(nouns.astype(np.int64)),
            torch.from_numpy(grounds + things),
            boxes,
        )

    def collage(
        self, things: np.ndarray, grounds: np.ndarray, side: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw small scenes: a ground, another one behind a horizon, perhaps a pond, and things anywhere on them.

        Args:
            things: Integer (N, K), indices of things in ``all_nouns()``; later ones lie on top of earlier ones.
            grounds: Integer (N, 3), indices of the textures of floor, background and pond.
            side: Pixels of a picture.
            rng: Source of every choice.

        Returns:
            Pictures (N, 3, side, side) in [0, 1], boxes of the things (N, K, 4) as shares of the side, and int64
            (N, side, side) telling which of the three grounds is seen at a pixel; -1 where a thing hides them.
        """
        count, per_picture = things.shape
        textures = torch.stack(
            [self._ground(torch.from_numpy(column - len(self.things)), side, rng) for column in grounds.T], 1
        )
        layers = self._layers(count, side, rng)
        canvas = textures.gather(1, layers[:, None, None].expand(-1, 1, 3, -1, -1))[:, 0]
        boxes = torch.zeros(count, per_picture, 4, device=self.device)
        for index in range(per_picture):
            centre = torch.from_numpy(rng.uniform(0.06, 0.94, (count, 2))).float().to(self.device)
            scale = torch.from_numpy(np.exp(rng.uniform(*COLLAGE_LOG_SCALES, count))).float().to(self.device)
            thing = torch.from_numpy(things[:, index]).to(self.device)
            canvas, boxes[:, index], hidden = self._paste(canvas, thing, scale, centre, rng)
            layers = torch.where(hidden, -1, layers)
        return self._develop(canvas, rng), boxes, layers

    def _layers(self, count: int, side: int, rng: np.random.Generator) -> Tensor:
        """Maps of the floor (0), background (1) and pond (2) of collages; int64 (N, side, side)."""
        share = (np.arange(side) + 0.5) / side
        rows, columns = share[None, :, None], share[None, None, :]

        def draw(low: float, high: float) -> np.ndarray:
            return rng.uniform(low, high, (count, 1, 1))

        horizon = draw(0.25, 0.6) + (columns - 0.5) * draw(-0.2, 0.2)
        layers = ((rows < horizon) & (draw(0, 1) < 0.8)).astype(np.int64)
        distance = ((columns - draw(0.15, 0.85)) / draw(0.2, 0.45)) ** 2 + (
            (rows - draw(0.65, 0.95)) / draw(0.1, 0.25)
        ) ** 2
        layers[(distance < 1) & (draw(0, 1) < 0.4)] = 2
        return torch.from_numpy(layers).to(self.device)

    def _develop(self, canvas: Tensor, rng: np.random.Generator) -> Tensor:
        """Light, tint and noise."""
        count = len(canvas)
        gain = rng.uniform(0.78, 1.15, (count, 1, 1, 1)) * rng.uniform(0.95, 1.05, (count, 3, 1, 1))
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(canvas.shape, generator=generator, device=self.device)
        sigma = rng.uniform(0.0, 6 / 255, (count, 1, 1, 1))
        gain_tensor, sigma_tensor = (torch.from_numpy(v).float().to(self.device) for v in (gain, sigma))
        return (canvas * gain_tensor + noise * sigma_tensor).clamp(0, 1)
