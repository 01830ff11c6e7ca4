"""Where quality is lost: a segmenter whose masks and names are known, and the command on a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from odise_rt.options import SegmentOptions
from odise_rt.segmenter import Segmenter
from odise_rt.vocabulary import Vocabulary
from training.data.coco_panoptic import CocoPanoptic, PanopticExample
from training.diagnose import main
from training.diagnosis import as_json, as_table, diagnose, groups_of, summarise

CELLS = 16


class KnowsSkyAndBall:
    """Three masks: the upper half, the ball, and a speck; CLIP calls the ball a zebra, the mask classifier does not."""

    def __init__(self, data: CocoPanoptic) -> None:
        self.truths = {example.image.tobytes(): example for example in data}
        self.bundle = SimpleNamespace(training_vocabulary=frozenset({"sky", "lawn"}))

    def find_masks(self, image: np.ndarray, options: SegmentOptions | None) -> SimpleNamespace:
        ids = self._truth(image).segment_map.reshape(CELLS, 4, CELLS, 4)
        speck = np.zeros((CELLS, CELLS))
        speck[-1, -1] = 1
        shares = np.stack([(ids == 1).mean((1, 3)), (ids == 3).mean((1, 3)), speck])
        logits = (20 * shares - 10).astype(np.float32)
        return SimpleNamespace(mask_logits=logits, network_size=image.shape[:2], original_size=image.shape[:2])

    def classify_masks(
        self, proposals: SimpleNamespace, words: Vocabulary, options: SegmentOptions | None
    ) -> SimpleNamespace:
        sky, grass, ball, zebra = (words.names.index(name) for name in ("sky", "grass", "ball", "zebra"))
        by_mask = np.full((3, len(words)), -5, np.float32)
        by_mask[[0, 1, 2], [sky, ball, grass]] = -0.1
        by_clip = by_mask.copy()
        by_clip[1, [ball, zebra]] = (-2, -0.2)
        both = np.concatenate([np.exp(0.6 * by_mask + 0.4 * by_clip), np.full((3, 1), 0.25, np.float32)], axis=1)
        return SimpleNamespace(probabilities=both, mask_log_probabilities=by_mask, clip_log_probabilities=by_clip)

    def _truth(self, image: np.ndarray) -> PanopticExample:
        return self.truths[image.tobytes()]


def test_masks_and_names_are_counted_apart(mini_data: Path) -> None:
    data = CocoPanoptic.from_root(mini_data, "val", with_captions=False)
    findings = diagnose(KnowsSkyAndBall(data), data, range(3))  # type: ignore[arg-type]
    assert len(findings) == 9
    groups = groups_of(findings)
    assert [len(groups[name]) for name in ("seen stuff", "unseen things", "seen things")] == [6, 3, 0]

    balls = summarise(groups["unseen things"])
    assert balls.with_mask == 100
    assert 80 < balls.iou <= 100
    assert (balls.mask_right, balls.clip_right, balls.right, balls.among_five) == (100, 0, 100, 100)
    assert balls.no_object == pytest.approx(0.25)

    stuff = summarise(groups["seen stuff"])  # every sky has a mask, no grass has more than a speck
    assert stuff.with_mask == 50
    assert (stuff.mask_right, stuff.clip_right) == (100, 100)
    assert summarise(groups["seen things"]).segments == 0

    by_size = {name: len(part) for name, part in groups.items() if "pixels" in name}
    assert by_size == {
        "things of 0 to 400 pixels": 0,
        "things of 400 to 1,000 pixels": 3,  # discs of radius 12: some 440
        "things of 1,000 to 2,500 pixels": 0,
        "things of 2,500 to 6,000 pixels": 0,
        "things from 6,000 pixels": 0,
    }
    assert "| unseen things | 3 | 100 % |" in as_table(findings)
    assert "| seen things |" not in as_table(findings), "no segment, no line"
    assert json.loads(json.dumps(as_json(findings)))["groups"]["seen stuff"]["segments"] == 6


def test_the_command_looks_at_a_checkpoint(
    mini_data: Path, mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    output = tmp_path / "out" / "diagnosis.json"
    flags = [str(mini_frozen), "--data", str(mini_data), "--device", "cpu", "--limit", "2"]
    assert main([*flags, "--out", str(output)]) == 0
    assert "| unseen things | 2 |" in capsys.readouterr().out
    assert len(json.loads(output.read_text())["segments"]) == 6


def test_the_command_looks_with_other_words(
    mini_data: Path, mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    asked: list[Vocabulary] = []
    words = tmp_path / "words.txt"
    words.write_text("0:heaven,sky\n1:turf\n2:sphere\n3:horse\n")
    flags = [str(mini_frozen), "--data", str(mini_data), "--device", "cpu", "--limit", "1", "--classes", str(words)]
    with pytest.MonkeyPatch.context() as patch:
        classify = Segmenter.classify_masks
        patch.setattr(
            Segmenter,
            "classify_masks",
            lambda self, found, v, options: asked.append(v) or classify(self, found, v, options),
        )
        assert main(flags) == 0
    assert {v.words for v in asked} == {("heaven", "sky", "turf", "sphere", "horse")}
    words.write_text("0:heaven,sky\n")
    assert main(flags) == 1
    assert "1 classes were given for a data set of 4" in capsys.readouterr().err


def test_a_picture_without_segments_is_passed_over(mini_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(mini_data, root)
    path = root / "annotations" / "panoptic_val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"] = []
    path.write_text(json.dumps(content))
    png = root / "panoptic_val" / content["annotations"][0]["file_name"]
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(png)
    data = CocoPanoptic.from_root(root, "val", with_captions=False)
    assert len(diagnose(KnowsSkyAndBall(data), data, range(2))) == 3  # type: ignore[arg-type]


def test_a_missing_data_set_is_one_line(mini_frozen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(mini_frozen), "--data", str(tmp_path)]) == 1
    assert "panoptic_val.json does not exist" in capsys.readouterr().err
