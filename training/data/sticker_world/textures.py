"""Procedural pictures of the stuff: each function fills a rectangle with grass, bricks, water and so on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Texture = Callable[[np.random.Generator, int], np.ndarray]


def _resized(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    picture = Image.fromarray(grid.astype(np.float32), mode="F")
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def value_noise(rng: np.random.Generator, size: int, cells: tuple[int, int], octaves: int = 4) -> np.ndarray:
    """Fractal noise (size, size) in about [0, 1]; ``cells`` are the coarsest grid's rows and columns."""
    total = np.zeros((size, size), np.float32)
    weight_sum = 0.0
    for octave in range(octaves):
        rows, columns = (min(size, max(2, count * 2**octave)) for count in cells)
        total += _resized(rng.random((rows, columns)), size, size) * 0.5**octave
        weight_sum += 0.5**octave
    return total / weight_sum


def _shade(weight: np.ndarray, dark: tuple[int, int, int], bright: tuple[int, int, int]) -> np.ndarray:
    """Blend two colours: 0 gives ``dark``, 1 gives ``bright``."""
    weight = np.clip(weight, 0, 1)[..., None]
    return np.asarray(dark, np.float32) * (1 - weight) + np.asarray(bright, np.float32) * weight


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    return rows, columns


def _cells(rng: np.random.Generator, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Voronoi cells: index of the nearest of ``count`` points, and how near the edge a pixel is (0 on the edge)."""
    side = size // 2
    points = rng.random((count, 2)).astype(np.float32) * side
    rows, columns = _grid(side)
    distance = (rows[..., None] - points[:, 0]) ** 2 + (columns[..., None] - points[:, 1]) ** 2
    nearest = distance.argmin(-1)
    two = np.sqrt(np.partition(distance, 1, axis=-1)[..., :2])
    edge = _resized(two[..., 1] - two[..., 0], size, size) * 2
    return np.kron(nearest, np.ones((2, 2), int)), edge


def sky(rng: np.random.Generator, size: int) -> np.ndarray:
    """Blue, paler towards the horizon, with clouds."""
    rows, _ = _grid(size)
    base = _shade(rows / size, (70, 140, 225), (175, 215, 250))
    cover = np.clip((value_noise(rng, size, (3, 2)) - rng.uniform(0.48, 0.6)) * 6, 0, 0.95)[..., None]
    return base * (1 - cover) + 252 * cover


def night_sky(rng: np.random.Generator, size: int) -> np.ndarray:
    """Nearly black blue with stars and a faint band of light."""
    base = _shade(value_noise(rng, size, (2, 2)), (6, 8, 28), (40, 36, 92))
    stars = rng.random((size, size)) > 0.9965
    base[stars] = rng.uniform(180, 255, (int(stars.sum()), 1))
    wide = np.roll(stars, 1, axis=1) & (rng.random((size, size)) > 0.5)
    base[wide] = 210
    return base


def grass(rng: np.random.Generator, size: int) -> np.ndarray:
    """Green blades."""
    blades = value_noise(rng, size, (size // 10, size // 3), 2)
    patches = value_noise(rng, size, (4, 4), 2)
    return _shade(0.75 * blades + 0.45 * patches - 0.1, (28, 84, 20), (130, 200, 66))


def water(rng: np.random.Generator, size: int) -> np.ndarray:
    """Blue-green with horizontal ripples."""
    rows, _ = _grid(size)
    bend = value_noise(rng, size, (5, 3), 3) * 30
    ripples = np.sin((rows + bend) * rng.uniform(0.45, 0.75)) * 0.5 + 0.5
    return _shade(0.55 * ripples**3 + 0.5 * value_noise(rng, size, (12, 3), 2), (12, 76, 130), (120, 205, 225))


def sand(rng: np.random.Generator, size: int) -> np.ndarray:
    """Pale yellow grains on soft dunes."""
    dunes = value_noise(rng, size, (6, 2), 2)
    grains = rng.random((size, size)).astype(np.float32)
    return _shade(0.7 * dunes + 0.3 * grains, (196, 160, 98), (248, 224, 168))


def snow(rng: np.random.Generator, size: int) -> np.ndarray:
    """White with bluish hollows and a few glints."""
    base = _shade(value_noise(rng, size, (3, 3), 3) * 1.4, (196, 212, 236), (252, 253, 255))
    base[rng.random((size, size)) > 0.995] = 255
    return base


def brick_wall(rng: np.random.Generator, size: int) -> np.ndarray:
    """Red bricks in running bond with pale mortar."""
    rows, columns = _grid(size)
    height = int(rng.integers(14, 22))
    width = height * 2 + 4
    course = (rows // height).astype(int)
    shifted = columns + (course % 2) * (width / 2) + width
    brick = (shifted // width).astype(int)
    tones = rng.random((course.max() + 2, brick.max() + 2)).astype(np.float32)
    base = _shade(
        0.8 * tones[course, brick] + 0.3 * value_noise(rng, size, (20, 20), 2) - 0.05, (120, 44, 34), (206, 100, 76)
    )
    mortar = (rows % height < 2.2) | (shifted % width < 2.2)
    base[mortar] = rng.uniform(176, 212)
    return base


def wooden_floor(rng: np.random.Generator, size: int) -> np.ndarray:
    """Brown planks side by side, with grain along them."""
    rows, columns = _grid(size)
    plank = int(rng.integers(18, 30))
    board = (rows // plank).astype(int)
    tones = rng.random(board.max() + 1).astype(np.float32)
    grain = value_noise(rng, size, (size // 3, 4), 2)
    base = _shade(0.55 * tones[board] + 0.55 * grain - 0.05, (116, 66, 28), (212, 146, 84))
    joints = rng.integers(0, size, board.max() + 1)
    base[(rows % plank < 1.5) | (np.abs(columns - joints[board]) < 1)] *= 0.5
    return base


def stone(rng: np.random.Generator, size: int) -> np.ndarray:
    """Grey cobbles with dark gaps."""
    cell, edge = _cells(rng, size, int(rng.integers(50, 80)))
    tones = rng.random(cell.max() + 1).astype(np.float32)
    base = _shade(0.6 * tones[cell] + 0.5 * value_noise(rng, size, (16, 16), 3) - 0.05, (92, 94, 98), (196, 196, 192))
    return base * (0.45 + 0.55 * np.clip(edge / 4, 0, 1))[..., None]


def leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Overlapping dark green leaves."""
    picture = Image.new("RGB", (size, size), (16, 44, 18))
    draw = ImageDraw.Draw(picture)
    for _ in range(size * size // 130):
        centre = rng.uniform(-6, size + 6, 2)
        angle = rng.uniform(0, 2 * np.pi)
        length = rng.uniform(9, 17)
        along = np.array([np.cos(angle), np.sin(angle)]) * length
        across = np.array([-np.sin(angle), np.cos(angle)]) * length * 0.36
        tone = rng.uniform(0, 1)
        colour = tuple(int(a + (b - a) * tone) for a, b in ((18, 92), (70, 150), (24, 40)))
        outline = [centre - along, centre + across, centre + along, centre - across]
        draw.polygon([(float(p[0]), float(p[1])) for p in outline], fill=colour, outline=(10, 40, 12))
    return np.asarray(picture, np.float32)


def carpet(rng: np.random.Generator, size: int) -> np.ndarray:
    """A woven pattern of diamonds in a strong colour."""
    rows, columns = _grid(size)
    period = rng.uniform(22, 36)
    diamonds = np.abs((rows / period) % 1 - 0.5) + np.abs((columns / period) % 1 - 0.5)
    main, trim = [((150, 24, 50), (236, 190, 96)), ((98, 30, 120), (240, 160, 190)), ((30, 40, 130), (220, 190, 120))][
        int(rng.integers(3))
    ]
    base = _shade((np.abs(diamonds - 0.5) < 0.11).astype(np.float32), main, trim)
    base[diamonds < 0.13] = trim
    weave = 0.85 + 0.15 * ((rows.astype(int) + columns.astype(int)) % 2)
    return base * (weave * (0.85 + 0.3 * rng.random((size, size))))[..., None]


def tiled_floor(rng: np.random.Generator, size: int) -> np.ndarray:
    """Square tiles, chequered, with joints."""
    rows, columns = _grid(size)
    tile = int(rng.integers(22, 36))
    odd = ((rows // tile + columns // tile) % 2).astype(np.float32)
    pale, dark = [
        ((236, 236, 230), (120, 150, 160)),
        ((240, 234, 214), (60, 64, 70)),
        ((226, 240, 236), (90, 170, 160)),
    ][int(rng.integers(3))]
    base = _shade(odd, dark, pale) * (0.92 + 0.12 * value_noise(rng, size, (6, 6), 2))[..., None]
    base[(rows % tile < 1.6) | (columns % tile < 1.6)] = 168
    return base


def dirt(rng: np.random.Generator, size: int) -> np.ndarray:
    """Dark brown soil with pebbles."""
    base = _shade(value_noise(rng, size, (14, 14), 3) * 1.5 - 0.25, (62, 40, 24), (136, 96, 60))
    pebbles = value_noise(rng, size, (size // 5, size // 5), 1) > 0.92
    base[pebbles] = (160, 140, 116)
    return base


def lava(rng: np.random.Generator, size: int) -> np.ndarray:
    """Black crust with glowing cracks."""
    _, edge = _cells(rng, size, int(rng.integers(24, 44)))
    glow = np.clip(1 - edge / rng.uniform(7, 12), 0, 1) + 0.25 * (value_noise(rng, size, (6, 6), 3) - 0.5)
    crust = _shade(np.clip(glow * 2, 0, 1), (40, 22, 22), (226, 62, 10))
    return crust + _shade(np.clip(glow * 2 - 1, 0, 1), (0, 0, 0), (29, 150, 40))


TEXTURES: dict[str, Texture] = {
    "sky": sky,
    "grass": grass,
    "water": water,
    "sand": sand,
    "snow": snow,
    "brick wall": brick_wall,
    "wooden floor": wooden_floor,
    "stone": stone,
    "leaves": leaves,
    "night sky": night_sky,
    "carpet": carpet,
    "tiled floor": tiled_floor,
    "dirt": dirt,
    "lava": lava,
}


def draw_texture(name: str, rng: np.random.Generator, size: int) -> np.ndarray:
    """Fill a square with the stuff called ``name``.

    Returns:
        float32 (size, size, 3) in [0, 255].
    """
    scale = rng.uniform(0.92, 1.08)
    tint = rng.uniform(0.94, 1.06, 3)
    return np.clip(TEXTURES[name](rng, size) * scale * tint, 0, 255).astype(np.float32)
