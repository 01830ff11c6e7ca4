"""The reader of COCO panoptic data, on the committed scenes and on broken copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from odise_rt.errors import DatasetError, OptionsError
from odise_rt.vocabulary import Vocabulary
from training.data.coco_panoptic import CocoPanoptic, decode_ids, parts_of
from training.evaluation import data_vocabulary
from training.run_setup import training_categories

FIXTURE = Path(__file__).parents[2] / "fixtures" / "sticker_world"
PANOPTIC = Path("annotations/panoptic_train.json")
CAPTIONS = Path("annotations/captions_train.json")
FIRST_PNG = Path("panoptic_train/000000000001.png")
FIRST_JPG = Path("train/000000000001.jpg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A writable copy of the committed scenes."""
    shutil.copytree(FIXTURE, tmp_path / "world")
    return tmp_path / "world"


def edit(root: Path, name: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((root / name).read_text())
    change(content)
    (root / name).write_text(json.dumps(content))


def test_reads_pictures_segments_and_captions() -> None:
    data = CocoPanoptic.from_root(FIXTURE, "train")
    assert len(data) == 4
    assert data.image_ids == [1, 2, 3, 4]
    infos = json.loads((FIXTURE / PANOPTIC).read_text())["annotations"]
    for example, annotation in zip(data, infos, strict=True):
        assert example.image.shape == (128, 128, 3)
        assert example.image.dtype == np.uint8
        assert example.segment_map.dtype == np.int32
        assert len(example.captions) == 5
        for segment, info in zip(example.segments, annotation["segments_info"], strict=True):
            rows, columns = np.nonzero(example.segment_map == segment.id)
            assert len(rows) == info["area"] == segment.area
            left, top, width, height = info["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (width, height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)


def test_categories_have_synonyms_and_contiguous_indices() -> None:
    data = CocoPanoptic.from_root(FIXTURE, "train")
    by_name = {category.name: category for category in data.categories}
    assert by_name["automobile"].synonyms == ("automobile", "car")
    assert by_name["automobile"].isthing
    assert not by_name["grass"].isthing
    assert sorted(data.index_of.values()) == list(range(len(data.categories)))


def test_categories_of_agrees_with_the_segments() -> None:
    data = CocoPanoptic.from_root(FIXTURE, "val")
    for index in range(len(data)):
        assert data.categories_of(index) == {segment.category_id for segment in data[index].segments}


def test_a_category_of_crowds_alone_stays_unseen(root: Path) -> None:
    def only_crowds(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["iscrowd"] = int(segment["category_id"] == crowd)

    crowd = CocoPanoptic.from_root(root, "train")[0].segments[0].category_id
    edit(root, PANOPTIC, only_crowds)
    used = {category.id for category in training_categories(CocoPanoptic.from_root(root, "train"))}
    assert used
    assert crowd not in used
    edit(
        root,
        PANOPTIC,
        lambda content: [s.update(iscrowd=1) for a in content["annotations"] for s in a["segments_info"]],
    )
    with pytest.raises(DatasetError, match="no segment that is no crowd"):
        training_categories(CocoPanoptic.from_root(root, "train"))


def test_captions_are_optional() -> None:
    data = CocoPanoptic.from_root(FIXTURE, "train", with_captions=False)
    assert data[0].captions == ()


def test_captions_that_nothing_needs_may_be_incomplete(root: Path) -> None:
    edit(root, CAPTIONS, lambda content: content.update(annotations=content["annotations"][5:]))
    data = CocoPanoptic.from_root(root, "train", with_captions=None)
    assert [len(example.captions) for example in data] == [0, 5, 5, 5]
    (root / CAPTIONS).unlink()
    assert CocoPanoptic.from_root(root, "train", with_captions=None)[1].captions == ()


def test_reads_the_layout_of_the_real_coco(root: Path) -> None:
    (root / "panoptic_train").rename(root / "annotations" / "panoptic_train")
    edit(root, PANOPTIC, lambda content: [category.pop("synonyms") for category in content["categories"]])
    data = CocoPanoptic.from_root(root, "train")
    assert data[1].segments
    assert data.categories[0].synonyms == (data.categories[0].name,)


def test_a_folder_of_data_sets_and_the_parts_that_are_there(root: Path, tmp_path: Path) -> None:
    inside = tmp_path / "datasets" / "coco"
    shutil.copytree(root, inside)
    assert len(CocoPanoptic.from_root(inside.parent, "train")) == len(CocoPanoptic.from_root(inside, "train"))
    (inside / "annotations" / "panoptic_train2017.json").write_text("{}")
    parts = parts_of(inside)
    assert {"train", "train2017"} <= set(parts)
    with pytest.raises(DatasetError, match=f"its parts are {', '.join(parts)}: name one of them by --split"):
        CocoPanoptic.from_root(inside.parent, "test")
    with pytest.raises(DatasetError, match=r"panoptic_train.json does not exist.*it has none at all"):
        CocoPanoptic.from_root(tmp_path, "train")


@pytest.mark.parametrize("own", [None, "other ids", "synonyms"])
def test_the_classes_of_coco_have_plain_words(own: str | None, root: Path) -> None:
    def real_coco(content: dict[str, Any]) -> None:
        content["categories"] = [
            {"id": known.id, "name": f"{known.name}-other-merged", "isthing": int(known.isthing)} for known in coco
        ]
        for segment in (s for a in content["annotations"] for s in a["segments_info"]):
            segment["category_id"] = 187
        if own == "other ids":
            content["categories"].append({"id": 201, "name": "zebra crossing", "isthing": 0})
        if own == "synonyms":
            content["categories"][0]["synonyms"] = ["man"]

    coco = Vocabulary.builtin("coco")
    edit(root, PANOPTIC, real_coco)
    data = CocoPanoptic.from_root(root, "train")
    asked = data_vocabulary(data.categories)  # by training and evaluation alike
    assert (asked.words == coco.words) == (own is None)
    assert {c.id: c.name for c in data.categories}[187] == ("sky" if own is None else "sky-other-merged")
    assert [c.isthing for c in data.categories][:133] == coco.isthing.tolist()
    assert [category.name for category in training_categories(data)] == [data.categories[data.index_of[187]].name]


def test_a_grey_picture_becomes_rgb_and_crowds_are_kept(root: Path) -> None:
    Image.open(root / FIRST_JPG).convert("L").save(root / FIRST_JPG)
    edit(root, PANOPTIC, lambda content: content["annotations"][0]["segments_info"][0].update(iscrowd=1))
    example = CocoPanoptic.from_root(root, "train")[0]
    assert example.image.shape == (128, 128, 3)
    assert example.segments[0].iscrowd


TWIN = {"category_id": 1}
"""A stuff class whose colour, and so id, is that of another one in the same picture: ADE20K's road and skyscraper."""


def _ade20k(root: Path, tmp_path: Path) -> Path:
    """The committed scenes as Mask2Former's preparation of ADE20K would lay and name them; returns the data root."""
    folder = tmp_path / "datasets" / "ADEChallengeData2016"
    (folder / "images").mkdir(parents=True)
    shutil.copytree(root / "train", folder / "images" / "validation")
    shutil.copytree(root / "panoptic_train", folder / "ade20k_panoptic_val")
    content = json.loads((root / PANOPTIC).read_text())
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        image["id"] = annotation["image_id"] = f"ADE_val_{image['id']:08d}"
    _add_ghost(content)
    content["annotations"][1]["segments_info"].append({**content["annotations"][1]["segments_info"][0], **TWIN})
    (folder / "ade20k_panoptic_val.json").write_text(json.dumps(content))
    return tmp_path / "datasets"


def test_ade20k_has_names_for_ids_covered_segments_and_twins(root: Path, tmp_path: Path) -> None:
    datasets = _ade20k(root, tmp_path)
    data = CocoPanoptic.from_ade20k(datasets, "val")
    assert data.image_ids[0] == data[0].image_id == "ADE_val_00000001"
    assert data[0].segments[-1].id == 99, "a segment without pixels is kept, to count as missed"
    twins = [segment for segment in data[1].segments if segment.id == data[1].segments[0].id]
    assert [segment.category_id for segment in twins] == [TWIN["category_id"]], "the last of an id counts"
    assert data.categories_of(1) == {segment.category_id for segment in data[1].segments}
    assert len(CocoPanoptic.from_ade20k(datasets / "ADEChallengeData2016", "val")) == 4
    with pytest.raises(DatasetError, match=r"ade20k_panoptic_train.json \(missing\)"):
        CocoPanoptic.from_ade20k(datasets, "train")
    with pytest.raises(OptionsError, match="'test': expected val or train"):
        CocoPanoptic.from_ade20k(datasets, "test")


def test_decode_ids_is_little_endian_in_the_channels() -> None:
    assert decode_ids(np.array([[[1, 2, 3]]], np.uint8)).tolist() == [[1 + 2 * 256 + 3 * 65536]]


def _paint_stranger(root: Path) -> None:
    colours = np.asarray(Image.open(root / FIRST_PNG)).copy()
    colours[:5, :5] = 1, 1, 1
    Image.fromarray(colours).save(root / FIRST_PNG)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:600])


def _add_ghost(content: dict[str, Any]) -> None:
    content["annotations"][0]["segments_info"].append({"id": 99, "category_id": 1, "iscrowd": 0, "area": 5})


def _first_annotation(**changes: Any) -> Callable[[Path], object]:
    return lambda root: edit(root, PANOPTIC, lambda content: content["annotations"][0].update(changes))


def _first_segment(**changes: Any) -> Callable[[Path], object]:
    return lambda root: edit(
        root, PANOPTIC, lambda content: content["annotations"][0]["segments_info"][0].update(changes)
    )


READ_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "id in the PNG only": (_paint_stranger, r"ids only in the PNG \[65793\]"),
    "id in the JSON only": (lambda root: edit(root, PANOPTIC, _add_ghost), r"ids only in the JSON \[99\]"),
    "mask of another size": (
        lambda root: Image.open(root / FIRST_PNG).resize((64, 64), 0).save(root / FIRST_PNG),
        r"000000000001.png \(image id 1\) has 64x64 pixels, but the picture has 128x128",
    ),
    "truncated picture": (lambda root: _truncate(root / FIRST_JPG), "000000000001.jpg .* cannot be read"),
    "truncated mask": (lambda root: _truncate(root / FIRST_PNG), "000000000001.png .* cannot be read"),
    "picture gone": (lambda root: (root / FIRST_JPG).unlink(), "000000000001.jpg .* does not exist"),
    "unknown category": (
        lambda root: edit(
            root, PANOPTIC, lambda content: content["annotations"][0]["segments_info"][0].update(category_id=5000)
        ),
        "names category 5000",
    ),
    "segment without category": (
        lambda root: edit(
            root, PANOPTIC, lambda content: content["annotations"][0]["segments_info"][0].pop("category_id")
        ),
        "lacks 'category_id'",
    ),
    "id used twice": (
        lambda root: edit(
            root,
            PANOPTIC,
            lambda content: content["annotations"][0]["segments_info"].append(
                content["annotations"][0]["segments_info"][0]
            ),
        ),
        "uses an id twice",
    ),
    "id zero": (
        lambda root: edit(root, PANOPTIC, lambda content: content["annotations"][0]["segments_info"][0].update(id=0)),
        "ids start at 1",
    ),
    "id that is text": (_first_segment(id="first"), "has id 'first': expected a whole number"),
    "id that is a fraction": (_first_segment(id=1.5), "has id 1.5: expected a whole number"),
    "category that is null": (_first_segment(category_id=None), "has category_id None: expected a whole number"),
    "crowd that is text": (_first_segment(iscrowd="no"), "has iscrowd 'no': expected 0 or 1"),
    "area of nothing": (_first_segment(area=0), "has area 0: expected a number above 0"),
    "area that is text": (_first_segment(area="9"), "has area '9': expected a number above 0"),
    "area without end": (_first_segment(area=float("inf")), "has area inf: expected a number above 0"),
    "segments that are null": (_first_annotation(segments_info=None), "has segments_info None: expected a list"),
    "segments that are numbers": (_first_annotation(segments_info=[7]), "lacks 'category_id'"),
    "mask without a name": (_first_annotation(file_name=None), "has file_name None: expected text"),
    "mask without colours": (
        lambda root: Image.open(root / FIRST_PNG).convert("L").save(root / FIRST_PNG),
        "has Pillow's mode 'L': expected the colours",
    ),
    "mask that is gone": (lambda root: (root / FIRST_PNG).unlink(), "000000000001.png .* does not exist"),
}


