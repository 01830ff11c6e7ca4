"""The files of one image, and the documents of a whole run."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from odise_rt.errors import OptionsError
from odise_rt.files import atomic_writer, json_bytes, write_json

if TYPE_CHECKING:
    from PIL import Image

    from odise_rt.preprocessing import ImageLike
    from odise_rt.results import PanopticResult
    from odise_rt.visualize import Colour
    from odise_rt.vocabulary import Vocabulary

FORMATS = ("overlay", "json", "rle", "png", "coco", "semantic", "labelme", "cvat")
"""What can be written. ``coco`` and ``cvat`` also give one document of the whole run."""
COCO_FILE, CVAT_FILE, FAILED_FILE = "panoptic.json", "cvat.xml", "failed.json"


@dataclass
class Written:
    """The files of one image, and its entries in documents of the whole run."""

    files: dict[str, int] = field(default_factory=dict)
    """Path inside the folder of results to size in bytes."""
    coco: dict[str, Any] | None = None
    """Entry of ``panoptic.json``'s annotations, with the image's ``image_file``, ``height`` and ``width``; its
    ``image_id`` is the name until :func:`write_coco` numbers it."""
    cvat: str | None = None
    """Entry of ``cvat.xml``, without the image's number."""


def parse_formats(text: str) -> tuple[str, ...]:
    """Formats separated by commas, each once.

    Raises:
        OptionsError: one is unknown, or there is none.
    """
    formats = [f.strip() for f in text.split(",") if f.strip()]
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        raise OptionsError(f"--format has {', '.join(unknown) or 'nothing'}: expected some of {', '.join(FORMATS)}")
    return tuple(dict.fromkeys(formats))


def check_classes(formats: Iterable[str], classes: int) -> None:
    """Check that results with so many classes can be written.

    Raises:
        OptionsError: a format cannot hold so many.
    """
    if "semantic" in formats and classes > 65_536:
        raise OptionsError(
            f"a semantic PNG holds up to 65,536 classes, the vocabulary has {classes:,}: leave out the format "
            "'semantic', or use fewer words"
        )


def write_result(
    result: PanopticResult,
    pixels: ImageLike,
    image: Path,
    folder: Path,
    name: str,
    formats: Iterable[str],
    *,
    explain: bool = False,
    tolerance: float = 1.0,
    colours: Sequence[Colour] | None = None,
    extra: Mapping[str, Any] | None = None,
    file_name: str = "",
) -> Written:
    """Write the files of one image, each atomically.

    Args:
        result: the image's result.
        pixels: the image, for the overlay.
        image: its file, which annotations name.
        folder: where to write.
        name: stem of the new files; may hold ``/``.
        formats: some of :data:`FORMATS`.
        explain: add the best names of each segment to the JSON.
        tolerance: how far in pixels polygons may leave the masks' outlines.
        colours: one for each segment of the overlay; ``None``: by their classes.
        extra: more entries for the JSON.
        file_name: name of the image in documents about several; empty: its own name in the folder of ``name``.
    """
    written = Written()
    file_name = file_name or PurePosixPath(name).with_name(image.name).as_posix()

    def save(relative: str, write: Callable[[Path], None]) -> None:
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        written.files[relative] = path.stat().st_size

    for kind in formats:
        if kind == "overlay":
            picture = result.overlay(pixels, colours=colours)
            save(f"{name}.overlay.png", lambda p, picture=picture: _save_png(picture, p))  # type: ignore[misc]
        elif kind == "json":
            save(f"{name}.json", lambda p: write_json(p, result.to_dict(explain=explain) | dict(extra or {})))
        elif kind == "rle":
            save(f"{name}.rle.json", lambda p: write_json(p, result.to_rle()))
        elif kind == "png":
            save(f"{name}.panoptic.png", result.save_png)
        elif kind == "semantic":
            save(f"{name}.semantic.png", lambda p: _save_semantic(result, p))
        elif kind == "labelme":
            save(f"labelme/{name}.json", lambda p: write_json(p, result.to_labelme(_from(p, image), tolerance)))
        elif kind == "cvat":
            written.cvat = result.to_cvat(file_name, tolerance)
        elif kind == "coco":
            # Which number an image has is only known of the whole run: until then it is called by its name.
            entry = result.coco_annotation(image_id=name, file_name=f"{name}.png")
            save(f"panoptic/{name}.png", result.save_png)
            size = {"height": result.size[0], "width": result.size[1]}
            written.coco = entry | {"image_file": file_name} | size
    return written


