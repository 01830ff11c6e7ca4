"""The readers of published semantic sets, on two small pictures in every layout and on broken copies."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from odise_rt.errors import DatasetError, OptionsError
from odise_rt.vocabulary import Vocabulary
from training.data.semantic_formats import SEMANTIC_FORMATS
from training.data.semantic_sets import VOID, SemanticSet

V10, V12 = "VOCdevkit/VOC2010", "VOCdevkit/VOC2012"
ADE, FULL = "ADEChallengeData2016", "ADE20K_2021_17_01"
CONTEXT, VOC = "pascal_ctx_d2", "pascal_voc_d2"
LAYOUTS = {
    "ade raw": ("ade20k-150", f"{ADE}/images/validation", f"{ADE}/annotations/validation", "png", 0, 1),
    "ade": ("ade20k-150", f"{ADE}/images/validation", f"{ADE}/annotations_detectron2/validation", "png", 255, 0),
    "ade full": (
        "ade20k-847",
        f"ade/{FULL}/images_detectron2/validation",
        f"ade/{FULL}/annotations_detectron2/validation",
        "tif",
        65535,
        0,
    ),
    "context 59": (
        "pascal-context-59-alphabetical",
        f"{V10}/JPEGImages",
        f"{V10}/annotations_detectron2/pc59_val",
        "png",
        255,
        0,
    ),
    "context 59 d2": (
        "pascal-context-59",
        f"{CONTEXT}/images/validation",
        f"{CONTEXT}/annotations_ctx59/validation",
        "png",
        255,
        0,
    ),
    "context 459": (
        "pascal-context-459",
        f"{V10}/JPEGImages",
        f"{V10}/annotations_detectron2/pc459_val",
        "tif",
        65535,
        0,
    ),
    "context 459 d2": (
        "pascal-context-459",
        f"{CONTEXT}/images/validation",
        f"{CONTEXT}/annotations_ctx459/validation",
        "tif",
        65535,
        0,
    ),
    "voc raw": ("voc-21", f"{V12}/JPEGImages", f"{V12}/SegmentationClass", "png", 255, 0),
    "voc": ("voc-21", f"{V12}/JPEGImages", f"{V12}/annotations_detectron2/pascal21_val", "png", 255, 0),
    "voc d2": ("voc-21", f"{VOC}/images/validation", f"{VOC}/annotations_pascal21/validation", "png", 255, 0),
}


def truths(classes: int) -> list[np.ndarray]:
    """Class indices of two pictures of 4 x 6 pixels: the first and the last class, the second class, and void."""
    first = np.zeros((4, 6), np.int32)
    first[2:], first[0, 0] = classes - 1, VOID
    second = np.ones((4, 6), np.int32)
    second[:, 5] = VOID
    return [first, second]


def write_layout(root: Path, layout: str) -> str:
    """Two pictures with their label maps; returns the format."""
    name, images, labels, suffix, void, first = LAYOUTS[layout]
    for folder in (images, labels):
        (root / folder).mkdir(parents=True)
    for stem, truth in zip(("one", "two"), truths(SEMANTIC_FORMATS[name].classes), strict=True):
        Image.fromarray(np.full((4, 6, 3), 99, np.uint8)).save(root / images / f"{stem}.jpg")
        values = np.where(truth == VOID, void, truth + first).astype(np.uint16 if suffix == "tif" else np.uint8)
        picture = Image.fromarray(values)
        if layout == "voc raw":
            picture.putpalette([value for i in range(256) for value in (i * 37 % 256, i * 91 % 256, i)])
        picture.save(root / labels / f"{stem}.{suffix}")
    if "JPEGImages" in images:  # pictures of other splits lie there too
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / images / "other.jpg")
    if layout == "voc raw":
        listing = root / V12 / "ImageSets" / "Segmentation" / "val.txt"
        listing.parent.mkdir(parents=True)
        listing.write_text("one\ntwo\n")
    return name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_pictures_and_class_indices(tmp_path: Path, layout: str) -> None:
    name = write_layout(tmp_path, layout)
    data = SemanticSet.from_root(tmp_path, name)
    assert data.image_ids == ["one", "two"]
    assert len(data.vocabulary) == SEMANTIC_FORMATS[name].classes
    for example, truth in zip(data, truths(len(data.vocabulary)), strict=True):
        assert example.image.shape == (4, 6, 3)
        assert example.class_map.dtype == np.int32
        assert np.array_equal(example.class_map, truth)
    assert data[1].file_name == "two.jpg"


@pytest.mark.parametrize(
    ("layout", "inside"),
    [("ade raw", ADE), ("ade full", f"ade/{FULL}"), ("voc raw", "VOCdevkit"), ("voc raw", V12), ("voc d2", VOC)],
)
def test_the_root_may_be_the_sets_own_folder(tmp_path: Path, layout: str, inside: str) -> None:
    name = write_layout(tmp_path, layout)
    assert len(SemanticSet.from_root(tmp_path / inside, name)) == 2


def test_the_training_split_lies_beside(tmp_path: Path) -> None:
    write_layout(tmp_path, "ade raw")
    for folder in ("images", "annotations"):
        (tmp_path / ADE / folder / "validation").rename(tmp_path / ADE / folder / "training")
    assert len(SemanticSet.from_root(tmp_path, "ade20k-150", "train")) == 2
    with pytest.raises(OptionsError, match="'test': expected val or train"):
        SemanticSet.from_root(tmp_path, "ade20k-150", "test")


def test_pictures_may_be_png_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    write_layout(tmp_path, "ade")
    images = tmp_path / ADE / "images" / "validation"
    Image.open(images / "one.jpg").save(images / "one.PNG")
    (images / "one.jpg").unlink()
    (images / "._two.jpg").write_bytes(b"")
    assert [example.file_name for example in SemanticSet.from_root(tmp_path, "ade20k-150")] == ["one.PNG", "two.jpg"]


def test_label_lists_have_the_published_order() -> None:
    names = {name: facts.vocabulary().names for name, facts in SEMANTIC_FORMATS.items()}
    assert {name: len(found) for name, found in names.items()} == {
        "ade20k-150": 150,
        "ade20k-847": 847,
        "pascal-context-59": 59,
        "pascal-context-59-alphabetical": 59,
        "pascal-context-59-voc-first": 59,
        "pascal-context-459": 459,
        "voc-21": 21,
    }
    for name, facts in SEMANTIC_FORMATS.items():
        assert [c.id for c in facts.vocabulary()] == list(range(facts.classes)), name
    assert names["voc-21"][:2] == ("background", "aeroplane")
    assert names["voc-21"][20] == "tv monitor"
    assert names["ade20k-150"][149] == "flag"
    places = {0: "wall", 99: "aircraft carrier", 199: "bucket", 299: "coffee maker", 399: "shops", 499: "windshield"}
    places |= {599: "urinal", 699: "spice rack", 799: "bonfire", 846: "adding machine"}
    assert {place: names["ade20k-847"][place] for place in places} == places
    # Pascal Context's 59 classes are these of its 459 (numbers from 1), in this order.
    published = (
        *(2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158),
        *(159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360),
        *(366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458),
    )
    assert tuple(names["pascal-context-459"][number - 1] for number in published) == names["pascal-context-59"]
    # One folder's files come in two orders.
    assert names["pascal-context-59-alphabetical"] == names["pascal-context-59"]
    voc_first = names["pascal-context-59-voc-first"]
    assert voc_first[:20] == tuple("table" if name == "dining table" else name for name in names["voc-21"][1:])
    assert voc_first[20:24] == ("bag", "bed", "bench", "book")
    assert sorted(voc_first) == sorted(names["pascal-context-59"])


def test_label_maps_in_an_order_that_nobody_named_are_not_read(tmp_path: Path) -> None:
    write_layout(tmp_path, "context 59")
    with pytest.raises(DatasetError, match=r"two scripts in two orders.*59-alphabetical for CAT-Seg's.*59-voc-first"):
        SemanticSet.from_root(tmp_path, "pascal-context-59")
    assert SemanticSet.from_root(tmp_path, "pascal-context-59-voc-first").vocabulary.names[1] == "bicycle"
    write_layout(tmp_path, "context 59 d2")
    assert len(SemanticSet.from_root(tmp_path, "pascal-context-59")) == 2


def test_other_words_must_be_as_many(tmp_path: Path) -> None:
    name = write_layout(tmp_path, "voc d2")
    words = Vocabulary.from_lists([f"word {i}" for i in range(21)])
    assert SemanticSet.from_root(tmp_path, name, vocabulary=words).vocabulary.names[3] == "word 3"
    with pytest.raises(OptionsError, match="2 classes were given for voc-21: expected 21"):
        SemanticSet.from_root(tmp_path, name, vocabulary=Vocabulary.parse("a; b"))


LABELS = Path(ADE, "annotations", "validation")
IMAGES = Path(ADE, "images", "validation")


def _save(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


def _png_header(width: int, height: int) -> bytes:
    """A grey PNG that ends where its pixels should begin."""
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT")
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


READ_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "sizes differ": (
        lambda root: _save(root / LABELS / "one.png", np.ones((4, 5), np.uint8)),
        r"one.png \(image id one\) has 5x4 pixels, but the picture has 6x4",
    ),
    "value beyond the classes": (
        lambda root: _save(root / LABELS / "one.png", np.full((4, 6), 151, np.uint8)),
        r"one.png \(image id one\) holds \[151\]: expected classes 1 to 150, or 0 for void",
    ),
    "colours": (
        lambda root: _save(root / LABELS / "one.png", np.ones((4, 6, 3), np.uint8)),
        r"one.png \(image id one\) has Pillow's mode 'RGB'",
    ),
    "broken label map": (
        lambda root: (root / LABELS / "one.png").write_bytes(b"\x89PNG\r\n"),
        r"one.png \(image id one\) cannot be read",
    ),
    "broken picture": (
        lambda root: (root / IMAGES / "one.jpg").write_bytes(b"no"),
        r"one.jpg \(image id one\) cannot be read",
    ),
    "too large": (
        lambda root: (root / LABELS / "one.png").write_bytes(_png_header(8000, 8001)),
        r"one.png \(image id one\) has 8000x8001 pixels: at most 64,000,000",
    ),
    "far too large": (
        lambda root: (root / LABELS / "one.png").write_bytes(_png_header(60_000, 60_000)),
        r"one.png \(image id one\) cannot be read",
    ),
}


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_a_broken_picture_names_its_file_and_image_id(tmp_path: Path, fault: str) -> None:
    spoil, message = READ_FAULTS[fault]
    write_layout(tmp_path, "ade raw")
    spoil(tmp_path)
    data = SemanticSet.from_root(tmp_path, "ade20k-150")
    with pytest.raises(DatasetError, match=message):
        data[0]
    assert data[1].image_id == "two"


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


LISTING = Path(V12, "ImageSets", "Segmentation", "val.txt")
OPEN_FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no label map": ("ade raw", lambda root: (root / LABELS / "two.png").unlink(), r"no label map for two.jpg \(image"),
    "no picture": ("ade raw", lambda root: (root / IMAGES / "two.jpg").unlink(), "no picture for .* image id two"),
    "empty folder": ("ade raw", lambda root: _empty(root / LABELS), "holds no label map"),
    "twice": (
        "ade raw",
        lambda root: _save(root / LABELS / "one.tif", np.ones((4, 6), np.uint8)),
        "holds one.png and one.tif",
    ),
    "listed, no label map": (
        "voc raw",
        lambda root: (root / LISTING).write_text("one\nother\n"),
        r"no label map for other.jpg \(image id other\)",
    ),
    "listed outside": (
        "voc raw",
        lambda root: (root / LISTING).write_text("../../one\n"),
        "no picture for .* ../../one",
    ),
    "listed twice": ("voc raw", lambda root: (root / LISTING).write_text("one\none\n"), "names one twice"),
    "empty listing": ("voc raw", lambda root: (root / LISTING).write_text("\n"), "val.txt is empty"),
    "listing not text": ("voc raw", lambda root: (root / LISTING).write_bytes(b"\xff\xfe"), "cannot be read as a list"),
}


@pytest.mark.parametrize("fault", OPEN_FAULTS)
def test_folders_that_do_not_belong_together_are_refused(tmp_path: Path, fault: str) -> None:
    layout, spoil, message = OPEN_FAULTS[fault]
    name = write_layout(tmp_path, layout)
    spoil(tmp_path)
    with pytest.raises(DatasetError, match=message):
        SemanticSet.from_root(tmp_path, name)


def test_nothing_found_lists_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / V12 / "JPEGImages").mkdir(parents=True)
    with pytest.raises(DatasetError) as caught:
        SemanticSet.from_root(tmp_path, "voc-21")
    message = str(caught.value)
    for folder in (f"{V12}/SegmentationClass (missing)", f"{V12}/ImageSets/Segmentation/val.txt (missing)"):
        assert folder in message
    assert f"{VOC}/annotations_pascal21/validation (missing)" in message
    assert f"{V12}/JPEGImages with" in message, "what is there is not called missing"
    with pytest.raises(OptionsError, match="unknown format 'cityscapes': expected one of ade20k-150"):
        SemanticSet.from_root(tmp_path, "cityscapes")


def test_voc_labels_without_background_are_not_taken_for_the_21_classes(tmp_path: Path) -> None:
    # Preparation for 20 classes writes VOC2012/annotations_detectron2/val, in which 0 is aeroplane.
    (tmp_path / V12 / "JPEGImages").mkdir(parents=True)
    (tmp_path / V12 / "annotations_detectron2" / "val").mkdir(parents=True)
    with pytest.raises(DatasetError, match="is not under"):
        SemanticSet.from_root(tmp_path, "voc-21")
