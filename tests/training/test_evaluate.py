"""Evaluation of a checkpoint from the command line, and of a segmenter that is right by construction."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from odise_rt.options import SegmentOptions
from odise_rt.results import Instance, Segment
from odise_rt.vocabulary import Vocabulary
from training.data.coco_panoptic import CocoPanoptic
from training.evaluate import main
from training.evaluation import METRICS, data_vocabulary, evaluate
from training.picture_page import BestAndWorst


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
    assert report.ap["all"]["ap50"] == pytest.approx(100 * 67 / 101)  # recall 2/3 at full precision, 101 points
    assert kept.worst[0][1] == 2
    page = kept.page("oracle", [("PQ", "70")])
    assert page.count("<img") == 2
    assert "image 2" in page


def test_the_command_measures_a_checkpoint(mini_data: Path, mini_frozen: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    output = tmp_path / "out"
    flags = [str(mini_frozen), "--data", str(mini_data), "--output", str(output), "--limit", "2", "--pictures", "1"]
    assert main([*flags, "--device", "cpu"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["pictures"] == 2
    assert set(metrics["pq"]) >= {"all", "things", "stuff", "seen", "unseen"}
    assert metrics["pq"]["seen"]["categories"] == 0, "nothing was seen by a checkpoint without vocabulary"
    assert metrics["miou"]
    assert metrics["ap"]
    assert "<img" in (output / "pictures.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--metrics", "fid"], "expected some of pq, miou, ap"), (["--overlap-threshold", "2"], "overlap_threshold is 2")],
)
def test_wrong_options_say_what_is_right(
    flags: list[str], message: str, mini_data: Path, mini_frozen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(mini_frozen), "--data", str(mini_data), "--output", str(tmp_path), *flags]) == 1
    assert message in caplog.text


def test_a_folder_that_is_neither_checkpoint_nor_bundle(
    mini_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(tmp_path), "--data", str(mini_data), "--output", str(tmp_path)]) == 1
    assert "neither a checkpoint" in caplog.text


def test_vocabulary_keeps_the_data_sets_order(mini_data: Path) -> None:
    vocabulary = data_vocabulary(CocoPanoptic.from_root(mini_data, "val", with_captions=False).categories)
    assert vocabulary.names == ("sky", "grass", "ball", "zebra")
    assert vocabulary.words == ("sky", "grass", "lawn", "ball", "zebra")
