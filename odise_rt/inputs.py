"""What a command line names: image files, folders, patterns and videos, and a name for the results of each."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from odise_rt.errors import OptionsError
from odise_rt.preprocessing import SUFFIXES
from odise_rt.result_files import COCO_FILE, CVAT_FILE, FAILED_FILE
from odise_rt.run_log import FILE_NAME as RUN_LOG

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".ogv"))
"""File name endings by which videos are told from images."""


@dataclass(frozen=True)
class Input:
    """One image or video of a run."""

    path: Path
    name: str
    """Stem of its results, unique in the run; with folders (``/`` between them) if these were searched."""
    file_name: str = ""
    """Its name in documents about several images; empty: its own name in the folder of ``name``."""

    @property
    def is_video(self) -> bool:
        """Whether its file's ending is that of a video."""
        return _is_video(self.path)


_RESULTS = (".overlay.png", ".overlay.mp4", ".panoptic.png", ".semantic.png")
"""Endings of our own results, which lie beside the images where ``--out`` is their folder."""
_APPLE_DOUBLE = "._"
"""Beginning of the names of files in which macOS keeps attributes of others on foreign disks: ``._IMG.jpg``."""
_RESULT_FOLDERS = ("panoptic", "labelme")


def result_names(name: str) -> list[str]:
    """Every file that the results of an input of this name may have, whatever its formats."""
    beside = [f"{name}{ending}" for ending in (".json", ".rle.json", ".frames", *_RESULTS)]
    return [*beside, f"panoptic/{name}.png", f"labelme/{name}.json"]


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
            inside = list(_walk(path) if recursive else path.iterdir())
            found = sorted(_without_results(filter(is_image, inside), path, results))
            if not found:
                raise OptionsError(_nothing_in(path, recursive))
            if videos := sum(map(_is_video, inside)):
                logger.warning("%s: its videos (%d) are left out: name them one by one or by a pattern", path, videos)
            stems += [p.relative_to(path).with_suffix("").as_posix() for p in found]
        elif not path.exists() and glob.has_magic(argument):
            matches = sorted(Path(p) for p in glob.glob(argument, recursive=True))  # noqa: PTH207 (absolute patterns)
            found = [p for p in matches if is_image(p) or (_is_video(p) and p.is_file())]
            found = _without_results(found, path, results)
            if not found:
                raise OptionsError(f"nothing matches {argument!r}: expected files ending in {_endings()}")
            stems += [p.stem for p in found]
        else:
            found = [path]
            stems.append(path.stem)
        paths += found
    paths, stems = _each_once(paths, stems)
    names = output_names(paths, stems)
    called = [PurePosixPath(name).with_name(path.name).as_posix() for path, name in zip(paths, names, strict=True)]
    often = {name for name, count in Counter(called).items() if count > 1}
    files = [path.as_posix() if name in often else name for path, name in zip(paths, called, strict=True)]
    return [Input(*entry) for entry in zip(paths, names, files, strict=True)]


def _each_once(paths: Sequence[Path], stems: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The paths and stems without files that were named before, say by their folder."""
    kept: dict[str, tuple[Path, str]] = {}
    for path, stem in zip(paths, stems, strict=True):
        kept.setdefault(os.path.realpath(path), (path, stem))
    return [path for path, _ in kept.values()], [stem for _, stem in kept.values()]


def output_names(paths: Iterable[Path], stems: Iterable[str]) -> list[str]:
    """A name for the results of each input: its stem, or another one where a file of its results would be another's."""
    taken = {_on_disk(name) for name in (FAILED_FILE, COCO_FILE, CVAT_FILE, RUN_LOG)}
    names = []
    for path, stem in zip(paths, stems, strict=True):
        candidates = [stem, f"{stem}_{path.suffix.lstrip('.')}", f"{path.parent.name}_{path.stem}"]
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        for name in itertools.chain(filter(None, candidates), numbered):
            files = {_on_disk(file) for file in result_names(name)}
            if taken.isdisjoint(files):
                break
        taken |= files
        names.append(name)
    return names


def _on_disk(name: str) -> str:
    """What names share that file systems of macOS and Windows take for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, files in os.walk(folder):
        yield from (Path(parent) / name for name in files)


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


def is_image(path: Path) -> bool:
    """Whether a file found in a folder is an image, by its name, and none of our results."""
    if path.name.startswith(_APPLE_DOUBLE) or path.name.endswith(_RESULTS):
        return False
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.endswith(_RESULTS)


def _nothing_in(folder: Path, recursive: bool) -> str:
    message = f"the folder {folder} holds no image: expected files ending in {_endings()}"
    if any(p.suffix.lower() in VIDEO_SUFFIXES for p in folder.iterdir()):
        return f"{message}; name its videos one by one or by a pattern"
    return message if recursive else f"{message}; --recursive searches the folders inside it"


def _endings() -> str:
    return ".jpg, .png, .webp, .tif, …"
