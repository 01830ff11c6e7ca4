"""Reads COCO panoptic data sets with captions: the real COCO 2017 and Sticker World alike.

A panoptic data set is a JSON file (images, categories, and for each image the segments with their ids) and a folder of
PNGs whose colours are those ids. Both are checked against each other when a picture is read; whatever does not fit is a
:class:`DatasetError` that names the file and the image id.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odise_rt.errors import DatasetError, OptionsError
from odise_rt.vocabulary import Vocabulary
from training.data.coco_fields import field_of, flag_of, image_id_of, number_of, positive_of, read_coco, text_of
from training.data.data_roots import SPLITS, find_paths, looked_for
from training.data.picture_files import ImageId, check_same_size, read_colours, read_rgb

logger = logging.getLogger(__name__)

HELD_OUT = ("val", "val2017", "validation")
"""Names that a held-out part of a data set has."""


def coco_root(root: Path) -> Path:
    """A data set's own folder: the one named, or ``coco`` in it where it is a folder of data sets, as detectron2's."""
    inside = root / "coco"
    return inside if (inside / "annotations").is_dir() and not (root / "annotations").is_dir() else root


def parts_of(root: Path) -> list[str]:
    """Names of a data set's parts, by their panoptic JSON files."""
    found = (coco_root(root) / "annotations").glob("panoptic_*.json")
    return sorted(path.stem.removeprefix("panoptic_") for path in found)


def held_out_part(root: Path) -> str | None:
    """The first of :data:`HELD_OUT` that a data set has."""
    return next((name for name in HELD_OUT if name in parts_of(root)), None)


@dataclass(frozen=True)
class Category:
    """A class of the data set."""

    id: int
    name: str
    synonyms: tuple[str, ...]
    """All names, ``name`` first."""
    isthing: bool


@dataclass(frozen=True)
class Segment:
    """One entry of ``segments_info``."""

    id: int
    category_id: int
    iscrowd: bool
    area: float | None = None
    """Pixels, as the file says; None where it does not. In ADE20K, stuff has those of before things covered it."""


@dataclass(frozen=True)
class PanopticExample:
    """A picture and its truth."""

    image_id: ImageId
    file_name: str
    image: np.ndarray
    """uint8 (H, W, 3) RGB."""
    segment_map: np.ndarray
    """int32 (H, W): the segment's id at each pixel, 0 where nothing is annotated."""
    segments: tuple[Segment, ...]
    captions: tuple[str, ...]
    """Empty where the data set was opened without captions."""


def decode_ids(colours: np.ndarray) -> np.ndarray:
    """Ids of a panoptic PNG: R + 256 G + 65536 B. uint8 (H, W, 3) to int32 (H, W)."""
    wide = colours.astype(np.int32)
    return wide[..., 0] + 256 * wide[..., 1] + 65536 * wide[..., 2]


def _images(path: Path, entries: list[Any]) -> list[tuple[ImageId, str]]:
    """Image id and file name of each picture in ``images``."""
    found: dict[ImageId, str] = {}
    for position, entry in enumerate(entries):
        image_id = image_id_of(entry, "id", f"{path}: images[{position}]")
        if image_id in found:
            raise DatasetError(f"{path}: two images have the id {image_id}")
        found[image_id] = text_of(entry, "file_name", f"{path}: image id {image_id}")
    return list(found.items())


def read_images(path: Path) -> list[tuple[ImageId, str]]:
    """Image id and file name of each picture of a COCO file, in its order.

    Raises:
        DatasetError: not such a file, a picture without id or file name, or an id twice.
    """
    return _images(path, read_coco(path, ("images",))["images"])


def read_captions(path: Path) -> dict[ImageId, tuple[str, ...]]:
    """Captions by image id from a COCO captions file.

    Raises:
        DatasetError: Not a captions file, or an entry without image id or text.
    """
    captions: dict[ImageId, list[str]] = {}
    for position, entry in enumerate(read_coco(path, ("annotations",))["annotations"]):
        image_id = image_id_of(entry, "image_id", f"{path}: annotations[{position}]")
        captions.setdefault(image_id, []).append(text_of(entry, "caption", f"{path}: image id {image_id}"))
    return {image_id: tuple(texts) for image_id, texts in captions.items()}


