"""What a command line names: image files, folders, patterns and videos, and a name for the results of each."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from odise_rt.errors import OptionsError
from odise_rt.preprocessing import SUFFIXES
from odise_rt.run_log import FILE_NAME as RUN_LOG

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".ogv"))
"""File name endings by which videos are told from images."""


@dataclass(frozen=True)
class Input:
    """One image or video of a run."""

    path: Path
    name: str
    """Stem of its results, unique in the run; with folders (``/`` between them) if these were searched."""

    @property
    def is_video(self) -> bool:
        """By the file's ending."""
        return _is_video(self.path)


_RESULTS = (".overlay.png", ".overlay.mp4", ".panoptic.png", ".semantic.png")
"""Endings of our own results, which lie beside the images where ``--out`` is their folder."""
_RESULT_FOLDERS = ("panoptic", "labelme")


def find_inputs(arguments: Iterable[str], recursive: bool = False, results: Path | None = None) -> list[Input]:
    """The images and videos named by files, folders and patterns.

    Args:
        arguments: files are taken as they are; of folders the images, by file ending; of patterns images and videos.
        recursive: search the folders inside folders too (not those behind symbolic links), and keep them in the names.
        results: the folder of results: if it lies inside a folder or pattern, it is not searched; nor are results that
            lie among the images taken for images.

    Raises:
        OptionsError: a folder or pattern holds nothing that can be used.
    """
    paths: list[Path] = []
    stems: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            candidates = _walk(path) if recursive else (p for p in path.iterdir() if _is_image(p))
            found = sorted(_without_results(candidates, path, results))
            if not found:
                raise OptionsError(_nothing_in(path, recursive))
            stems += [p.relative_to(path).with_suffix("").as_posix() for p in found]
        elif not path.exists() and glob.has_magic(argument):
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))  # noqa: PTH207 (absolute patterns)
            found = [p for p in matches if _is_image(p) or (_is_video(p) and p.is_file())]
            found = _without_results(found, path, results)
            if not found:
                raise OptionsError(f"nothing matches {argument!r}: expected files ending in {_endings()}")
            stems += [p.stem for p in found]
        else:
            found = [path]
            stems.append(path.stem)
        paths += found
    return [Input(path, name) for path, name in zip(paths, output_names(paths, stems), strict=True)]


def output_names(paths: Iterable[Path], stems: Iterable[str]) -> list[str]:
    """A name for the results of each input: its stem, made unique where several share one."""
    taken: set[str] = set()
    names = []
    for path, stem in zip(paths, stems, strict=True):
        candidates = [stem, f"{stem}_{path.suffix.lstrip('.')}", f"{path.parent.name}_{path.stem}"]
        number = 2
        name = next((c for c in candidates if c and c.casefold() not in taken), None)
        while name is None:
            candidate = f"{stem}_{number}"
            name = candidate if candidate.casefold() not in taken else None
            number += 1
        taken.add(name.casefold())
        names.append(name)
    return names


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, files in os.walk(folder):
        yield from (p for p in (Path(parent) / name for name in files) if _is_image(p))


def _without_results(found: Iterable[Path], searched: Path, results: Path | None) -> list[Path]:
    """The files that do not lie among the results of an earlier run."""
    found = list(found)
    if not found or results is None or not (results / RUN_LOG).exists():
        return found
    root, start = results.resolve(), searched.resolve()
    if not start.is_relative_to(root):
        return [path for path in found if not path.resolve().is_relative_to(root)]

    # The search began in the folder of results: photos and results lie side by side, but not in these folders.
    def is_result(path: Path) -> bool:
        parts = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
        return any(p in _RESULT_FOLDERS or p.endswith(".frames") for p in parts if p not in start.parts)

    return [path for path in found if not is_result(path.resolve())]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.endswith(_RESULTS) and path.is_file()


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.endswith(_RESULTS)


def _nothing_in(folder: Path, recursive: bool) -> str:
    message = f"the folder {folder} holds no image: expected files ending in {_endings()}"
    if any(p.suffix.lower() in VIDEO_SUFFIXES for p in folder.iterdir()):
        return f"{message}; name its videos one by one or by a pattern"
    return message if recursive else f"{message}; --recursive searches the folders inside it"


def _endings() -> str:
    return ".jpg, .png, .webp, .tif, …"
