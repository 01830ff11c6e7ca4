"""Damage for fuzzing: encoded images, manifests and request bodies, cut, flipped, spliced and overwritten."""

from __future__ import annotations

import functools
import io
import json
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image, features

from tests.odise_rt.fake_bundle import colour_image

SIZES = bytes.fromhex("00 01 7f 80 ff") + b"\n\r (["
"""Bytes that parsers trip over more often than over others."""


@functools.cache
def encoded_images() -> tuple[bytes, ...]:
    """Small sound images in every format that can be written here."""
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("PNG", "1", {}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "RGB", {"compression": "jpeg"}),
        ("TIFF", "L", {"compression": "packbits"}),
        ("PPM", "RGB", {}),
        ("TGA", "RGBA", {"compression": "tga_rle"}),
        ("PCX", "RGB", {}),
    ]
    for name, kind in (("webp", "WEBP"), ("avif", "AVIF"), ("jpg_2000", "JPEG2000")):
        if features.check(name):
            kinds.append((kind, "RGB", {}))
    images = []
    for kind, mode, options in kinds:
        pixels = colour_image(24, 33)
        picture = Image.fromarray(pixels)
        picture = Image.fromarray(pixels[:, :, 0].astype(np.uint16) << 8) if mode == "I;16" else picture.convert(mode)
        buffer = io.BytesIO()
        picture.save(buffer, format=kind, **options)
        images.append(buffer.getvalue())
    return tuple(images)


@st.composite
def damaged(draw: st.DrawFn, sources: tuple[bytes, ...]) -> bytes:
    """A source with up to six pieces of damage."""
    data = bytearray(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(0, 6))):
        if not data:
            break
        at = draw(st.one_of(st.integers(0, min(64, len(data) - 1)), st.integers(0, len(data) - 1)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            data[at] = draw(st.sampled_from(SIZES))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            end = min(len(data), at + draw(st.integers(1, 40)))
            data[at:end] = data[at:end] * draw(st.integers(0, 3))
        elif kind == 4:
            number = draw(st.sampled_from([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**31, 100_000]))
            data[at : at + 4] = number.to_bytes(4, draw(st.sampled_from(["big", "little"])))
        else:
            other = draw(st.sampled_from(sources))
            data[at:at] = other[: draw(st.integers(0, len(other)))]
    return bytes(data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["../x", "/etc/passwd", "onnx/../../x", "C:\\x", "a\0b", "0" * 64, "float32", "N", "s/0", "s/-1", "//"]
    ),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged_manifest(draw: st.DrawFn, sound: str) -> bytes:
    """A manifest with values replaced, removed, repeated or added, or its text damaged."""
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged((sound.encode(),)))
    manifest: Any = json.loads(sound)
    for _ in range(draw(st.integers(1, 4))):
        here: Any = manifest
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(here[key], dict | list) and here[key] and draw(st.integers(0, 3)):
                here = here[key]
                continue
            kind = draw(st.integers(0, 3))
            if kind == 0:
                del here[key]
            elif kind == 1 and isinstance(here, dict):
                here[draw(st.text(max_size=8))] = here[key]
            elif kind == 1:
                here.append(here[key])
            else:
                here[key] = draw(JSON)
            break
    return json.dumps(manifest).encode()
