"""Evaluations that are interrupted and go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from odise_rt.bundle import file_sha256
from odise_rt.errors import DatasetError, OptionsError
from odise_rt.segmenter import Segmenter
from odise_rt.version import __version__
from training import evaluate as evaluate_command
from training.evaluate import main
from training.evaluation_log import FOLDER, Measured, open_log
from training.picture_page import BestAndWorst

SEVERAL = Measured(0.25, {"pq": {"1": {"iou": 1 / 3}}}, 0.5, "an engine")


def test_what_was_noted_is_found_again_with_the_same_facts_alone(tmp_path: Path) -> None:
    nothing = Measured(math.nan, {}, 0.1, "an engine")
    with open_log(tmp_path, 0, {"model": "a"}) as log:
        log.append(3, SEVERAL)
        log.append(5, nothing)
    with open_log(tmp_path, 0, {"model": "a"}) as log:
        assert len(log) == 2
        assert log.find(3) == SEVERAL
        found = log.find(5)
        assert found is not None
        assert math.isnan(found.quality)
        assert log.find(4) is None
    with open_log(tmp_path, 0, {"model": "b"}) as log:
        assert len(log) == 0
        assert log.find(3) is None
    with open_log(tmp_path, 1, {"model": "a"}) as log:
        assert log.find(3) is None, "of another process"
        log.append(3, nothing)
    with open_log(tmp_path, 0, {"model": "a"}) as log:
        assert log.find(3) == SEVERAL


def test_two_evaluations_do_not_share_a_folder(tmp_path: Path) -> None:
    with open_log(tmp_path, 0, {}), pytest.raises(OptionsError, match="another run writes into"):
        open_log(tmp_path, 0, {}).__enter__()


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with open_log(tmp_path, 0, {}) as log:
        log.append(0, SEVERAL)
        path = log._log.path
        log._log = SimpleNamespace(append=lambda record: (_ for _ in ()).throw(OSError(28, "full")), path=path)  # type: ignore[assignment]
        with pytest.raises(DatasetError, match="free some space and run the command again"):
            log.append(1, SEVERAL)


def test_what_failed_before_its_first_picture_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError), open_log(tmp_path, 0, {}):
        raise DatasetError("no picture")
    assert not list(tmp_path.iterdir())


def test_a_process_without_pictures_leaves_the_logs_of_others(tmp_path: Path) -> None:
    with open_log(tmp_path, 0, {}) as first:
        first.append(0, SEVERAL)
        with open_log(tmp_path, 1, {}):
            pass
        assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["0"]
    with open_log(tmp_path, 0, {}) as first:
        assert first.find(0) == SEVERAL


@pytest.fixture
def evaluation(
    mini_data: Path, mini_frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], int]]:
    """Runs the command on three pictures; returns its figures and how many pictures it segmented."""
    torch.set_num_threads(1)
    segmented = []
    segment = Segmenter.segment

    def counting(self: Segmenter, *arguments: Any) -> Any:
        segmented.append(arguments)
        return segment(self, *arguments)

    monkeypatch.setattr(Segmenter, "segment", counting)

    def run(out: str, *flags: str, stop_after: int | None = None) -> tuple[dict[str, Any], int]:
        segmented.clear()

        def stopped(indices: Sequence[int]) -> Iterator[int]:
            for number, index in enumerate(indices):
                if number == stop_after:
                    raise KeyboardInterrupt
                yield index

        monkeypatch.setattr(evaluate_command, "progress_bar", lambda title: stopped)
        status = main(
            [str(mini_frozen), "--data", str(mini_data), "--out", str(tmp_path / out), "--device", "cpu", *flags]
        )
        if stop_after is not None:
            assert status == 130
            return {}, len(segmented)
        assert status == 0
        return json.loads((tmp_path / out / "metrics.json").read_text()), len(segmented)

    return run


def test_an_interrupted_evaluation_goes_on_where_it_was(
    evaluation: Callable[..., tuple[dict[str, Any], int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "training")
    whole, segmented = evaluation("whole", "--pictures", "0")
    assert segmented == 3
    assert not (tmp_path / "whole" / FOLDER).exists()
    assert evaluation("parts", "--pictures", "0", stop_after=2)[1] == 2
    assert not (tmp_path / "parts" / "metrics.json").exists()
    resumed, segmented = evaluation("parts", "--pictures", "0")
    assert segmented == 1
    assert "2 pictures were measured by a run that was interrupted" in caplog.text
    assert {**resumed, "seconds_per_picture": 0} == {**whole, "seconds_per_picture": 0}
    assert not (tmp_path / "parts" / FOLDER).exists(), "the next evaluation measures anew"
    assert evaluation("parts", "--pictures", "0")[1] == 3


def test_results_say_what_they_come_from(
    evaluation: Callable[..., tuple[dict[str, Any], int]], mini_data: Path, mini_frozen: Path, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text("0:a\n1:b, c, d\n2:e\n3:f\n")
    flags = ["--overlap-threshold", "0.5", "--metrics", "pq", "--classes", str(tmp_path / "words.txt")]
    first, second = (evaluation(out, *more)[0]["settings"] for out, more in (("a", ["--limit", "2"]), ("b", flags)))
    assert first["version"] == __version__
    assert (first["model"], first["format"], first["split"], first["device"]) == (
        mini_frozen.name,
        "coco",
        "val",
        "cpu",
    )
    assert first["model_sha256"]["model.safetensors"] == file_sha256(mini_frozen / "model.safetensors")
    assert first["annotations"] == {
        "panoptic_val.json": file_sha256(mini_data / "annotations" / "panoptic_val.json"),
    }
    assert first["metrics"] == ["pq", "miou", "ap"]
    assert first["options"]["overlap_threshold"] == 0.8, "the model's"
    assert "outputs" not in first["options"], "they follow from the metrics"
    different = {name for name in first if first[name] != second[name]}
    assert different == {"words", "words_sha256", "metrics", "options"}
    assert (second["classes"], second["words"], second["options"]["overlap_threshold"]) == (4, 6, 0.5)
    assert "overlap_threshold 0.5" in (tmp_path / "b" / "pictures.html").read_text()


def test_pictures_of_the_page_are_segmented_again(
    evaluation: Callable[..., tuple[dict[str, Any], int]], tmp_path: Path
) -> None:
    whole, _ = evaluation("whole")
    evaluation("parts", stop_after=2)
    resumed, segmented = evaluation("parts")
    assert segmented == 3
    assert {**resumed, "seconds_per_picture": 0} == {**whole, "seconds_per_picture": 0}
    pages = [(tmp_path / out / "pictures.html").read_text().split("<h2>")[1:] for out in ("whole", "parts")]
    assert pages[0] == pages[1]
    assert pages[0][0].count("<img") > 0


@pytest.mark.parametrize(
    "change",
    [["--metrics", "pq"], ["--overlap-threshold", "0.5"], ["--clip-weight-seen", "0.25"], ["--classes", "words.txt"]],
)
def test_what_was_measured_otherwise_is_measured_again(
    evaluation: Callable[..., tuple[dict[str, Any], int]],
    change: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "words.txt").write_text("0:a\n1:b\n2:c\n3:d\n")
    monkeypatch.chdir(tmp_path)
    evaluation("parts", "--pictures", "0", stop_after=2)
    assert evaluation("parts", "--pictures", "0", *change)[1] == 3


def test_only_pictures_that_would_be_kept_are_wanted(mini_data: Path) -> None:
    kept = BestAndWorst(SimpleNamespace(), count=1)  # type: ignore[arg-type]
    assert kept.wants(0.5)
    assert not kept.wants(math.nan)
    kept.best, kept.worst = [(0.75, 1, None)], [(0.25, 2, None)]  # type: ignore[list-item]
    assert [kept.wants(quality) for quality in (0.2, 0.25, 0.5, 0.75, 0.8)] == [True, False, False, False, True]
    assert not BestAndWorst(SimpleNamespace(), count=0).wants(0.5)  # type: ignore[arg-type]
