"""``odise-rt segment``: images in, result files out, one image at a time."""

from __future__ import annotations

import argparse
import functools
import glob
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odise_rt.errors import ImageError, OptionsError
from odise_rt.files import atomic_writer, write_json

if TYPE_CHECKING:
    from odise_rt.results import PanopticResult
    from odise_rt.segmenter import Segmenter
    from odise_rt.vocabulary import Vocabulary

FORMATS = ("overlay", "json", "rle", "png", "coco", "semantic")
_PROMPTS_WORTH_A_BAR = 256


@dataclass
class Outcome:
    """What became of the images of one run."""

    done: list[dict[str, Any]] = field(default_factory=list)
    """For each image: its file, the files written, and :meth:`PanopticResult.to_dict`."""
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """Images that could not be used, and why."""


def segment_images(args: argparse.Namespace) -> Outcome:
    """Run the command with parsed arguments; images that cannot be read do not stop the others."""
    from tqdm import tqdm

    from odise_rt.options import SegmentOptions
    from odise_rt.segmenter import Segmenter
    from odise_rt.vocabulary import Vocabulary

    formats = _formats(args.format)
    images = list(find_images(args.images))
    names = output_names(images)
    vocabulary = functools.reduce(operator.add, [Vocabulary.load(text) for text in args.vocab])
    given = {
        name: getattr(args, name)
        for name in (
            "object_mask_threshold",
            "overlap_threshold",
            "clip_weight_seen",
            "clip_weight_unseen",
            "unknown",
            "short_edge",
            "long_edge",
            "max_pixels",
        )
        if getattr(args, name) is not None
    }
    options = SegmentOptions(outputs=("semantic",) if "semantic" in formats else ("panoptic",), **given)
    args.out.mkdir(parents=True, exist_ok=True)

    outcome = Outcome()
    annotations: list[dict[str, Any]] = []
    with Segmenter.load(
        args.bundle,
        device=args.device,
        threads=args.threads,
        verify=not args.no_verify,
        low_memory=args.low_memory,
    ) as segmenter:
        _prepare_words(segmenter, vocabulary, quiet=args.quiet)
        bar = tqdm(total=len(images), unit="image", disable=args.quiet or len(images) == 1)
        with bar:
            for path, name in zip(images, names, strict=True):
                try:
                    result = segmenter.segment(path, vocabulary, options)
                    written = write_result(result, path, args.out, name, formats, annotations, args.explain)
                except ImageError as exc:
                    outcome.failed.append((path, str(exc)))
                else:
                    outcome.done.append({"image": str(path), "files": written, **result.to_dict(explain=args.explain)})
                bar.update()
    if annotations:
        _write_coco(args.out, annotations, vocabulary if options.unknown is None else vocabulary.with_unknown)
    return outcome


def find_images(arguments: Iterable[str]) -> Iterator[Path]:
    """The images named by files, folders (their direct contents, by file ending) and patterns.

    Raises:
        OptionsError: a folder or pattern holds no image.
    """
    from odise_rt.preprocessing import SUFFIXES

    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found:
                raise OptionsError(f"the folder {path} holds no image: expected files ending in {_endings()}")
            yield from found
        elif not path.exists() and glob.has_magic(argument):
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))  # noqa: PTH207 (absolute patterns)
            found = [p for p in matches if p.suffix.lower() in SUFFIXES and p.is_file()]
            if not found:
                raise OptionsError(f"nothing matches {argument!r}: expected files ending in {_endings()}")
            yield from found
        else:
            yield path


def output_names(images: Iterable[Path]) -> list[str]:
    """A name for the results of each image: its stem, made unique where images of several folders share one."""
    taken: set[str] = set()
    names = []
    for path in images:
        candidates = [path.stem, f"{path.stem}_{path.suffix.lstrip('.')}", f"{path.parent.name}_{path.stem}"]
        number = 2
        name = next((c for c in candidates if c and c.casefold() not in taken), None)
        while name is None:
            candidate = f"{path.stem}_{number}"
            name = candidate if candidate.casefold() not in taken else None
            number += 1
        taken.add(name.casefold())
        names.append(name)
    return names


def write_result(
    result: PanopticResult,
    image: Path,
    folder: Path,
    name: str,
    formats: Iterable[str],
    annotations: list[dict[str, Any]],
    explain: bool = False,
) -> list[str]:
    """Write the files of one image, each atomically.

    Args:
        result: of the image.
        image: its file, for the overlay.
        folder: where to write.
        name: stem of the new files.
        formats: of :data:`FORMATS`.
        annotations: gets the entry of ``panoptic.json`` when ``coco`` is among them.
        explain: add the best names of each segment to the JSON.

    Returns:
        The files written.
    """
    written = []

    def save(path: Path, write: Callable[[Path], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        written.append(str(path))

    for kind in formats:
        if kind == "overlay":
            picture = result.overlay(image)
            save(folder / f"{name}.overlay.png", lambda p, picture=picture: _save_png(picture, p))  # type: ignore[misc]
        elif kind == "json":
            save(folder / f"{name}.json", lambda p: write_json(p, result.to_dict(explain=explain)))
        elif kind == "rle":
            save(folder / f"{name}.rle.json", lambda p: write_json(p, result.to_rle()))
        elif kind == "png":
            save(folder / f"{name}.panoptic.png", result.save_png)
        elif kind == "semantic":
            save(folder / f"{name}.semantic.png", lambda p: _save_semantic(result, p))
        elif kind == "coco":
            entry = result.to_coco_panoptic(image_id=name, file_name=f"{name}.png")
            save(folder / "panoptic" / f"{name}.png", result.save_png)
            annotations.append(entry["annotation"] | {"height": result.size[0], "width": result.size[1]})
    return written


def _save_png(picture: Any, path: Path) -> None:
    with atomic_writer(path) as file:
        picture.save(file, format="PNG")


def _save_semantic(result: PanopticResult, path: Path) -> None:
    import numpy as np
    from PIL import Image

    assert result.semantic_map is not None, "the options asked for it"
    dtype = np.uint8 if len(result.vocabulary) <= 256 else np.uint16
    _save_png(Image.fromarray(result.semantic_map.astype(dtype)), path)


def _write_coco(folder: Path, annotations: list[dict[str, Any]], vocabulary: Vocabulary) -> None:
    from odise_rt.results import coco_categories

    images = [
        {"id": a["image_id"], "file_name": a["file_name"], "height": a.pop("height"), "width": a.pop("width")}
        for a in annotations
    ]
    document = {"images": images, "annotations": annotations, "categories": coco_categories(vocabulary)}
    write_json(folder / "panoptic.json", document)


def _prepare_words(segmenter: Segmenter, vocabulary: Vocabulary, quiet: bool) -> None:
    from tqdm import tqdm

    bars: dict[int, Any] = {}

    def show(done: int, total: int) -> None:
        if total < _PROMPTS_WORTH_A_BAR or quiet:
            return
        bar = bars.setdefault(total, tqdm(total=total, unit="word", desc="encoding words") if not bars else None)
        if bar is not None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()
                bars.clear()

    segmenter.prepare(vocabulary, show)


def _formats(text: str) -> list[str]:
    formats = [f.strip() for f in text.split(",") if f.strip()]
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        raise OptionsError(f"--format has {', '.join(unknown) or 'nothing'}: expected some of {', '.join(FORMATS)}")
    return list(dict.fromkeys(formats))


def _endings() -> str:
    return ".jpg, .png, .webp, .tif, …"
