"""Results as the bytes of an HTTP answer."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from odise_rt.files import json_bytes
from odise_rt.results import PanopticResult

if TYPE_CHECKING:
    from PIL import Image

PNG_TEXT_KEY = "odise_rt"
"""Text chunk of a panoptic PNG that holds the segments as JSON."""


def render(result: PanopticResult, pixels: np.ndarray, form: str, masks: bool, explain: bool) -> tuple[bytes, str]:
    """A result in one of :data:`odise_rt.serve.fields.FORMATS`.

    Args:
        result: of the image.
        pixels: uint8 (h, w, 3), the image that was segmented; for the overlay.
        form: the format.
        masks: whether JSON holds the masks as run-length encoding.
        explain: whether JSON holds the best names of each segment.

    Returns:
        Content and media type.
    """
    if form == "png":
        return _png(result.to_png(), json.dumps(result.to_dict(explain=explain))), "image/png"
    if form == "overlay":
        return _png(result.overlay(pixels)), "image/png"
    data = coco(result) if form == "coco" else result.to_dict(rle_masks=masks, explain=explain)
    return json_bytes(data), "application/json"


def coco(result: PanopticResult) -> dict[str, Any]:
    """A whole COCO panoptic file for one image, with the PNG in base64 beside it."""
    entry = result.to_coco_panoptic(image_id=0, file_name="image.png")
    height, width = result.size
    return {
        "images": [{"id": 0, "file_name": "image.png", "height": height, "width": width}],
        "annotations": [entry["annotation"]],
        "categories": entry["categories"],
        "panoptic_png_base64": base64.b64encode(_png(entry["png"])).decode(),
    }


def _png(picture: Image.Image, text: str | None = None) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if text is not None:
        info.add_itxt(PNG_TEXT_KEY, text, zip=True)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info, compress_level=3)
    return buffer.getvalue()
