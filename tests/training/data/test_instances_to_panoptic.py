"""Instances become a panoptic set, and a checkpoint can be trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import training.train
from odise_rt import rle
from training.checkpoints.own_format import load_checkpoint
from training.data.coco_panoptic import CocoPanoptic
from training.data.instances_to_panoptic import main

SIDE = 64


def square(left: int, top: int, side: int) -> list[list[int]]:
    right, bottom = left + side, top + side
    return [[left, top, right, top, right, bottom, left, bottom]]


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Two pictures, and squares of two classes, of which the smallest lie in front."""
    crowd = np.zeros((SIDE, SIDE), bool)
    crowd[:, 50:] = True
    outlines = [
        ("a", 5, square(8, 8, 8), 0),
        ("a", 7, square(0, 0, 32), 0),
        ("a", 7, square(8, 8, 4), 0),
        ("a", 7, square(8, 12, 4), 0),
        ("a", 7, square(12, 8, 4), 0),
        ("a", 7, square(12, 12, 4), 0),  # these four hide the first
        ("a", 5, rle.encode(crowd), 1),
        ("a", 5, square(48, 40, 8), 0),
        ("b", 7, square(20, 20, 30), 0),
    ]
    content = {
        "images": [{"id": name, "file_name": f"{name}.png", "height": SIDE, "width": SIDE} for name in "ab"],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "segmentation": outline, "iscrowd": crowd}
            for number, (image, category, outline, crowd) in enumerate(outlines)
        ],
        "categories": [{"id": 5, "name": "bolt", "synonyms": ["screw"]}, {"id": 7, "name": "nut"}],
    }
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    pictures = tmp_path / "data" / "train"
    pictures.mkdir(parents=True)
    for name in "ab":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(
            pictures / f"{name}.png"
        )
    return path


def test_small_instances_lie_in_front_and_hidden_ones_are_left_out(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(labels), "--out", str(tmp_path / "data"), "--split", "train"]) == 0
    assert "2 pictures, 8 segments\n1 instances are wholly behind others" in capsys.readouterr().out
    data = CocoPanoptic.from_root(tmp_path / "data", "train", with_captions=False)
    assert [(c.id, c.synonyms, c.isthing) for c in data.categories] == [
        (5, ("bolt", "screw"), True),
        (7, ("nut",), True),
    ]
    first, second = data
    category = {segment.id: segment.category_id for segment in first.segments}
    assert [category.get(int(first.segment_map[y, x]), 0) for y, x in ((9, 9), (2, 2), (45, 50), (40, 2))] == [
        7,
        7,
        5,
        0,
    ]
    assert first.segment_map[9, 9] != first.segment_map[2, 2]
    assert first.segment_map[45, 50] != first.segment_map[2, 60], "the crowd is behind"
    assert [s.iscrowd for s in first.segments].count(True) == 1
    assert all(s.area == (first.segment_map == s.id).sum() for s in first.segments)
    assert [(s.category_id, s.area) for s in second.segments] == [(7, 900)]


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("annotations", {"segmentation": [[1, 2]]}, "annotations[0] has no outline: expected polygons or run lengths"),
        ("annotations", {"image_id": "z"}, "annotations[0] is of image id z, which is not declared"),
        ("annotations", {"category_id": 6}, "annotations[0] names category 6, which is not declared"),
        ("images", {"height": 1 << 20, "width": 1 << 20}, "image id a is 1048576 x 1048576: expected 1 to"),
        ("categories", {"name": None}, "categories[0]"),
    ],
)
def test_what_is_no_instance_file_is_refused(
    where: str, change: dict[str, Any], message: str, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(labels.read_text())
    content[where][0].update(change)
    labels.write_text(json.dumps(content))
    assert main([str(labels), "--out", str(tmp_path / "data"), "--split", "train"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data" / "annotations" / "panoptic_train.json").exists()


def test_a_checkpoint_goes_on_with_data_of_ones_own(labels: Path, mini_frozen: Path, tmp_path: Path) -> None:
    """The way that docs/training.md describes, with an experiment in a file."""
    torch.set_num_threads(1)
    data, run, mine = tmp_path / "data", tmp_path / "run", tmp_path / "mine.py"
    assert main([str(labels), "--out", str(data), "--split", "train"]) == 0
    mine.write_text(
        "import dataclasses\n"
        "from tests.training.conftest import mini_experiment\n"
        "def experiment():\n"
        "    mini = mini_experiment(cached=False)\n"
        "    return dataclasses.replace(mini, name='mine', phases=mini.phases[:1])\n"
    )
    flags = [str(mine), "--data", str(data), "--frozen", str(mini_frozen), "--heads", str(mini_frozen)]
    changes = ["--iterations", "2", "--batch", "1", "--learning-rate", "1e-4"]
    assert training.train.main([*flags, *changes, "--out", str(run), "--workers", "0", "--device", "cpu"]) == 0
    found = load_checkpoint(run / "checkpoint")
    assert found.training_vocabulary == ("bolt", "screw", "nut")
    assert json.loads((run / "states" / "000002" / "state.json").read_text())["experiment"]["phases"][0]["batch"] == 1
