"""Pictures made of known parts, for training CLIP to name regions: mosaics of close-ups, and collages.

A region is the set of patches that a region token may attend to. The parts are put together here, so what each region
shows is known without any annotation of a data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import ClipConfig
from training.pretrain.closeups import CloseUps, CloseUpSampler

COLLAGE_THINGS = 6
COLLAGE_LEAST_SHOWN = 0.35
"""Share of a thing that others on top must leave for it to be named, as in the scenes."""
ELLIPSE_EXPONENT = 2.5
"""Above 2: sprites fill more of the corners of their boxes than an ellipse does."""


@dataclass(frozen=True)
class Regions:
    """Pictures put together from sprites and textures, and the regions of which the parts are known."""

    images: Tensor
    """(N, 3, S, S)."""
    visible: Tensor
    """bool (N, Q, P): patches that each region token sees."""
    nouns: Tensor
    """int64 (N, Q): noun of each region."""
    ground: Tensor
    """int64 (N, Q): texture behind it."""


def draw_mosaics(
    sampler: CloseUpSampler, nouns: np.ndarray, config: ClipConfig, rng: np.random.Generator, scatter: bool = True
) -> Regions:
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
    return Regions(images, visible.flatten(2).to(sampler.device), shown, ground)


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


def draw_collages(
    sampler: CloseUpSampler, count: int, config: ClipConfig, rng: np.random.Generator, scatter: bool = True
) -> Regions:
    """Small scenes with nine regions: six things, then floor, background and pond.

    Of a thing its box is used, and with it, roughly, the ellipse that it fills; its outline only says what ground it
    hides. As with real masks, a region holds every patch that it touches, so a ground's region holds the rims of the
    things that stand on it, and small things altogether: a mask of a meadow touches the patches of the flowers in it,
    and still means the meadow. A region of which things on top leave too little, or that is not there, shows the floor
    instead.

    Args:
        sampler: Draws the pictures.
        count: How many.
        config: Sizes of picture and patch.
        rng: Source of every choice.
        scatter: Hide a random part of half the regions' patches, as poor masks do.
    """
    things = np.stack([rng.choice(len(sampler.things), COLLAGE_THINGS, replace=False) for _ in range(count)])
    grounds = np.stack([rng.choice(sampler.stuff, 3, replace=False) for _ in range(count)])
    images, boxes, layers = sampler.collage(things, grounds, config.image_size, rng)
    fine = 4 * (config.image_size // config.patch_size)  # four points a patch, each way
    points = (torch.arange(fine, device=boxes.device) + 0.5) / fine
    left, top, right, bottom = boxes.clamp(0, 1)[..., None].unbind(-2)
    across = ((2 * points - left - right) / (right - left).clamp(min=1e-3)).abs() ** ELLIPSE_EXPONENT
    down = ((2 * points - top - bottom) / (bottom - top).clamp(min=1e-3)).abs() ** ELLIPSE_EXPONENT
    inside = down[..., :, None] + across[..., None, :] < 1  # (N, 6, fine, fine)
    rank = torch.arange(1, COLLAGE_THINGS + 1, device=boxes.device)[:, None, None]
    on_top = (inside * rank).amax(1)  # 0 where no thing lies
    left_over = on_top[:, None] == rank
    shown_share = left_over.flatten(2).sum(-1) / inside.flatten(2).sum(-1).clamp(min=1)
    things_touched = F.max_pool2d(left_over.float(), 4) > 0
    free = layers[:, None] == torch.arange(3, device=boxes.device)[:, None, None]
    touched = torch.cat([things_touched, F.max_pool2d(free.float(), config.patch_size) > 0], 1)
    clear = torch.cat([shown_share >= COLLAGE_LEAST_SHOWN, free.flatten(2).any(-1)], 1)
    floor = COLLAGE_THINGS
    clear[:, floor] = True
    visible = torch.where(clear[..., None, None], touched, touched[:, floor : floor + 1]).cpu()
    visible[~visible.flatten(2).any(-1)] = True  # things hide the whole floor
    nouns = torch.from_numpy(np.concatenate([things, grounds], 1))
    nouns = torch.where(clear.cpu(), nouns, nouns[:, floor : floor + 1])
    if scatter:
        kept = torch.from_numpy(rng.random(tuple(visible.shape)) < rng.uniform(0.5, 1.5, (*nouns.shape, 1, 1)))
        holed = visible & kept
        visible = torch.where(holed.flatten(2).any(-1)[..., None, None], holed, visible)
    ground = torch.from_numpy(grounds[:, :1]).expand(-1, COLLAGE_THINGS + 3).contiguous()
    return Regions(images, visible.flatten(2).to(sampler.device), nouns, ground)
