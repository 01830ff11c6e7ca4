"""Cached features give what the live model gives, survive interruption, and notice other weights."""

from __future__ import annotations

import copy
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from odise_rt.errors import DatasetError
from odise_rt.windows import window_grid
from training.checkpoints.own_format import load_checkpoint
from training.data.coco_panoptic import CocoPanoptic
from training.data.transforms import JitterOptions
from training.data.views import TrainingViews
from training.feature_cache import FeatureCache, open_or_build
from training.frozen_features import pyramid_from_features
from training.models.odise import Odise

SIDE = 64
FACTS = {"data": "mini"}


@pytest.fixture(scope="module")
def model(mini_frozen: Path) -> Odise:
    torch.set_num_threads(1)
    return load_checkpoint(mini_frozen).model


@pytest.fixture
def views(mini_data: Path) -> TrainingViews:
    jitter = JitterOptions(target=2 * SIDE, crop=2 * SIDE, smallest=0.8, largest=1.2)
    return TrainingViews(CocoPanoptic.from_root(mini_data, "train"), {11: 0, 12: 1, 13: 2}, jitter, seed=4)


def test_pyramid_of_cached_features_equals_the_live_one(model: Odise, views: TrainingViews, tmp_path: Path) -> None:
    cache = open_or_build(tmp_path, FACTS, model, views, count=3, batch=2)
    assert len(cache) == 3
    grid = window_grid(2 * SIDE, 2 * SIDE, SIDE)
    with torch.no_grad():
        cached = pyramid_from_features(model, cache.features([2, 0]).to("cpu"), grid)
        images = torch.from_numpy(np.stack([views[2].image, views[0].image])).permute(0, 3, 1, 2).float() / 255
        live = model.pyramid(images)
    for name, level in live.items():
        difference = (cached[name] - level).abs().max() / level.abs().max()
        assert difference < 5e-3, f"{name}: {difference:.1e} relative, fp16 storage allows about 1e-3"
    again, drawn = cache.view(1), views[1]
    assert again.labels == drawn.labels
    assert again.words == drawn.words
    assert np.array_equal(again.segment_index, drawn.segment_index)


def test_an_interrupted_build_continues(model: Odise, views: TrainingViews, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def break_after_one(starts: Iterator[int], total: int) -> Iterator[int]:
        yield next(starts)
        raise Interrupted

    with pytest.raises(Interrupted):
        open_or_build(tmp_path / "a", FACTS, model, views, count=3, batch=1, progress=break_after_one)
    notes = next((tmp_path / "a").glob("*.partial")) / "views.jsonl"
    notes.write_text(notes.read_text() + '{"labels": [0')  # a line cut off by a kill
    began: list[int] = []

    def record(starts: Iterator[int], total: int) -> Iterator[int]:
        for start in starts:
            began.append(start)
            yield start

    continued = open_or_build(tmp_path / "a", FACTS, model, views, count=3, batch=1, progress=record)
    assert began[0] == 1
    whole = open_or_build(tmp_path / "b", FACTS, model, views, count=3, batch=1)
    for name, array in whole.arrays.items():
        assert np.array_equal(array, continued.arrays[name]), name
    assert whole.notes == continued.notes


def test_other_weights_or_facts_are_another_cache(model: Odise, views: TrainingViews, tmp_path: Path) -> None:
    def folders() -> int:
        return sum(path.is_dir() for path in tmp_path.iterdir())

    open_or_build(tmp_path, FACTS, model, views, count=1)
    assert folders() == 2
    open_or_build(tmp_path, FACTS, model, views, count=1)
    assert folders() == 2
    open_or_build(tmp_path, {"data": "other"}, model, views, count=1)
    assert folders() == 4
    retrained = copy.deepcopy(model)
    with torch.no_grad():
        retrained.clip.visual.proj += 0.1
    open_or_build(tmp_path, FACTS, retrained, views, count=1)
    assert folders() == 5, "only CLIP's part is computed anew"


def test_broken_stores_and_weights_are_refused(model: Odise, views: TrainingViews, tmp_path: Path) -> None:
    cache: FeatureCache = open_or_build(tmp_path, FACTS, model, views, count=2)
    assert len(cache) == 2
    for folder in filter(Path.is_dir, tmp_path.iterdir()):
        lines = (folder / "views.jsonl").read_text().splitlines()
        (folder / "views.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(DatasetError, match="incomplete: delete the folder"):
        open_or_build(tmp_path, FACTS, model, views, count=2)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.vae.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(DatasetError, match=r"image ids \[\d, \d\] is NaN"):
        open_or_build(tmp_path, FACTS, broken, views, count=2)


def interrupted(model: Odise, views: TrainingViews, root: Path) -> Path:
    """The folder that a build leaves which ended after two of three views."""

    class Interrupted(Exception):
        pass

    def break_after_two(starts: Iterator[int], total: int) -> Iterator[int]:
        yield next(starts)
        yield next(starts)
        raise Interrupted

    with pytest.raises(Interrupted):
        open_or_build(root, FACTS, model, views, count=3, batch=1, progress=break_after_two)
    return next(root.glob("*.partial"))


@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_an_interrupted_build_that_is_damaged_is_refused(
    model: Odise, views: TrainingViews, tmp_path: Path, damage: str
) -> None:
    """numpy would make a file that was cut off whole again, with zeros."""
    partial = interrupted(model, views, tmp_path)
    array = min(partial.glob("*.npy"))
    if damage == "gone":
        array.unlink()
    else:
        array.write_bytes(array.read_bytes()[: 0 if damage == "empty" else -100])
    with pytest.raises(DatasetError, match=r"delete .*\.partial, it is made again"):
        open_or_build(tmp_path, FACTS, model, views, count=3, batch=1)


def test_two_builds_at_once_share_one_cache(model: Odise, views: TrainingViews, tmp_path: Path) -> None:
    began: list[int] = []

    def record(starts: Iterator[int], total: int) -> Iterator[int]:
        for start in starts:
            began.append(start)
            yield start

    found: list[FeatureCache] = []

    def work() -> None:
        found.append(open_or_build(tmp_path, FACTS, model, views, count=3, batch=1, progress=record))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    # Each network has a folder of its own, and each view of it was computed once.
    assert len(began) == 3 * len(list(tmp_path.glob("*/facts.json")))
    assert found[0].notes == found[1].notes


def test_a_full_disk_is_an_error_before_anything_is_mapped(
    model: Odise, views: TrainingViews, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DatasetError, match=r"No space left on device.*free space, or name another --cache"):
        open_or_build(tmp_path, FACTS, model, views, count=3, batch=1)


def test_a_system_that_cannot_reserve_space_takes_it_by_writing(
    model: Odise, views: TrainingViews, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS."""
    reserved = open_or_build(tmp_path / "reserved", FACTS, model, views, count=1)
    monkeypatch.delattr("os.posix_fallocate")
    monkeypatch.setattr("training.feature_cache._CHUNK", 1000)  # several, the last one smaller
    written = open_or_build(tmp_path / "written", FACTS, model, views, count=1)
    for name, array in reserved.arrays.items():
        assert np.array_equal(array, written.arrays[name]), name


@pytest.mark.parametrize("refusal", [errno.EBADF, errno.ENOLCK])
def test_a_network_file_system_builds_too(
    model: Odise, views: TrainingViews, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    """NFS on Linux locks what is open for writing alone, and nothing without a lock service."""

    def flock(file: IO[bytes] | int, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        reads = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if refusal == errno.ENOLCK or reads:
            raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert len(open_or_build(tmp_path, FACTS, model, views, count=1)) == 1
