"""The pictures that graphs and engines are checked on: a landscape drawn from a formula, the same everywhere.

Flat colour, fine texture, smooth shading, hard edges and thin lines: what photographs are made of, with neither a
licence nor a file.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw


def landscape(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw the picture.

    Args:
        height: in pixels, at least 16.
        width: likewise.
        seed: decides where things lie in the picture.

    Returns:
        uint8 ``(height, width, 3)`` RGB.
    """
    random = np.random.default_rng(seed)
    rows = np.linspace(0.0, 1.0, height)[:, None, None]
    sky = np.array([96.0, 150.0, 220.0]) + rows * np.array([150.0, 90.0, 20.0])
    ground = np.array([60.0, 120.0, 50.0]) + 40.0 * rows
    ground = ground + random.normal(0.0, 18.0, (height, width, 1))
    horizon = 0.55 + 0.06 * np.sin(np.linspace(0.0, 6.0, width))[None, :, None]
    pixels = np.where(rows < horizon, sky, ground)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    draw = ImageDraw.Draw(image)
    left, top = (float(random.uniform(0.05, 0.2)) * width, float(random.uniform(0.2, 0.3)) * height)
    wall = (left, top, left + 0.3 * width, 0.7 * height)
    draw.rectangle(wall, fill=(170, 90, 70))
    for column in range(3):
        x = left + (0.05 + 0.09 * column) * width
        draw.rectangle((x, top + 0.08 * height, x + 0.04 * width, top + 0.16 * height), fill=(235, 220, 140))
    x, y = (float(random.uniform(0.6, 0.75)) * width, float(random.uniform(0.15, 0.25)) * height)
    draw.ellipse((x, y, x + 0.14 * width, y + 0.14 * width), fill=(250, 230, 80))
    draw.polygon([(0.45 * width, height), (0.55 * width, 0.6 * height), (0.8 * width, height)], fill=(95, 95, 100))
    for step in range(6):
        trunk = (0.72 + 0.04 * step) * width
        draw.line((trunk, 0.45 * height, trunk, 0.8 * height), fill=(70, 45, 25), width=max(1, width // 128))
        draw.ellipse(
            (trunk - 0.03 * width, 0.35 * height, trunk + 0.03 * width, 0.52 * height), fill=(30, 80 + 9 * step, 40)
        )
    return np.asarray(image)
