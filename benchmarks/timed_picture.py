"""The picture that every implementation segments, and its words: the example that comes with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from odise_rt.demo.examples import FOLDER

if TYPE_CHECKING:
    import numpy as np

PICTURE = FOLDER / "stickers.jpg"
WORDS = PICTURE.with_suffix(".txt").read_text(encoding="utf-8")
"""What a person would look for in it; its embeddings are cached before the first measurement."""


def picture(height: int, width: int) -> np.ndarray:
    """The example at another size: uint8 ``(height, width, 3)`` RGB."""
    import numpy as np
    from PIL import Image

    with Image.open(PICTURE) as image:
        return np.array(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
