"""What a segmentation gives back, and its common file formats."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from odise_rt import rle
from odise_rt.backends.base import StageFacts
from odise_rt.errors import OptionsError
from odise_rt.files import atomic_writer, given_path
from odise_rt.vocabulary import Vocabulary

if TYPE_CHECKING:
    from PIL import Image

    from odise_rt.preprocessing import ImageLike

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Candidate:
    """One name that a segment might have, and what each classifier thinks of it."""

    label: str
    """Name of the class."""
    class_index: int
    """Position of the class in the vocabulary."""
    score: float
    """Probability of the class in [0, 1] by both classifiers together and "no object"; the segment's score is the best
    candidate's."""
    mask_score: float
    """Probability in [0, 1] by the mask classifier alone (diffusion features), among the classes of the vocabulary."""
    clip_score: float
    """Probability in [0, 1] by CLIP alone, among the classes of the vocabulary."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        scores = {name: round(getattr(self, name), 6) for name in ("score", "mask_score", "clip_score")}
        return {"label": self.label, "class_index": self.class_index, **scores}


@dataclass(frozen=True)
class Segment:
    """One segment of a panoptic result."""

    id: int
    """Value in the segment map, counted from 1."""
    label: str
    """Name of the class: its first word."""
    class_index: int
    """Position of the class in the vocabulary."""
    score: float
    """Probability of the class in [0, 1]; of joined stuff masks, the best one's; if unknown, that of the best word; 1
    where a person chose the name. NaN where there is none: a class of a semantic map, drawn as a segment, is the sum of
    many masks."""
    area: int
    """Number of pixels."""
    box: Box
    """Left, top, right, bottom in pixels; right and bottom are exclusive."""
    isthing: bool
    """True for one object, false for all of a stuff class."""
    unknown: bool = False
    """Whether no word reached the probability that was asked for; the label is then "unknown"."""
    candidates: tuple[Candidate, ...] = ()
    """The best names, best first: as many as ``SegmentOptions.explain`` says and the vocabulary has. Of joined stuff
    masks, the best one's."""
    track_id: int | None = None
    """In a video: the same number for the same thing, or the same stuff class, in every frame."""
    corrected: bool = False
    """Whether a person chose the name."""

    def to_dict(self, explain: bool = False) -> dict[str, Any]:
        """Plain JSON types; with ``candidates`` if they are asked for."""
        data: dict[str, Any] = {
            "id": self.id,
            "label": self.label,
            "class_index": self.class_index,
            "score": round(self.score, 6),
            "area": self.area,
            "box": list(self.box),
            "isthing": self.isthing,
            "unknown": self.unknown,
        }
        if self.track_id is not None:
            data["track_id"] = self.track_id
        if self.corrected:
            data["corrected"] = True
        return data | {"candidates": [c.to_dict() for c in self.candidates]} if explain else data


