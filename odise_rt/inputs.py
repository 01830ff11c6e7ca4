"""What a command line names: image files, folders, patterns and videos, and a name for the results of each."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from odise_rt.errors import OptionsError
from odise_rt.preprocessing import SUFFIXES

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
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(arguments: Iterable[str], recursive: bool = False) -> list[Input]:
    """The images and videos named by files, folders and patterns.

    Args:
        arguments: files are taken as they are; of folders the images, by file ending; of patterns images and videos.
        recursive: search the folders inside folders too (not those behind symbolic links), and keep them in the names.

    Raises:
        OptionsError: a folder or pattern holds nothing that can be used.
    """
    paths: list[Path] = []
    stems: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(_walk(path) if recursive else (p for p in path.iterdir() if _is_image(p)))
            if not found:
                raise OptionsError(_nothing_in(path, recursive))
            stems += [p.relative_to(path).with_suffix("").as_posix() for p in found]
        elif not path.exists() and glob.has_magic(argument):
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))  # noqa: PTH207 (absolute patterns)
            found = [p for p in matches if p.suffix.lower() in SUFFIXES | VIDEO_SUFFIXES and p.is_file()]
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


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _nothing_in(folder: Path, recursive: bool) -> str:
    message = f"the folder {folder} holds no image: expected files ending in {_endings()}"
    if any(p.suffix.lower() in VIDEO_SUFFIXES for p in folder.iterdir()):
        return f"{message}; name its videos one by one or by a pattern"
    return message if recursive else f"{message}; --recursive searches the folders inside it"


def _endings() -> str:
    return ".jpg, .png, .webp, .tif, …"