def test_odd_numbers_that_stand_for_themselves(root: Path) -> None:
    """Ids of categories are names, of any size; ids written as text, and palettes with the right colours."""

    def renumber(content: dict[str, Any]) -> None:
        odd = {
            category["id"]: number for category, number in zip(content["categories"], (0, 255, 70_000), strict=False)
        }
        for entry in (*content["categories"], *(s for a in content["annotations"] for s in a["segments_info"])):
            key = "category_id" if "category_id" in entry else "id"
            entry[key] = str(odd.get(entry[key], 1_000_000 + entry[key]))
        content["annotations"][0]["image_id"] = "1"
        content["annotations"][0]["segments_info"][0].update(area=None, bbox=None)

    before = CocoPanoptic.from_root(root, "train")[0]
    edit(root, PANOPTIC, renumber)
    Image.open(root / FIRST_PNG).convert("P", palette=Image.Palette.ADAPTIVE).save(root / FIRST_PNG)
    data = CocoPanoptic.from_root(root, "train")
    assert {0, 255, 70_000} <= set(data.index_of)
    assert np.array_equal(data[0].segment_map, before.segment_map)
    assert [segment.id for segment in data[0].segments] == [segment.id for segment in before.segments]
    assert data[0].segments[0].area is None


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_a_broken_picture_names_its_file_and_image_id(root: Path, fault: str) -> None:
    spoil, message = READ_FAULTS[fault]
    spoil(root)
    data = CocoPanoptic.from_root(root, "train")
    with pytest.raises(DatasetError, match=message) as caught:
        data[0]
    assert "image id 1" in str(caught.value)
    assert data[1].image_id == 2


