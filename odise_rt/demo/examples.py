"""Example pictures of the page: those of a folder, else the one that comes with the package.

The words for a picture ``boat.jpg`` are in ``boat.txt`` or ``boat_vocabulary.txt`` beside it, if there is such a file.
"""

from __future__ import annotations

import base64
import io
import logging
from dataclasses import dataclass
from pathlib import Path

from odise_rt.errors import ImageError, OdiseError, OptionsError
from odise_rt.inputs import is_image
from odise_rt.preprocessing import load_image
from odise_rt.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "assets" / "examples"
MAX_EXAMPLES = 12
_THUMBNAIL = 160
_WORD_FILES = ("{}.txt", "{}_vocabulary.txt")


@dataclass(frozen=True)
class Example:
    """A picture that visitors may take."""

    path: Path
    words: str | None
    """What goes into the field for words."""
    thumbnail: str
    """A small JPEG as a ``data:`` address."""

    @property
    def title(self) -> str:
        """The file's name as a person would write it."""
        return self.path.stem.replace("_", " ").replace("-", " ")


def find_examples(folder: Path | None) -> list[Example]:
    """The first ``MAX_EXAMPLES`` pictures of a folder by name; ``None``: the package's own.

    Pictures that cannot be used are left out, with a warning.

    Raises:
        OptionsError: the folder holds no picture that can be used, or words of one cannot be used.
    """
    root = FOLDER if folder is None else folder
    if not root.is_dir():
        raise OptionsError(f"--examples {root} is not a folder: name one that holds pictures")
    found: list[Example] = []
    for path in sorted(filter(is_image, root.iterdir())):
        try:
            found.append(_read(path))
        except ImageError as exc:
            logger.warning("left out of the examples: %s", exc)
        if len(found) == MAX_EXAMPLES:
            break
    if not found:
        raise OptionsError(f"--examples {root} holds no picture that can be used: expected .jpg, .png, .webp, …")
    return found


def _read(path: Path) -> Example:
    from PIL import Image

    image = Image.fromarray(load_image(path))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Example(path, _words(path), f"data:image/jpeg;base64,{data}")


def _words(picture: Path) -> str | None:
    for pattern in _WORD_FILES:
        path = picture.with_name(pattern.format(picture.stem))
        if path.is_file():
            try:
                vocabulary = Vocabulary.load(path)
            except OdiseError as exc:
                raise OptionsError(f"the words of the example {picture.name} cannot be used: {exc}") from exc
            return as_text(vocabulary)
    return None


def as_text(vocabulary: Vocabulary) -> str:
    """A vocabulary in the syntax of :meth:`Vocabulary.parse`, one class a line."""
    lines = []
    for entry in vocabulary:
        text = ", ".join(entry.words)
        # The kind is written only where parsing would guess another one.
        guessed = Vocabulary.from_lists([entry.words])[0].isthing
        lines.append(text if guessed == entry.isthing else f"{'thing' if entry.isthing else 'stuff'}: {text}")
    return "\n".join(lines)
