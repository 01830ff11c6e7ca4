"""A workbench on the colour bundle, and encoded pictures for it."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from odise_rt import Segmenter
from odise_rt.demo.session import Workbench


@pytest.fixture
def bench(segmenter: Segmenter) -> Workbench:
    return Workbench(segmenter)


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Encodes an array as an image file, PNG unless told otherwise."""

    def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=kind)
        return buffer.getvalue()

    return encoded
