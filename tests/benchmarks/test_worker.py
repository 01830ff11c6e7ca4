"""A worker process on a bundle of a few kilobytes: what it answers, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import REPOSITORY
from benchmarks.measure_peers import OUTPUTS, load_labels
from benchmarks.timed_picture import WORDS, picture
from benchmarks.variants import Job
from benchmarks.worker import Worker, WorkerError, word_list
from odise_rt.bundle import Bundle
from odise_rt.vocabulary import Vocabulary
from tests.odise_rt.fake_bundle import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "label")


@pytest.fixture(scope="module")
def worker(bundle: Path) -> Iterator[Worker]:
    with Worker(Job("runtime", {"bundle": str(bundle)}, 64, 96, "red; stuff: blue", 1)) as started:
        yield started


def test_a_worker_answers_with_all_that_a_result_needs(worker: Worker, bundle: Path) -> None:
    answer = worker.run()
    assert answer["seconds"] > 0
    assert answer["windows"] == 2
    assert answer["words"] == 2
    assert answer["bundle"] == Bundle.open(bundle).digest
    assert "onnxruntime" in answer["engine"]
    assert {"preprocess", "unet_tap", "panoptic"} <= set(answer["stages"])
    assert sum(answer["stages"].values()) <= answer["seconds"]
    assert answer["peak_bytes"] > 10 << 20
    assert answer["device_peak_bytes"] is None
    assert worker.ready["load_seconds"] > 0


def test_sizes_and_words_can_be_chosen_for_each_request(worker: Worker) -> None:
    worker.request("cached_words", count=30)
    answer = worker.request("run", height=128, width=128, words="#30", windows_per_batch=1)
    assert (answer["windows"], answer["words"]) == (4, 30)
    assert worker.request("new_words", count=3, salt=1)["words"] == 3


def test_a_request_that_fails_is_answered_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(WorkerError, match="VocabularyError") as raised:
        worker.request("run", words="stuff:")
    assert raised.value.status == "failed"
    assert worker.run()["words"] == 2


def test_the_default_settings_of_onnx_runtime_give_the_same_segments(worker: Worker, bundle: Path) -> None:
    with Worker(Job("ort-portable", {"bundle": str(bundle)}, 64, 96, "red; stuff: blue", 1)) as other:
        answer = other.run()
    assert answer["segments"] == worker.run()["segments"]
    assert "default settings" in answer["engine"]


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="BundleError") as raised:
        Worker(Job("runtime", {"bundle": str(tmp_path / "none")}, 64, 64, "red", 1))
    assert raised.value.status == "failed"
    assert str(tmp_path) not in str(raised.value)


def test_a_killed_worker_counts_as_out_of_memory(bundle: Path) -> None:
    with Worker(Job("runtime", {"bundle": str(bundle)}, 64, 64, "red", 1)) as doomed:
        doomed._process.kill()
        with pytest.raises(WorkerError, match="killed") as raised:
            doomed.run()
    assert raised.value.status == "oom"


def test_word_lists_are_distinct() -> None:
    first, second = word_list(5_000, 0), word_list(5_000, 1)
    assert len({*first, *second}) == 10_000
    assert word_list(7, 0) == first[:7]


def test_the_picture_is_the_same_everywhere() -> None:
    assert picture(64, 96).shape == (64, 96, 3)
    assert np.array_equal(picture(64, 96), picture(64, 96))
    assert picture(64, 96).std() > 10
    assert len(Vocabulary.parse(WORDS)) > 10


def test_a_worker_keeps_what_the_network_says_of_the_timed_picture(worker: Worker, tmp_path: Path) -> None:
    keep = tmp_path / "outputs.npz"
    worker.request("outputs", keep=str(keep))
    with np.load(keep) as found:
        assert set(found.files) == set(OUTPUTS)
        assert found["mask_logits"].shape[0] == found["mask_embedding"].shape[0]
        assert found["labels"].shape == (2, 64, 96)


def test_labels_survive_a_file(tmp_path: Path) -> None:
    arrays = [np.full((2, 3, 4), i, np.int16) for i in range(11)]
    np.savez(tmp_path / "labels.npz", *arrays)
    assert [int(a[0, 0, 0]) for a in load_labels(tmp_path / "labels.npz")] == list(range(11))


def test_importing_benchmarks_loads_no_engine_and_no_model() -> None:
    # benchmarks.official_graphs exports with PyTorch and is a command of its own.
    names = sorted(p.stem for p in (REPOSITORY / "benchmarks").glob("*.py"))
    modules = [f"benchmarks.{n}" for n in names if n not in ("__init__", "conftest", "official_graphs")]
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps([m for m in ('torch', 'onnxruntime', 'matplotlib') if m in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
