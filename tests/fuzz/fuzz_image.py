"""Coverage-guided fuzzing of the image front, where atheris is installed.

    python -m tests.fuzz.fuzz_image -runs=10000 -rss_limit_mb=2048 -timeout=10

Anything but pixels or an ImageError is a finding; atheris stores the bytes that cause it in the working folder.
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["odise_rt", "PIL"]):
    from PIL import Image

    Image.init()  # imports the decoders, so that they are instrumented, too
    from odise_rt.errors import ImageError
    from odise_rt.preprocessing import load_image


def one_input(data: bytes) -> None:
    """Decode, or refuse."""
    with contextlib.suppress(ImageError):
        assert load_image(data, 100_000).shape[2] == 3


def main() -> None:
    """Fuzz from sound images of every format on."""
    import tempfile
    from pathlib import Path

    from tests.fuzz.mutations import encoded_images

    with tempfile.TemporaryDirectory() as corpus:
        for number, image in enumerate(encoded_images()):
            (Path(corpus) / str(number)).write_bytes(image)
        atheris.Setup([*sys.argv, corpus], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
