"""Evaluation of a checkpoint from the command line, and of a segmenter that is right by construction."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import training.evaluation_loop
from odise_rt import rle
from odise_rt.errors import OptionsError
from odise_rt.options import SegmentOptions
from odise_rt.results import Instance, Segment
from odise_rt.vocabulary import Vocabulary
from training import evaluate as evaluate_command
from training.data.coco_instances import CocoInstances
from training.data.coco_panoptic import CocoPanoptic, PanopticExample
from training.data.semantic_formats import SEMANTIC_FORMATS, Layout
from training.data.semantic_sets import VOID, SemanticSet
from training.evaluate import main, summary
from training.evaluation import METRICS, PanopticScorer, data_vocabulary, evaluate, semantic_truth
from training.evaluation_loop import EvaluationReport, distinct_names
from training.models.odise import Odise
from training.picture_page import BestAndWorst
from training.semantic_evaluation import evaluate_semantic

ODISE_TINY = Path(__file__).parents[2] / "training" / "pretrained" / "odise-tiny"


class Oracle:
    """Answers with the truth, except that every ball of picture 2 is called a zebra."""

    def __init__(self, data: CocoPanoptic) -> None:
        self.data = data
        self.truths = {example.image.tobytes(): example for example in data}
        facts = SimpleNamespace(variant="label")
        self.bundle = SimpleNamespace(
            name="oracle", facts=facts, precision="exact", training_vocabulary=frozenset({"sky", "lawn"})
        )

    def segment(self, image: np.ndarray, vocabulary: Vocabulary, options: SegmentOptions) -> SimpleNamespace:
        example = self.truths[image.tobytes()]
        semantic = np.full(example.segment_map.shape, -1, np.int32)
        segments, instances = [], []
        for truth in example.segments:
            index = self.data.index_of[truth.category_id]
            mask = example.segment_map == truth.id
            if not mask.any():
                continue  # covered: nobody can find it
            if example.image_id == 2 and vocabulary[index].name == "ball":
                index += 1
            name, isthing = vocabulary[index].name, vocabulary[index].isthing
            segments.append(Segment(truth.id, name, index, 0.9, int(mask.sum()), (0, 0, 1, 1), isthing))
            semantic[mask] = index
            if isthing:
                box = (0, 0, mask.shape[1], mask.shape[0])
                bits = np.packbits(mask)
                instances.append(Instance(name, index, 0.9, int(mask.sum()), box, mask.shape, bits))
        return SimpleNamespace(
            segment_map=example.segment_map,
            segments=tuple(segments),
            semantic_map=semantic if "semantic" in options.outputs else None,
            instances=tuple(instances) if "instance" in options.outputs else None,
            facts=SimpleNamespace(engine="oracle"),
        )


def test_an_oracle_with_one_wrong_name(mini_data: Path) -> None:
    data = CocoPanoptic.from_root(mini_data, "val", with_captions=False)
    kept = BestAndWorst(data, count=1)
    report = evaluate(Oracle(data), data, range(3), METRICS, keep=kept)  # type: ignore[arg-type]
    assert report.pq["stuff"]["pq"] == pytest.approx(100)
    # ball: two of three found, none invented; zebra: one invented.
    assert report.by_category["ball"]["pq"] == pytest.approx(100 * 2 / 2.5)
    assert report.by_category["zebra"]["pq"] == 0
    assert report.pq["all"] == pytest.approx({"pq": 70.0, "sq": 75.0, "rq": 70.0, "categories": 4})
    assert report.pq["seen"]["pq"] == pytest.approx(100)
    assert report.pq["seen"]["categories"] == 2, "grass counts as seen by its synonym lawn"
    assert report.pq["unseen"]["pq"] == pytest.approx(40)
    assert report.miou["stuff"]["miou"] == pytest.approx(100)
    assert report.miou["all"]["classes"] == 3
    assert report.miou["all"]["miou_with_predicted"] == pytest.approx(report.miou["all"]["miou"] * 3 / 4), "zebra"
    lines = dict(summary(report))
    assert lines["mIoU stuff"] == "100.0 (100.0 with classes that are only predicted, pixel accuracy 100.0, 2 classes)"
    assert report.by_category["sky"]["iou"] == pytest.approx(100)
    assert "iou" not in report.by_category["zebra"], "no zebra in the truth"
    assert report.ap["all"]["ap50"] == pytest.approx(100 * 67 / 101)  # recall 2/3 at full precision, 101 points
    assert kept.worst[0][1] == 2
    page = kept.page("oracle", [("PQ", "70")])
    assert page.count("<img") == 2
    assert "image 2" in page


@pytest.mark.parametrize("first", [0, 1, 3])
def test_what_processes_count_adds_up(first: int, mini_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = CocoPanoptic.from_root(mini_data, "val", with_captions=False)
    alone, together, other = (BestAndWorst(data, count=2) for _ in range(3))
    whole = evaluate(Oracle(data), data, range(3), METRICS, keep=alone)  # type: ignore[arg-type]
    sent: list[bytes] = []
    monkeypatch.setattr(training.evaluation_loop, "share_of", lambda indices: indices[first:])
    monkeypatch.setattr(training.evaluation_loop, "gathered", lambda value: sent.append(pickle.dumps(value)) or [])
    evaluate(Oracle(data), data, range(3), METRICS, keep=other, shared=True)  # type: ignore[arg-type]
    monkeypatch.setattr(training.evaluation_loop, "share_of", lambda indices: indices[:first])
    monkeypatch.setattr(training.evaluation_loop, "gathered", lambda value: [value, pickle.loads(sent[0])])
    report = evaluate(Oracle(data), data, range(3), METRICS, keep=together, shared=True)  # type: ignore[arg-type]
    assert dataclasses.replace(report, seconds_per_picture=whole.seconds_per_picture).to_dict() == whole.to_dict()
    together.merge(other.best, other.worst)
    assert [[e[:2] for e in kept] for kept in (together.best, together.worst)] == [
        [e[:2] for e in kept] for kept in (alone.best, alone.worst)
    ]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(mini_data: Path, tmp_path: Path) -> None:
    flags = [str(ODISE_TINY), "--data", str(mini_data), "--device", "cpu", "--threads", "1"]
    assert main([*flags, "--out", str(tmp_path / "one")]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "training.evaluate", *flags, "--out", str(tmp_path / "two")]
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    logs = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two.pop("seconds_per_picture") > 0
    assert two == {key: one[key] for key in two}
    pictures = [(tmp_path / name / "pictures.html").read_text() for name in ("one", "two")]
    assert re.findall('src="[^"]*"', pictures[0]) == re.findall('src="[^"]*"', pictures[1])


def test_several_processes_refuse_a_bundle_on_one_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(tmp_path), "--data", "data", "--out", str(tmp_path / "out")]) == 1
    assert "every process would run on the first GPU" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_on_a_gpu_an_image_stays_there(device: str, mini_frozen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    monkeypatch.setattr(Odise, "to", lambda self, where: moved.append(where) or self)
    with evaluate_command.open_segmenter(mini_frozen, device, None) as segmenter:
        found = segmenter.segment(np.zeros((64, 64, 3), np.uint8), Vocabulary.parse("dog"))
    assert moved == [device]
    assert ("pixels_to_segments" in found.facts.seconds) == (device != "cpu"), "the stages in one"


@pytest.mark.parametrize(
    ("form", "there", "split"),
    [("coco", "val2017", "val2017"), ("coco", "train", "val"), ("voc-21", "val2017", "val")],
)
def test_the_part_that_is_held_out_is_measured(form: str, there: str, split: str, tmp_path: Path) -> None:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / f"panoptic_{there}.json").touch()
    flags = [str(ODISE_TINY), "--data", str(tmp_path), "--format", form, "--out", "out"]
    assert evaluate_command.parse(flags).split == split
    assert evaluate_command.parse([*flags, "--split", "train"]).split == "train"


def write_instances(path: Path, data: CocoPanoptic) -> None:
    """The balls of the panoptic truth, and in the first picture one more behind the others."""
    masks = [(example.image_id, example.segment_map == 3) for example in data]
    masks.append((data.image_ids[0], np.tri(64, dtype=bool)))
    annotations = [
        {"id": i, "image_id": image_id, "category_id": 13, "iscrowd": 0, "segmentation": rle.encode(mask)}
        for i, (image_id, mask) in enumerate(masks)
    ]
    path.write_text(json.dumps({"images": [{"id": i} for i in data.image_ids], "annotations": annotations}))


def test_ap_is_measured_against_instances_that_may_overlap(mini_data: Path, tmp_path: Path) -> None:
    data = CocoPanoptic.from_root(mini_data, "val", with_captions=False)
    write_instances(tmp_path / "instances.json", data)
    instances = CocoInstances(tmp_path / "instances.json", data)
    report = evaluate(Oracle(data), data, range(3), ("ap",), instances=instances)  # type: ignore[arg-type]
    assert report.ap["all"]["ap"] == pytest.approx(100 * 51 / 101), "two of four found"
    assert report.by_category["ball"]["true_positives"] == 2, "PQ is of the panoptic truth"


def test_a_crowd_has_the_class_of_its_pixels(mini_data: Path) -> None:
    data = CocoPanoptic.from_root(mini_data, "val", with_captions=False)
    example = data[0]
    crowds = tuple(dataclasses.replace(segment, iscrowd=True) for segment in example.segments)
    truth = semantic_truth(dataclasses.replace(example, segments=crowds[1:]), data)
    assert np.array_equal(truth, np.where(example.segment_map == 1, -1, example.segment_map - 1))


def test_classes_of_one_name_are_counted_each(mini_data: Path) -> None:
    data = CocoPanoptic.from_root(mini_data, "val", with_captions=False)
    data.categories = tuple(dataclasses.replace(category, name="thing") for category in data.categories[:3])
    report = evaluate(Oracle(data), data, range(1))  # type: ignore[arg-type]
    assert sorted(report.by_category) == ["thing [0]", "thing [1]", "thing [2]"]


def test_void_alone_has_no_score(mini_data: Path) -> None:
    data = CocoPanoptic.from_root(mini_data, "val", with_captions=False)
    scorer = PanopticScorer(data, (), METRICS)
    void = np.zeros((64, 64), np.int32)
    example = PanopticExample(1, "1.png", np.zeros((64, 64, 3), np.uint8), void, (), ())
    found = Segment(1, "sky", 0, 0.9, 64 * 64, (0, 0, 64, 64), False)
    result = SimpleNamespace(segment_map=void + 1, segments=(found,), semantic_map=void, instances=())
    quality, counts = scorer.compare(example, result)  # type: ignore[arg-type]
    assert math.isnan(quality)
    scorer.merge(counts)
    numbers = scorer.numbers()
    report = EvaluationReport("oracle", "none", 1, 0.0, numbers.pq, numbers.miou, numbers.ap, numbers.by_category)
    lines = dict(summary(report))
    assert {lines[f"{metric} all"] for metric in ("PQ", "mIoU", "mask AP")} == {"-"}
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["pq"]["all"] == {"pq": None, "sq": None, "rq": None, "categories": 0}


def test_ade20k_panoptic_has_names_for_ids_and_covered_segments(mini_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ADEChallengeData2016"
    (folder / "images").mkdir(parents=True)
    shutil.copytree(mini_data / "val", folder / "images" / "validation")
    shutil.copytree(mini_data / "panoptic_val", folder / "ade20k_panoptic_val")
    content = json.loads((mini_data / "annotations" / "panoptic_val.json").read_text())
    # Numbers and names mixed, as nothing forbids.
    for image, annotation in list(zip(content["images"], content["annotations"], strict=True))[1:]:
        image["id"] = annotation["image_id"] = f"ADE_val_{image['id']:08d}"
    content["annotations"][0]["segments_info"].append({"id": 9, "category_id": 14, "iscrowd": 0})
    (folder / "ade20k_panoptic_val.json").write_text(json.dumps(content))
    data = CocoPanoptic.from_ade20k(tmp_path, "val")
    report = evaluate(Oracle(data), data, range(3), METRICS)  # type: ignore[arg-type]
    assert report.by_category["zebra"]["false_negatives"] == 1
    assert report.pq["all"] == pytest.approx({"pq": 75.0, "sq": 75.0, "rq": 75.0, "categories": 4})
    assert report.by_category["sky"]["pq"] == pytest.approx(100)
    content["annotations"][0]["segments_info"][0]["area"] *= 4  # a sky that things were pasted over
    (folder / "ade20k_panoptic_val.json").write_text(json.dumps(content))
    covered = CocoPanoptic.from_ade20k(tmp_path, "val")
    sky = evaluate(Oracle(covered), covered, range(3)).by_category["sky"]  # type: ignore[arg-type]
    assert (sky["true_positives"], sky["false_positives"], sky["false_negatives"]) == (2, 1, 1)
    assert report.ap["all"]["ap"] == pytest.approx(100), "what has no pixel is no instance"


def test_the_command_measures_a_checkpoint(mini_data: Path, mini_frozen: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    output = tmp_path / "out"
    instances = tmp_path / "instances.json"
    write_instances(instances, CocoPanoptic.from_root(mini_data, "val", with_captions=False))
    flags = [str(mini_frozen), "--data", str(mini_data), "--out", str(output), "--limit", "2", "--pictures", "1"]
    flags += ["--instances", str(instances)]
    assert main([*flags, "--device", "cpu"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["pictures"] == 2
    assert set(metrics["pq"]) >= {"all", "things", "stuff", "seen", "unseen"}
    assert metrics["pq"]["seen"]["categories"] == 0, "nothing was seen by a checkpoint without vocabulary"
    assert metrics["pq"]["seen"]["pq"] is None
    assert metrics["miou"]
    assert metrics["ap"]
    assert "<img" in (output / "pictures.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics", "fid"], "expected some of pq, miou, ap"),
        (["--overlap-threshold", "2"], "overlap_threshold is 2"),
        (["--instances", "i.json", "--metrics", "pq"], "--metrics leaves AP out"),
        (["--instances", "i.json"], "i.json does not exist"),
    ],
)
def test_wrong_options_say_what_is_right(
    flags: list[str],
    message: str,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(mini_frozen), "--data", str(mini_data), "--out", str(tmp_path), *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_is_neither_checkpoint_nor_bundle(
    mini_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--data", str(mini_data), "--out", str(tmp_path)]) == 1
    assert "neither a checkpoint" in capsys.readouterr().err


def test_vocabulary_keeps_the_data_sets_order(mini_data: Path) -> None:
    vocabulary = data_vocabulary(CocoPanoptic.from_root(mini_data, "val", with_captions=False).categories)
    assert vocabulary.names == ("sky", "grass", "ball", "zebra")
    assert vocabulary.words == ("sky", "grass", "lawn", "ball", "zebra")


def test_other_words_name_the_same_classes(mini_data: Path) -> None:
    data = CocoPanoptic.from_root(mini_data, "val", with_captions=False)
    vocabulary = data_vocabulary(data.categories, Vocabulary.parse("heaven, sky; turf; sphere; horse"))
    assert vocabulary.words == ("heaven", "sky", "turf", "sphere", "horse")
    assert [c.id for c in vocabulary] == [11, 12, 13, 14]
    assert vocabulary.isthing.tolist() == [False, False, True, True]
    with pytest.raises(OptionsError, match="2 classes were given for a data set of 4"):
        data_vocabulary(data.categories, Vocabulary.parse("a; b"))


# ---- semantic sets ---------------------------------------------------------------------------------------------------

TRUTHS = {
    # rows of class indices; "." is void
    "one": ("0011", "0011"),
    "two": ("2222", "22.."),
    "all void": ("....",),
}
ANSWERS = {"one": ("0001", "0011"), "two": ("2220", "2210"), "all void": ("0000",)}


def class_map(rows: tuple[str, ...]) -> np.ndarray:
    return np.array([[VOID if value == "." else int(value) for value in row] for row in rows], np.int32)


class SemanticOracle:
    """Answers with ANSWERS, told apart by the grey value of the picture."""

    bundle = SimpleNamespace(
        name="oracle",
        facts=SimpleNamespace(variant="label"),
        precision="exact",
        training_vocabulary=frozenset({"sky", "lawn"}),
    )

    def segment(self, image: np.ndarray, vocabulary: Vocabulary, options: SegmentOptions) -> SimpleNamespace:
        assert options.outputs == ("panoptic", "semantic")
        answer = class_map(tuple(ANSWERS.values())[round(int(image[0, 0, 0]) / 50)])
        return SimpleNamespace(semantic_map=answer, facts=SimpleNamespace(engine="oracle"))


def write_semantic(folder: Path) -> list[tuple[Path, Path]]:
    pairs = []
    for number, (name, rows) in enumerate(TRUTHS.items()):
        truth = class_map(rows)
        picture, label = folder / f"{name}.jpg", folder / f"{name}.png"
        Image.fromarray(np.full((*truth.shape, 3), 50 * number, np.uint8)).save(picture)
        Image.fromarray(np.where(truth == VOID, 255, truth).astype(np.uint8)).save(label)
        pairs.append((picture, label))
    return pairs


def test_semantic_scores_by_hand(tmp_path: Path) -> None:
    vocabulary = Vocabulary.parse("sky; grass, lawn; ball; zebra")
    data = SemanticSet(write_semantic(tmp_path), vocabulary, Layout("", "", void=255))
    kept = BestAndWorst(data, count=1)
    report = evaluate_semantic(SemanticOracle(), data, range(3), keep=kept)  # type: ignore[arg-type]
    # sky: 4 right and two invented; grass: 3 of 4, and what is invented lies on void; ball: 5 of 6.
    sky, grass, ball = 4 / (4 + 1 + 1), 3 / 4, 5 / 6
    assert report.miou["all"] == pytest.approx(
        {
            "miou": 100 * (sky + grass + ball) / 3,
            "miou_with_predicted": 100 * (sky + grass + ball) / 3,
            "pixel_accuracy": 100 * 12 / 14,
            "classes": 3,
        }
    )
    assert report.miou["seen"] == pytest.approx(
        {
            "miou": 100 * (sky + grass) / 2,
            "miou_with_predicted": 100 * (sky + grass) / 2,
            "pixel_accuracy": 100 * 7 / 8,
            "classes": 2,
        }
    ), "grass is seen by its synonym lawn"
    assert report.miou["unseen"] == pytest.approx(
        {"miou": 100 * ball, "miou_with_predicted": 100 * ball, "pixel_accuracy": 100 * 5 / 6, "classes": 1}
    )
    assert report.by_category["grass"] == pytest.approx({"iou": 75, "pixels": 4, "seen": 1})
    assert "zebra" not in report.by_category
    assert report.pq == report.ap == {}
    assert report.pictures == 3
    assert [entry[1] for entry in (*kept.best, *kept.worst)] == ["two", "one"]
    assert kept.worst[0][0] == pytest.approx((4 / 5 + 3 / 4) / 2)
    page = kept.page("oracle", [])
    assert "image two, mIoU 83.3" in page
    assert "all void" not in page, "it has no quality"


def test_classes_of_one_name_are_told_apart_in_the_report() -> None:
    names = distinct_names(SEMANTIC_FORMATS["ade20k-847"].vocabulary().names)
    assert len(set(names)) == 847
    assert names[0] == "wall"
    assert names[114] == "bag [114]"


def test_the_command_measures_a_semantic_set(mini_frozen: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    root, output = tmp_path / "data" / "pascal_voc_d2", tmp_path / "out"
    for folder in ("images/validation", "annotations_pascal21/validation"):
        (root / folder).mkdir(parents=True)
    Image.fromarray(np.full((32, 48, 3), 80, np.uint8)).save(root / "images" / "validation" / "a.jpg")
    Image.fromarray(np.full((32, 48), 15, np.uint8)).save(root / "annotations_pascal21" / "validation" / "a.png")
    flags = [str(mini_frozen), "--format", "voc-21", "--data", str(tmp_path / "data"), "--out", str(output)]
    assert main([*flags, "--device", "cpu"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["miou"]["all"]["classes"] == 1
    assert 0 <= metrics["miou"]["all"]["pixel_accuracy"] <= 100
    assert metrics["by_category"]["person"]["pixels"] == 32 * 48
    assert metrics["pq"] == {}
    page = (output / "pictures.html").read_text()
    assert "on voc-21, val" in page
    assert "<img" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "voc-21", "--data", "D", "--metrics", "miou,pq"], r"\['pq'\], but voc-21 says only the class"),
        (["--format", "voc-21", "--data", "D"], "is not under D: looked for VOCdevkit/VOC2012/JPEGImages"),
        (["--format", "voc-21", "--annotations", "a.json"], "voc-21 needs --data"),
        (["--format", "voc-21", "--data", "D", "--instances", "i.json"], "--instances are of panoptic sets"),
        (["--annotations", "a.json", "--images", "i"], "come together and replace --data"),
        (["--data", "D", "--annotations", "a.json", "--images", "i", "--masks", "m"], "come together and replace"),
        ([], "give --data FOLDER"),
        (["--format", "ade20k-panoptic", "--data", "D"], "ADE20K panoptic is not under D"),
        (["--format", "voc-21", "--data", "D", "--classes", "none.txt"], "cannot read the vocabulary none.txt"),
    ],
)
def test_a_data_set_that_is_not_named_right(
    flags: list[str], message: str, mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(mini_frozen), "--out", str(tmp_path / "out"), *flags]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["metrics.json", "pictures.html", "."])
def test_a_place_that_takes_no_result_is_refused_before_the_work(
    name: str,
    mini_data: Path,
    mini_frozen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    if name == ".":
        output.write_text("a file")
    else:
        (output / name).mkdir(parents=True)
    monkeypatch.setattr(evaluate_command, "open_segmenter", lambda *_: pytest.fail("it began to work"))
    assert main([str(mini_frozen), "--data", str(mini_data), "--out", str(output)]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_page_without_pictures(mini_data: Path) -> None:
    data = CocoPanoptic.from_root(mini_data, "val", with_captions=False)
    kept = BestAndWorst(data, count=0)
    evaluate(Oracle(data), data, range(2), keep=kept)  # type: ignore[arg-type]
    assert "<img" not in kept.page("oracle", [])


def test_files_of_a_panoptic_set_named_one_by_one(mini_data: Path, mini_frozen: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    words = tmp_path / "words.txt"
    words.write_text("0:heaven,sky\n1:lawn\n2:ball\n3:zebra\n")
    flags = ["--annotations", str(mini_data / "annotations" / "panoptic_val.json"), "--images", str(mini_data / "val")]
    flags += ["--masks", str(mini_data / "panoptic_val"), "--classes", str(words), "--limit", "1", "--metrics", "pq"]
    assert main([str(mini_frozen), "--out", str(tmp_path / "out"), "--device", "cpu", *flags]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["pq"]["all"]["categories"] >= 3
    assert set(metrics["by_category"]) >= {"sky", "grass", "ball"}, "categories keep the data set's names"
