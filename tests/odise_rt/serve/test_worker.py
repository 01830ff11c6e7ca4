"""What a worker makes of a request before it segments."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from odise_rt import BackendError, Vocabulary, VocabularyError
from odise_rt.backends.window_batching import WindowBatching
from odise_rt.serve.worker import SegmentRequest, Worker, read_words
from tests.odise_rt.serve.conftest import png, worker_settings


def test_words_are_bounded_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(read_words("a; b, c", 3)) == 2
    with pytest.raises(VocabularyError, match="has 4 words, this server accepts 3"):
        read_words("a; b, c; d", 3)
    with pytest.raises(VocabularyError, match="has 4 words, this server accepts 3"):
        read_words('{"a": ["b", "c", "d"]}', 3)

    def parse(text: str) -> Vocabulary:
        raise AssertionError("it was read all the same")

    monkeypatch.setattr(Vocabulary, "parse", parse)
    monkeypatch.setattr(Vocabulary, "from_dict", parse)
    for text in ("a;" * 1501, "[" + '"a",' * 1000 + '"a"]'):
        with pytest.raises(VocabularyError, match="characters long"):
            read_words(text, 3)


def test_runs_of_requests_that_fail_afterwards_are_told_as_well(
    label_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they pile up while every request fails."""

    def fail(*args: object) -> None:
        raise BackendError("no more")

    worker = Worker(worker_settings(label_bundle, batching=WindowBatching(8)))
    try:
        monkeypatch.setattr("odise_rt.serve.worker.render", fail)
        for _ in range(2):
            answer = worker.run(SegmentRequest(png(), {"vocabulary": "red"}))
            assert answer.problem is not None
            assert answer.problem.type == "engine_failed"
            assert {stage for stage, _, _ in answer.batches} == {"clip_image", "unet_tap"}
        assert worker._batches == []
    finally:
        worker.close()


def test_a_worker_that_does_not_start_keeps_no_model(
    label_bundle: Path, open_stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise BackendError("no more")

    monkeypatch.setattr("odise_rt.segmenter.Segmenter.prepare", fail)
    with pytest.raises(BackendError, match="no more"):
        Worker(worker_settings(label_bundle))
    assert open_stages == []


def test_words_of_clients_are_not_logged(label_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "odise_rt")
    too_long = "embarrassing and more than the text encoder reads " * 5
    words = f"{too_long}; embarrassing word; embarrassing word, another"
    worker = Worker(worker_settings(label_bundle))
    try:
        assert worker.run(SegmentRequest(png(), {"vocabulary": words})).problem is None
    finally:
        worker.close()
    assert "loaded in" in caplog.text
    assert "embarrassing" not in caplog.text