@dataclass(frozen=True, eq=False)
class Instance:
    """One object mask; masks of different instances may overlap."""

    label: str
    class_index: int
    score: float
    """Class probability times the mean mask probability inside the mask, in [0, 1]."""
    area: int
    box: Box
    """Left, top, right, bottom in pixels; right and bottom are exclusive."""
    size: tuple[int, int]
    """Height and width of the image."""
    bits: npt.NDArray[np.uint8]
    """uint8: the mask inside its box, row by row, eight pixels a byte."""
    candidates: tuple[Candidate, ...] = ()
    """The best names of the mask, best first, as for a :class:`Segment`. The label need not be the first of them, as
    one mask may be several instances."""

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """bool (h, w), made anew on each access."""
        left, top, right, bottom = self.box
        mask = np.zeros(self.size, bool)
        height, width = bottom - top, right - left
        inside = np.unpackbits(self.bits, count=height * width).reshape(height, width)
        mask[top:bottom, left:right] = inside.astype(bool)
        return mask

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the mask."""
        return {
            "label": self.label,
            "class_index": self.class_index,
            "score": round(self.score, 6),
            "area": self.area,
            "box": list(self.box),
        }


@dataclass(frozen=True)
class RunFacts:
    """What ran, on what, how, and for how long."""

    bundle: str
    """Name of the bundle."""
    bundle_digest: str
    """SHA-256 of the bundle's manifest."""
    precision: str
    device: str
    engine: str
    """Engine, provider and threads in one line."""
    stages: tuple[StageFacts, ...]
    """For each stage that was loaded: its engine and provider."""
    image_size: tuple[int, int]
    """Height and width of the image as given."""
    network_size: tuple[int, int]
    """Height and width inside the network, before padding."""
    windows: int
    window_side: int
    words: int
    seen_classes: int
    """Classes of the vocabulary that were seen in training."""
    options: Mapping[str, Any]
    """Every option with its value."""
    seconds: Mapping[str, float]
    """Wall-clock seconds of each step."""
    windows_per_batch: int = 0
    """Windows that were run at a time; fewer than the engine prefers if memory ran out."""
    notes: tuple[str, ...] = ()
    """Deviations from the plan, as sentences for the user."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = dataclasses.asdict(self)
        data["seconds"] = {k: round(v, 6) for k, v in self.seconds.items()}
        for key in ("image_size", "network_size", "stages", "notes"):
            data[key] = list(data[key])
        return data


@dataclass(frozen=True, eq=False)
class PanopticResult:
    """Segments of one image, with semantic and instance results if they were asked for."""

    segment_map: npt.NDArray[np.int32]
    """int32 (h, w), at the size of the image as given: segment ids, 0 where there is no segment."""
    segments: tuple[Segment, ...]
    """The segments in order of their ids."""
    vocabulary: Vocabulary
    """The vocabulary as given; with the option ``unknown``, its :attr:`~odise_rt.Vocabulary.with_unknown`."""
    facts: RunFacts
    semantic_map: npt.NDArray[np.int32] | None = None
    """int32 (h, w) class indices, if asked for."""
    instances: tuple[Instance, ...] | None = None
    """The instances, best first, if asked for."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.segment_map.shape[0], self.segment_map.shape[1]

    def mask(self, segment: Segment | int) -> npt.NDArray[np.bool_]:
        """bool (h, w) of one segment, given as such or by its id.

        Raises:
            OptionsError: the result has no such segment.
        """
        identifier = segment.id if isinstance(segment, Segment) else segment
        if identifier not in range(1, len(self.segments) + 1):
            raise OptionsError(f"there is no segment {identifier}: expected 1 to {len(self.segments)}")
        mask: npt.NDArray[np.bool_] = self.segment_map == identifier
        return mask

    def category_id(self, class_index: int) -> int:
        """The data set's id of a class, or its position counted from 1 if the vocabulary has no ids.

        Raises:
            OptionsError: the vocabulary has no class of this index.
        """
        if class_index not in range(len(self.vocabulary)):
            raise OptionsError(f"there is no class {class_index}: expected 0 to {len(self.vocabulary) - 1}")
        return category_ids(self.vocabulary)[class_index]

    def to_dict(self, rle_masks: bool = False, explain: bool = False) -> dict[str, Any]:
        """Plain JSON types: size, segments and facts; if they were asked for, instances, and the classes of the
        semantic map as ``semantic``.

        Args:
            rle_masks: add the mask of each of these as COCO run-length encoding.
            explain: add the best names of each segment with both classifiers' scores.
        """
        data: dict[str, Any] = {"height": self.size[0], "width": self.size[1]}
        data["segments"] = [segment.to_dict(explain) for segment in self.segments]
        if rle_masks:
            _add_masks(data["segments"], self._segment_masks())
        if self.instances is not None:
            data["instances"] = [instance.to_dict() for instance in self.instances]
            if rle_masks:
                _add_masks(data["instances"], (rle.encode(instance.mask) for instance in self.instances))
        if self.semantic_map is not None:
            classes, areas = np.unique(self.semantic_map, return_counts=True)
            data["semantic"] = [
                {"label": self.vocabulary[k].name, "class_index": k, "area": area}
                for k, area in zip(classes.tolist(), areas.tolist(), strict=True)
            ]
            if rle_masks:
                _add_masks(data["semantic"], rle.encode_labels(self.semantic_map, classes))
        return data | {"facts": self.facts.to_dict()}

    def to_rle(self) -> list[dict[str, Any]]:
        """Each segment's mask as COCO run-length encoding, with ``segment_id``, ``label`` and ``score``."""
        return [
            {"segment_id": s.id, "label": s.label, "score": s.score, "segmentation": mask}
            for s, mask in zip(self.segments, self._segment_masks(), strict=True)
        ]

    def _segment_masks(self) -> Iterator[dict[str, Any]]:
        return rle.encode_labels(self.segment_map, (s.id for s in self.segments))

    def to_png(self) -> Image.Image:
        """The segment map in COCO's panoptic coding: RGB with id = R + 256 G + 65536 B."""
        from PIL import Image

        height, width = self.segment_map.shape
        ids = np.ascontiguousarray(self.segment_map, "<i4").view(np.uint8).reshape(height, width, 4)
        return Image.fromarray(np.ascontiguousarray(ids[..., :3]))

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_png`, atomically.

        Raises:
            OptionsError: the path names what is no file, or its folder does not exist.
            OSError: the file system refused.
        """
        place = given_path(path, "the file to write", OptionsError)
        if (place.exists() and not place.is_file()) or not place.parent.is_dir():
            raise OptionsError(f"cannot write {place}: expected the name of a file in a folder that exists")
        with atomic_writer(path) as file:
            self.to_png().save(file, format="PNG")

    def to_coco_panoptic(self, image_id: int | str = 0, file_name: str = "image.png") -> dict[str, Any]:
        """COCO's panoptic format.

        Args:
            image_id: identifier of the image.
            file_name: name under which the caller will save the PNG.

        Returns:
            ``annotation`` (one entry of ``annotations``), ``categories`` of the vocabulary, and ``png``, a PIL image.
        """
        return {
            "annotation": self.coco_annotation(image_id, file_name),
            "categories": coco_categories(self.vocabulary),
            "png": self.to_png(),
        }

    def coco_annotation(self, image_id: int | str, file_name: str) -> dict[str, Any]:
        """The ``annotation`` of :meth:`to_coco_panoptic` alone, for many images of one vocabulary."""
        ids = category_ids(self.vocabulary)
        info = [
            {
                "id": s.id,
                "category_id": ids[s.class_index],
                "isthing": int(s.isthing),
                "iscrowd": 0,
                "area": s.area,
                "bbox": [s.box[0], s.box[1], s.box[2] - s.box[0], s.box[3] - s.box[1]],
                **({"corrected": True} if s.corrected else {}),
            }
            | ({} if math.isnan(s.score) else {"score": round(s.score, 6)})
            for s in self.segments
        ]
        return {"image_id": image_id, "file_name": file_name, "segments_info": info}

    def to_huggingface(self) -> list[dict[str, Any]]:
        """The output of Hugging Face's ``image-segmentation`` pipeline: score, label, and a 0/255 PIL mask each."""
        from PIL import Image

        return [
            {"score": s.score, "label": s.label, "mask": Image.fromarray(self.mask(s).astype(np.uint8) * 255)}
            for s in self.segments
        ]

    def to_supervision(self) -> Any:
        """``supervision.Detections``; see :func:`odise_rt.interchange.supervision_detections`."""
        from odise_rt import interchange

        return interchange.supervision_detections(self)

    def to_labelme(self, image_path: str, tolerance: float = 1.0) -> dict[str, Any]:
        """LabelMe's JSON with polygons.

        Args:
            image_path: path of the image, relative to the folder that the JSON will be saved in.
            tolerance: how far in pixels outlines may be simplified, 0 to 100; 0 keeps the mask exactly.
        """
        from odise_rt import interchange

        return interchange.labelme_document(self, image_path, tolerance)

    def to_cvat(self, file_name: str, tolerance: float = 1.0) -> str:
        """The ``<image>`` element of CVAT's "images 1.1" XML; :func:`odise_rt.interchange.cvat_document` joins them.

        Args:
            file_name: the image's name in CVAT's task.
            tolerance: how far in pixels outlines may be simplified, 0 to 100; 0 keeps the mask exactly.
        """
        from odise_rt import interchange

        return interchange.cvat_image(self, file_name, tolerance)

    def overlay(
        self, image: ImageLike, legend: bool = True, colours: Sequence[tuple[int, int, int]] | None = None
    ) -> Image.Image:
        """The image with coloured segments, outlines, labels and a legend; see :func:`odise_rt.visualize.overlay`."""
        from odise_rt import visualize

        return visualize.overlay(image, self, legend=legend, colours=colours)


def _add_masks(entries: list[dict[str, Any]], masks: Iterable[dict[str, Any]]) -> None:
    for entry, mask in zip(entries, masks, strict=True):
        entry["rle"] = mask


def category_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Ids of a vocabulary's classes for COCO files: the data set's if every class has its own, else from 1 on."""
    given = [c.id for c in vocabulary if c.id is not None]
    if len(given) == len(vocabulary) == len(set(given)):
        return tuple(given)
    return tuple(range(1, len(vocabulary) + 1))


def coco_categories(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The ``categories`` of a COCO file for a vocabulary."""
    ids = category_ids(vocabulary)
    return [
        {"id": i, "name": c.name, "supercategory": c.name, "isthing": int(c.isthing)}
        for i, c in zip(ids, vocabulary, strict=True)
    ]
