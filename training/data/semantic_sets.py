"""Reads semantic segmentation sets as they are published: a folder of pictures and a folder of label maps.

ADE20K with 150 and 847 classes, Pascal Context with 59 and 459, Pascal VOC 2012 with 21;
:mod:`training.data.semantic_formats` says where each lies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from odise_rt.errors import DatasetError, OptionsError
from odise_rt.vocabulary import Vocabulary
from training.data.data_roots import SPLITS, find_paths, looked_for
from training.data.picture_files import check_same_size, read_label_map, read_rgb
from training.data.semantic_formats import SEMANTIC_FORMATS, Layout, SemanticFormat

logger = logging.getLogger(__name__)

VOID = -1
"""Class index of pixels that count nowhere."""
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
LABEL_SUFFIXES = (".png", ".tif", ".tiff")


@dataclass(frozen=True)
class SemanticExample:
    """A picture and its truth."""

    image_id: str
    """The picture's name without suffix."""
    file_name: str
    image: npt.NDArray[np.uint8]
    """uint8 (H, W, 3) RGB."""
    class_map: npt.NDArray[np.int32]
    """int32 (H, W): class index, :data:`VOID` where nothing is annotated."""


class SemanticSet:
    """A semantic segmentation set.

    Args:
        pictures: (picture, label map) of each example.
        vocabulary: classes in the order of the label maps.
        layout: what the values in the label maps mean.

    Attributes:
        vocabulary: the classes.
        image_ids: each picture's name without suffix.
    """

    def __init__(self, pictures: Sequence[tuple[Path, Path]], vocabulary: Vocabulary, layout: Layout) -> None:
        self._pictures = tuple(pictures)
        self.vocabulary = vocabulary
        self.layout = layout
        self.image_ids = [picture.stem for picture, _ in self._pictures]

    @classmethod
    def from_root(cls, root: Path, name: str, split: str = "val", vocabulary: Vocabulary | None = None) -> SemanticSet:
        """Find a published set.

        Args:
            root: folder of data sets, as detectron2 has it; or the folder of this set, or one between the two.
            name: of :data:`training.data.semantic_formats.SEMANTIC_FORMATS`.
            split: val or train.
            vocabulary: other words for the set's classes, in its order, e.g. with more synonyms.

        Raises:
            OptionsError: unknown format or split, or a vocabulary of another number of classes.
            DatasetError: no layout is there (the message lists those looked for), a folder is empty, or pictures and
                label maps do not belong together.
        """
        if name not in SEMANTIC_FORMATS:
            raise OptionsError(f"unknown format {name!r}: expected one of {', '.join(SEMANTIC_FORMATS)}")
        if split not in SPLITS:
            raise OptionsError(f"the split of {name} is {split!r}: expected {' or '.join(SPLITS)}")
        facts = SEMANTIC_FORMATS[name]
        words = facts.vocabulary() if vocabulary is None else vocabulary
        if len(words) != facts.classes:
            raise OptionsError(f"{len(words)} classes were given for {name}: expected {facts.classes}, in its order")
        layout, paths = _find(Path(root), facts, split)
        logger.info("%s: label maps in %s", facts.title, paths[1])
        return cls(_pair(layout, paths), words, layout)

    def __len__(self) -> int:
        return len(self._pictures)

    def __iter__(self) -> Iterator[SemanticExample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> SemanticExample:
        """Read and check one picture.

        Raises:
            IndexError: ``index`` is out of range.
            DatasetError: a file is broken, sizes differ, or a value stands for no class.
        """
        picture, label = self._pictures[index]
        image_id = picture.stem
        image, values = read_rgb(picture, image_id), read_label_map(label, image_id)
        check_same_size(image, values, label, image_id)
        classes = values - self.layout.first
        classes[values == self.layout.void] = VOID
        unknown = (classes >= len(self.vocabulary)) | ((classes < 0) & (values != self.layout.void))
        if unknown.any():
            last = self.layout.first + len(self.vocabulary) - 1
            raise DatasetError(
                f"{label} (image id {image_id}) holds {np.unique(values[unknown])[:5].tolist()}: expected classes "
                f"{self.layout.first} to {last}, or {self.layout.void} for void"
            )
        return SemanticExample(image_id, picture.name, image, classes)


def _find(root: Path, facts: SemanticFormat, split: str) -> tuple[Layout, tuple[Path, ...]]:
    """The first layout that is there, with its folders of pictures and label maps and its listing if it has one."""
    for layout in facts.layouts:
        paths = find_paths(root, layout.paths(split))
        if paths is not None:
            return layout, paths
    looked = looked_for(root, [layout.paths(split) for layout in facts.layouts])
    raise DatasetError(". ".join(filter(None, [f"{facts.title} is not under {root}: {looked}", facts.otherwise])))


def _pair(layout: Layout, paths: tuple[Path, ...]) -> list[tuple[Path, Path]]:
    images, labels = paths[:2]
    label_of, picture_of = _by_name(labels, LABEL_SUFFIXES), _by_name(images, PICTURE_SUFFIXES)
    if not label_of:
        raise DatasetError(f"{labels} holds no label map: expected files that end in {', '.join(LABEL_SUFFIXES)}")
    if layout.listing is not None:
        names = _listed(paths[2])
    elif layout.images_are_the_split:
        names = sorted(set(label_of) | set(picture_of))
    else:
        names = sorted(label_of)
    for name in names:
        if name not in picture_of:
            raise DatasetError(f"{images} has no picture for the label map of image id {name}: download it again")
        if name not in label_of:
            raise DatasetError(
                f"{labels} has no label map for {picture_of[name].name} (image id {name}): prepare the set again"
            )
    return [(picture_of[name], label_of[name]) for name in names]


def _by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as exc:
        raise DatasetError(f"{folder} cannot be listed ({exc}): check its permissions") from exc
    for path in paths:
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise DatasetError(f"{folder} holds {found[path.stem].name} and {path.name}: expected one of that name")
            found[path.stem] = path
    return found


def _listed(path: Path) -> list[str]:
    try:
        names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise DatasetError(f"{path} cannot be read as a list of names ({exc}): download it again") from exc
    if not names:
        raise DatasetError(f"{path} is empty: expected the name of a picture in each line")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DatasetError(f"{path} names {twice} twice: remove one line")
    return names