def coco_image_ids(names: Iterable[str]) -> dict[str, int]:
    """Numbers for images in COCO files, whose readers take no text.

    An image whose file is called by a number alone (``000000000139.jpg``) has that number, as in COCO itself, unless it
    is another one's, too; all others have the numbers from 1 on that are free, in their order.

    Args:
        names: of the images, each once: paths without the files' endings.
    """
    stems = {name: PurePosixPath(name).name for name in names}
    digits = {name: int(stem) for name, stem in stems.items() if re.fullmatch(r"[0-9]{1,15}", stem)}
    times = Counter(digits.values())
    own = {name: number for name, number in digits.items() if times[number] == 1}
    taken = set(own.values())
    free = (number for number in itertools.count(1) if number not in taken)
    return {name: own[name] if name in own else next(free) for name in stems}


def write_coco(folder: Path, entries: Callable[[], Iterable[dict[str, Any]]], vocabulary: Vocabulary) -> None:
    """Write ``panoptic.json`` of a whole run, one entry in memory at a time.

    Args:
        folder: where to write.
        entries: gives the :attr:`Written.coco` of every image, anew on each call.
        vocabulary: the classes of the results.
    """
    from odise_rt.results import coco_categories

    ids = coco_image_ids(entry["image_id"] for entry in entries())

    def image(entry: dict[str, Any]) -> dict[str, Any]:
        size = {"height": entry["height"], "width": entry["width"]}
        return {"id": ids[entry["image_id"]], "file_name": entry["image_file"], **size}

    def annotation(entry: dict[str, Any]) -> dict[str, Any]:
        return {"image_id": ids[entry["image_id"]]} | {key: entry[key] for key in ("file_name", "segments_info")}

    with atomic_writer(folder / COCO_FILE) as file:
        file.write(b'{"images": [')
        _write_items(file, map(image, entries()))
        file.write(b'],\n"annotations": [')
        _write_items(file, map(annotation, entries()))
        file.write(b'],\n"categories": ' + json_bytes(coco_categories(vocabulary)) + b"}\n")


def write_cvat(folder: Path, entries: Iterable[str], vocabulary: Vocabulary) -> None:
    """Write ``cvat.xml``, CVAT's "images 1.1" format, of a whole run; ``entries`` are :attr:`Written.cvat`."""
    from odise_rt.interchange import cvat_document

    with atomic_writer(folder / CVAT_FILE) as file:
        for part in cvat_document(entries, vocabulary):
            file.write(part.encode())


def _write_items(file: IO[bytes], items: Iterable[dict[str, Any]]) -> None:
    for number, item in enumerate(items):
        file.write((b",\n" if number else b"\n") + json_bytes(item))


def _from(target: Path, image: Path) -> str:
    """The image's path as seen from a file of results."""
    import os

    try:
        return Path(os.path.relpath(image.resolve(), target.parent.resolve())).as_posix()
    except ValueError:  # another drive
        return image.resolve().as_posix()


def _save_png(picture: Image.Image, path: Path) -> None:
    with atomic_writer(path) as file:
        picture.save(file, format="PNG")


def _save_semantic(result: PanopticResult, path: Path) -> None:
    import numpy as np
    from PIL import Image

    assert result.semantic_map is not None, "the options asked for it"
    dtype = np.uint8 if len(result.vocabulary) <= 256 else np.uint16
    _save_png(Image.fromarray(result.semantic_map.astype(dtype)), path)
