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
    """Small scenes with six regions: four things, then the upper and the lower ground.

    The regions of the ground hold every patch that is not well inside a thing's box, small things altogether: a real
    mask of a meadow touches the patches of the flowers in it, and still means the meadow.
    """
    things = np.stack([rng.choice(len(sampler.things), 4, replace=False) for _ in range(count)])
    grounds = np.stack([rng.choice(sampler.stuff, 2, replace=False) for _ in range(count)])
    images, boxes, horizon = sampler.collage(things, grounds, config.image_size, rng)
    grid = config.image_size // config.patch_size
    left, top, right, bottom = (boxes.cpu() * grid).unbind(-1)
    cell = torch.arange(grid)

    def inside(shrink: float) -> Tensor:
        across = (cell + 1 > left[..., None] + shrink) & (cell < right[..., None] - shrink)
        down = (cell + 1 > top[..., None] + shrink) & (cell < bottom[..., None] - shrink)
        return down[..., :, None] & across[..., None, :]

    thing_regions = inside(0.0)
    free = ~inside(1.5).any(1)
    upper = (cell[None] < (horizon.cpu() * grid)[:, None])[:, :, None].expand(-1, -1, grid)
    lower = (cell[None] + 1 > (horizon.cpu() * grid)[:, None])[:, :, None].expand(-1, -1, grid)
    visible = torch.cat([thing_regions, (upper & free)[:, None], (lower & free)[:, None]], 1)
    empty = ~visible.flatten(2).any(-1)
    visible[empty] = True
    nouns = torch.from_numpy(np.concatenate([things, grounds], 1))
    nouns[empty] = torch.from_numpy(grounds[:, 1:]).expand(-1, 6)[empty]
    if scatter:
        kept = visible & torch.from_numpy(rng.random(tuple(visible.shape)) < rng.uniform(0.5, 1.0, (count, 6, 1, 1)))
        visible = torch.where(kept.flatten(2).any(-1)[..., None, None], kept, visible)
    ground = torch.from_numpy(grounds[:, 1:]).expand(-1, 6).contiguous()
    return Regions(images, visible.flatten(2).to(sampler.device), nouns, ground)