OPEN_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda root: (root / PANOPTIC).unlink(), "does not exist"),
    "not JSON": (lambda root: (root / PANOPTIC).write_text("{"), "cannot be read as JSON"),
    "a list": (lambda root: (root / PANOPTIC).write_text("[]"), "holds a list"),
    "no categories": (lambda root: edit(root, PANOPTIC, lambda c: c.pop("categories")), "lacks the list 'categories'"),
    "no images": (lambda root: edit(root, PANOPTIC, lambda c: c.update(images=[])), "'images' is empty"),
    "image without annotation": (
        lambda root: edit(root, PANOPTIC, lambda c: c["annotations"].pop(2)),
        r"image id 3 \(000000000003.jpg\) has no annotation",
    ),
    "annotated twice": (
        lambda root: edit(root, PANOPTIC, lambda c: c["annotations"].append(c["annotations"][0])),
        "image id 1 is annotated twice",
    ),
    "image id of no kind": (
        lambda root: edit(root, PANOPTIC, lambda c: c["images"][1].update(id=None)),
        r"images\[1\] has id None: expected a whole number",
    ),
    "categories share an id": (
        lambda root: edit(root, PANOPTIC, lambda c: c["categories"][0].update(id=2)),
        "two categories share an id",
    ),
    "captions missing": (
        lambda root: edit(root, CAPTIONS, lambda c: c.update(annotations=c["annotations"][5:])),
        "image id 1 .* has no caption",
    ),
    "captions without text": (
        lambda root: edit(root, CAPTIONS, lambda c: c["annotations"][7].pop("caption")),
        r"image id 2 lacks 'caption'",
    ),
    "empty caption": (
        lambda root: edit(root, CAPTIONS, lambda c: c["annotations"][0].update(caption=" ")),
        "image id 1 has caption ' ': expected text",
    ),
    "an image twice": (
        lambda root: edit(root, PANOPTIC, lambda c: c["images"].append(c["images"][1])),
        "two images have the id 2",
    ),
    "picture without a name": (
        lambda root: edit(root, PANOPTIC, lambda c: c["images"][1].update(file_name=None)),
        "image id 2 has file_name None: expected text",
    ),
    "category that is no object": (
        lambda root: edit(root, PANOPTIC, lambda c: c["categories"].append("dog")),
        "a category lacks 'id'",
    ),
    "category that is neither thing nor stuff": (
        lambda root: edit(root, PANOPTIC, lambda c: c["categories"][0].update(isthing="yes")),
        "has isthing 'yes': expected 0 or 1",
    ),
    "synonyms that are one text": (
        lambda root: edit(root, PANOPTIC, lambda c: c["categories"][0].update(synonyms="dog")),
        "has synonyms 'dog': expected a list of texts",
    ),
}


@pytest.mark.parametrize("fault", OPEN_FAULTS)
def test_a_broken_annotation_file_is_refused(root: Path, fault: str) -> None:
    spoil, message = OPEN_FAULTS[fault]
    spoil(root)
    with pytest.raises(DatasetError, match=message):
        CocoPanoptic.from_root(root, "train")