class CocoPanoptic:
    """A panoptic data set, usable as a map-style PyTorch dataset.

    Args:
        annotations: Panoptic JSON.
        images: Folder of the pictures.
        masks: Folder of the panoptic PNGs.
        captions: Captions JSON, or None to go without.
        all_captioned: Refuse pictures of which the captions file says nothing.
        covered: Accept what the preparation of ADE20K writes. Segments of which the PNG has no pixel, as things are
            pasted over stuff, are kept, so that they count as missed in panoptic quality, as in COCO's evaluation. Of
            segments of one id (its road and its skyscraper share a colour) the last counts, as there.

    Attributes:
        categories: Classes in the order of the file. COCO's own 133, known by their ids, have the words of the built-in
            list: the file calls them "sky-other-merged" or "door-stuff", which nobody would ask a model for.
        index_of: Contiguous class index 0..K-1 of each category id.
        image_ids: Id of each picture, in the order of the file.

    Raises:
        DatasetError: A file that is missing, broken or contradicts itself.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        masks: Path,
        captions: Path | None = None,
        all_captioned: bool = True,
        covered: bool = False,
    ) -> None:
        self.annotations_path, self.images_path, self.masks_path = Path(annotations), Path(images), Path(masks)
        self.captions_path = captions
        self._covered = covered
        content = read_coco(self.annotations_path, ("images", "annotations", "categories"))
        self.categories = self._in_words(tuple(self._category(entry) for entry in content["categories"]))
        self.index_of = {category.id: index for index, category in enumerate(self.categories)}
        if len(self.index_of) != len(self.categories):
            raise DatasetError(f"{self.annotations_path}: two categories share an id")
        self._truth: dict[ImageId, dict[str, Any]] = {}
        for position, entry in enumerate(content["annotations"]):
            image_id = image_id_of(entry, "image_id", f"{self.annotations_path}: annotations[{position}]")
            if image_id in self._truth:
                raise DatasetError(f"{self.annotations_path}: image id {image_id} is annotated twice")
            self._truth[image_id] = entry
        self._captions = None if captions is None else read_captions(Path(captions))
        self._images = _images(self.annotations_path, content["images"])
        for image_id, file_name in self._images:
            if image_id not in self._truth:
                raise DatasetError(f"{self.annotations_path}: image id {image_id} ({file_name}) has no annotation")
            if all_captioned and self._captions is not None and image_id not in self._captions:
                raise DatasetError(f"{captions}: image id {image_id} ({file_name}) has no caption")
        self.image_ids = [image_id for image_id, _ in self._images]

    @classmethod
    def from_root(cls, root: Path, split: str, with_captions: bool | None = True) -> CocoPanoptic:
        """Open a data set in the usual layout.

        ``root/annotations/panoptic_{split}.json``, ``root/annotations/captions_{split}.json``, the PNGs in
        ``root/annotations/panoptic_{split}`` (COCO) or ``root/panoptic_{split}``, the pictures in ``root/{split}``.
        All of it may lie in ``root/coco``. ``with_captions`` None: those that are there.

        Raises:
            DatasetError: as of the class; of a part that is not there it names those that are.
        """
        parts = parts_of(Path(root))
        root = coco_root(Path(root))
        if split not in parts:
            advice = f"its parts are {', '.join(parts)}: name one of them by --split" if parts else "it has none at all"
            raise DatasetError(
                f"{root / 'annotations' / f'panoptic_{split}.json'} does not exist: expected {split!r} to be a part of "
                f"the data set, but {advice}"
            )
        folder = root / "annotations"
        beside = folder / f"panoptic_{split}"
        captions = folder / f"captions_{split}.json"
        wanted = captions.exists() if with_captions is None else with_captions
        return cls(
            folder / f"panoptic_{split}.json",
            root / split,
            beside if beside.is_dir() else root / f"panoptic_{split}",
            captions if wanted else None,
            all_captioned=with_captions is not None,
        )

    @classmethod
    def from_ade20k(cls, root: Path, split: str) -> CocoPanoptic:
        """Open ADE20K's 150 classes as Mask2Former's preparation writes them in this format.

        ``ADEChallengeData2016/ade20k_panoptic_{split}.json``, ``ade20k_panoptic_{split}`` and ``images`` below
        ``root``, or ``root`` is that folder.
        """
        if split not in SPLITS:
            raise OptionsError(f"the split of ADE20K is {split!r}: expected {' or '.join(SPLITS)}")
        folder = "ADEChallengeData2016"
        relative = (
            f"{folder}/ade20k_panoptic_{split}.json",
            f"{folder}/images/{SPLITS[split]}",
            f"{folder}/ade20k_panoptic_{split}",
        )
        paths = find_paths(Path(root), relative)
        if paths is None:
            raise DatasetError(f"ADE20K panoptic is not under {root}: {looked_for(Path(root), [relative])}")
        annotations, images, masks = paths
        return cls(annotations, images, masks, covered=True)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[PanopticExample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> PanopticExample:
        """Read and check one picture.

        Raises:
            IndexError: ``index`` is out of range.
            DatasetError: A file is missing or broken, or PNG and JSON disagree.
        """
        image_id, file_name = self._images[index]
        image = read_rgb(self.images_path / file_name, image_id)
        mask_name = text_of(self._truth[image_id], "file_name", self._annotation(image_id))
        mask_path = self.masks_path / mask_name
        segment_map = decode_ids(read_colours(mask_path, image_id))
        check_same_size(image, segment_map, mask_path, image_id)
        segments = self._segments(image_id)
        declared = {segment.id for segment in segments}
        present = set(np.unique(segment_map).tolist()) - {0}
        unknown, absent = sorted(present - declared)[:3], sorted(declared - present)[:3]
        if unknown or (absent and not self._covered):
            raise DatasetError(
                f"{mask_path} (image id {image_id}) and {self.annotations_path.name} disagree: ids only in the PNG "
                f"{unknown}, ids only in the JSON {absent}"
            )
        captions = () if self._captions is None else self._captions.get(image_id, ())
        return PanopticExample(image_id, file_name, image, segment_map, segments, captions)

    def first_captions(self) -> dict[ImageId, str]:
        """The first caption of each picture by image id.

        Raises:
            DatasetError: the data set was opened without captions.
        """
        if self._captions is None:
            raise DatasetError(f"{self.annotations_path} was opened without captions: name a captions file")
        return {image_id: self._captions[image_id][0] for image_id in self.image_ids}

    def categories_of(self, index: int) -> set[int]:
        """Category ids of the segments of picture ``index`` that are no crowds, from the JSON alone."""
        segments = self._segments(self.image_ids[index])
        return {segment.category_id for segment in segments if not segment.iscrowd}

    def _annotation(self, image_id: ImageId) -> str:
        return f"{self.annotations_path}: annotation of image id {image_id}"

    def _segments(self, image_id: ImageId) -> tuple[Segment, ...]:
        infos = field_of(self._truth[image_id], "segments_info", self._annotation(image_id))
        if not isinstance(infos, list):
            raise DatasetError(f"{self._annotation(image_id)} has segments_info {infos!r}: expected a list")
        where = f"{self.annotations_path}: segments_info of image id {image_id}"
        segments: dict[int, Segment] = {}
        for info in infos:
            category, number = (number_of(info, key, where) for key in ("category_id", "id"))
            if category not in self.index_of:
                raise DatasetError(f"{where} names category {category}, which is not declared")
            if number <= 0:
                raise DatasetError(f"{where} has id {number}; ids start at 1, 0 is void")
            if number in segments and not self._covered:
                raise DatasetError(f"{where} uses an id twice")
            iscrowd = "iscrowd" in info and flag_of(info, "iscrowd", where)
            area = None if info.get("area") is None else positive_of(info, "area", where)
            segments[number] = Segment(number, category, iscrowd, area)
        return tuple(segments.values())

    def _in_words(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        words = {known.id: known.words for known in Vocabulary.builtin("coco")}
        told = any(len(category.synonyms) > 1 for category in categories)  # a file with words of its own
        if told or words.keys() != {category.id for category in categories}:
            return categories
        logger.info("%s has the classes of COCO: their words are those of the built-in list", self.annotations_path)
        return tuple(dataclasses.replace(c, name=words[c.id][0], synonyms=words[c.id]) for c in categories)

    def _category(self, entry: Any) -> Category:
        number = number_of(entry, "id", f"{self.annotations_path}: a category")
        where = f"{self.annotations_path}: category {number}"
        name, synonyms = text_of(entry, "name", where), entry.get("synonyms") or []
        if not isinstance(synonyms, list) or not all(isinstance(synonym, str) for synonym in synonyms):
            raise DatasetError(f"{where} has synonyms {synonyms!r}: expected a list of texts")
        others = (synonym for synonym in synonyms if synonym != name)
        return Category(number, name, (name, *others), flag_of(entry, "isthing", where))
