"""Pictures of the things: glyphs of the Noto Color Emoji font as RGBA arrays."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from odise_rt.errors import DatasetError
from training.data.sticker_world.nouns import Noun, all_nouns

FONT_CANDIDATES = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf"),
)
STRIKE_SIZE = 109
"""The only size at which the font holds bitmaps."""


def find_font(path: Path | None = None) -> Path:
    """The font file: ``path`` if given, else the first usual place that has it.

    Raises:
        DatasetError: Nothing found; the message says how to install or name it.
    """
    candidates = FONT_CANDIDATES if path is None else (path,)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    places = ", ".join(str(candidate) for candidate in candidates)
    raise DatasetError(
        f"Noto Color Emoji font not found at {places}: install it (Debian: apt install fonts-noto-color-emoji) "
        "or name the file with --font"
    )


def _render(font: ImageFont.FreeTypeFont, noun: Noun, path: Path) -> np.ndarray:
    canvas = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((30, 30), noun.emoji.rstrip("\ufe0f"), font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 16:
        raise DatasetError(
            f"font {path} has no picture for {noun.name!r} (U+{ord(noun.emoji[0]):04X}): "
            "use a release of Noto Color Emoji from 2019 or later"
        )
    return np.asarray(canvas.crop(box))


@lru_cache(maxsize=2)
def load_sprites(font_path: Path) -> dict[str, np.ndarray]:
    """Render every thing once.

    Args:
        font_path: The Noto Color Emoji file, as :func:`find_font` returns it.

    Returns:
        Name to uint8 (h, w, 4) RGBA, not premultiplied, cropped to what is visible (at most about 136 pixels).

    Raises:
        DatasetError: The file is no usable colour font or lacks a glyph.
    """
    try:
        font = ImageFont.truetype(str(font_path), STRIKE_SIZE)
    except OSError as exc:
        raise DatasetError(f"font {font_path} cannot be used ({exc}): expected Noto Color Emoji with bitmaps") from exc
    return {noun.name: _render(font, noun, font_path) for noun in all_nouns() if noun.is_thing}
