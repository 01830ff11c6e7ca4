"""Where the published semantic segmentation sets lie, and what the values in their label maps mean.

A set is found under a folder of data sets, either as its download leaves it or as the usual preparation scripts for
detectron2 do. Class names are the data sets' own, in ``label_lists`` and ``odise_rt/labels``; with other words, such as
prompt-engineered synonyms, figures differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from odise_rt.vocabulary import Vocabulary
from training.data.data_roots import SPLITS

_LABEL_LISTS = Path(__file__).parent / "label_lists"


@dataclass(frozen=True)
class Layout:
    """One way in which a set lies on disk. ``{split}`` is val or train, ``{long}`` validation or training."""

    images: str
    """Folder of the pictures, relative to the folder of data sets."""
    labels: str
    """Folder of the label maps, which have the names of their pictures."""
    void: int
    """Value of pixels without a class."""
    first: int = 0
    """Value of class 0; the others follow."""
    listing: str | None = None
    """File with a name a line, where the folders hold more than the split."""

    @property
    def images_are_the_split(self) -> bool:
        """Whether every picture of the folder belongs to the split."""
        return "{" in self.images

    def paths(self, split: str) -> tuple[str, ...]:
        """Pictures, label maps and, if there is one, the listing of a split (val or train)."""
        paths = (self.images, self.labels) if self.listing is None else (self.images, self.labels, self.listing)
        return tuple(path.format(split=split, long=SPLITS[split]) for path in paths)


@dataclass(frozen=True)
class SemanticFormat:
    """A published set."""

    title: str
    classes: int
    labels: str
    """Built-in vocabulary, or a file in ``label_lists``."""
    layouts: tuple[Layout, ...]
    otherwise: str = ""
    """What to do where none of the layouts is there, if there is more to it than another folder."""

    def vocabulary(self) -> Vocabulary:
        """The set's own class names in the order of its label maps."""
        if self.labels.endswith(".txt"):
            return Vocabulary.from_openseg(_LABEL_LISTS / self.labels)
        return Vocabulary.builtin(self.labels)


_ADE_150, _ADE_847, _VOC_2010, _VOC_2012 = (
    "ADEChallengeData2016",
    "ADE20K_2021_17_01",
    "VOCdevkit/VOC2010",
    "VOCdevkit/VOC2012",
)
_PC_59_DETECTRON2 = Layout(f"{_VOC_2010}/JPEGImages", f"{_VOC_2010}/annotations_detectron2/pc59_{{split}}", void=255)

SEMANTIC_FORMATS: dict[str, SemanticFormat] = {
    "ade20k-150": SemanticFormat(
        "ADE20K, 150 classes",
        150,
        "ade20k",
        (
            Layout(f"{_ADE_150}/images/{{long}}", f"{_ADE_150}/annotations_detectron2/{{long}}", void=255),
            Layout(f"{_ADE_150}/images/{{long}}", f"{_ADE_150}/annotations/{{long}}", void=0, first=1),
        ),
    ),
    "ade20k-847": SemanticFormat(
        "ADE20K, 847 classes",
        847,
        "ade20k-847.txt",
        (Layout(f"{_ADE_847}/images_detectron2/{{long}}", f"{_ADE_847}/annotations_detectron2/{{long}}", void=65535),),
    ),
    "pascal-context-59": SemanticFormat(
        "Pascal Context, 59 classes",
        59,
        "pascal-context-59.txt",
        (Layout("pascal_ctx_d2/images/{long}", "pascal_ctx_d2/annotations_ctx59/{long}", void=255),),
        # Both are 0 to 58 with 255: which script wrote them cannot be seen in the files.
        otherwise="VOCdevkit/VOC2010/annotations_detectron2/pc59_* is written by two scripts in two orders of the "
        "classes: name the format pascal-context-59-alphabetical for CAT-Seg's, with 0 aeroplane and 1 bag, or "
        "pascal-context-59-voc-first for OV-Seg's, with 0 aeroplane and 1 bicycle",
    ),
    "pascal-context-59-alphabetical": SemanticFormat(
        "Pascal Context, 59 classes by name", 59, "pascal-context-59.txt", (_PC_59_DETECTRON2,)
    ),
    "pascal-context-59-voc-first": SemanticFormat(
        "Pascal Context, 59 classes, those of VOC first", 59, "pascal-context-59-voc-first.txt", (_PC_59_DETECTRON2,)
    ),
    "pascal-context-459": SemanticFormat(
        "Pascal Context, 459 classes",
        459,
        "pascal-context-459.txt",
        (
            Layout(f"{_VOC_2010}/JPEGImages", f"{_VOC_2010}/annotations_detectron2/pc459_{{split}}", void=65535),
            Layout("pascal_ctx_d2/images/{long}", "pascal_ctx_d2/annotations_ctx459/{long}", void=65535),
        ),
    ),
    "voc-21": SemanticFormat(
        "Pascal VOC 2012, 20 classes and background",
        21,
        "voc-21.txt",
        (
            Layout(
                f"{_VOC_2012}/JPEGImages",
                f"{_VOC_2012}/SegmentationClass",
                void=255,
                listing=f"{_VOC_2012}/ImageSets/Segmentation/{{split}}.txt",
            ),
            Layout(f"{_VOC_2012}/JPEGImages", f"{_VOC_2012}/annotations_detectron2/pascal21_{{split}}", void=255),
            Layout("pascal_voc_d2/images/{long}", "pascal_voc_d2/annotations_pascal21/{long}", void=255),
        ),
    ),
}
"""Formats by the name that ``python -m training.evaluate --format`` takes; the first layout that is there is read."""
