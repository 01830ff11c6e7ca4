"""Views: functions of the draw number, with crowds and untrained categories left out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from odise_rt.errors import DatasetError
from training.data import views
from training.data.transforms import JitterOptions
from training.data.views import EpochOrder, TrainingViews, View, collate_views, draw_seed

JITTER = JitterOptions(target=32, crop=32, smallest=1.0, largest=1.0, flip=0.0)


class Pictures:
    """Two pictures with a thing, a crowd and a category that is not trained."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> SimpleNamespace:
        ids = np.zeros((32, 32), np.int32)
        ids[:8], ids[8:16], ids[16:24] = 70_000, 5, 9
        segments = [
            SimpleNamespace(id=9, category_id=3, iscrowd=False),
            SimpleNamespace(id=70_000, category_id=1, iscrowd=False),
            SimpleNamespace(id=5, category_id=1, iscrowd=True),
        ]
        image = np.full((32, 32, 3), index, np.uint8)
        return SimpleNamespace(
            image_id=50 + index, image=image, segment_map=ids, segments=segments, captions=["a dog and a cat"]
        )


def test_only_trained_segments_become_targets() -> None:
    view = TrainingViews(Pictures(), {1: 4}, JITTER, seed=0)[0]
    assert view.labels == (4,)
    assert set(np.unique(view.segment_index).tolist()) == {0, 1}
    assert (view.segment_index[:8] == 1).all()
    assert set(view.words) <= {"dog", "cat"}
    assert view.words_valid


@pytest.mark.parametrize(("keep", "labels"), [(False, (4,)), (True, (7, 4))])
def test_what_a_crop_left_out_may_stay_as_an_empty_target(keep: bool, labels: tuple[int, ...]) -> None:
    class Cropped(Pictures):
        def __getitem__(self, index: int) -> SimpleNamespace:
            example = super().__getitem__(index)
            example.segment_map[example.segment_map != 70_000] = 0  # the crowd, too, which is never a target
            return example

    view = TrainingViews(Cropped(), {1: 4, 3: 7}, JITTER, seed=0, cropped_out_targets=keep)[0]
    assert view.labels == labels
    targets = collate_views([view], [0], seed=0).targets
    assert targets.counts == (len(labels),)
    assert targets.masks_on("cpu").masks[0].sum(dim=(1, 2)).tolist() == [0, 8 * 32][-len(labels) :]


def test_every_one_of_many_segments_is_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hundred: more than a byte can tell apart."""
    ids = np.zeros((32, 32), np.int32)
    ids.flat[:300] = np.arange(1, 301)
    segments = [SimpleNamespace(id=number, category_id=1, iscrowd=False) for number in range(1, 301)]
    example = SimpleNamespace(
        image_id=1, image=np.zeros((32, 32, 3), np.uint8), segment_map=ids, segments=segments, captions=[]
    )
    view = TrainingViews([example], {1: 0}, JITTER, seed=0)[0]
    masks = collate_views([view], [0], seed=0).targets.masks_on("cpu").masks
    assert masks.sum(dim=(2, 3)).tolist() == [[1] * 300]
    monkeypatch.setattr(views, "MAX_SEGMENTS", 299)
    with pytest.raises(DatasetError, match="image id 1 has more than 299 segments"):
        TrainingViews([example], {1: 0}, JITTER, seed=0)[0]


def test_draws_are_reproducible_and_cover_each_epoch() -> None:
    jitter = JitterOptions(target=32, crop=32, smallest=0.5, largest=1.5)
    drawn = TrainingViews(Pictures(), {1: 0, 3: 1}, jitter, seed=7)
    first, again, later = drawn[3], TrainingViews(Pictures(), {1: 0, 3: 1}, jitter, seed=7)[3], drawn[5]
    assert np.array_equal(first.image, again.image)
    assert first.words == again.words
    assert not np.array_equal(first.segment_index, later.segment_index)
    assert {drawn[2].image_id, drawn[3].image_id} == {50, 51}


def test_epoch_order_is_a_permutation_without_memory() -> None:
    order = EpochOrder(10, seed=1)
    epochs = [[order(10 * epoch + i) for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert EpochOrder(10, seed=1)(25) == epochs[2][5], "asking for a late draw first gives the same picture"
    with pytest.raises(DatasetError, match="no picture"):
        EpochOrder(0, seed=1)


def test_collation_pads_to_the_largest_count() -> None:
    index = np.zeros((8, 8), np.uint16)
    index[:2], index[2:4] = 1, 2
    image = np.zeros((8, 8, 3), np.uint8)
    two = View(image, index, (5, 6), ("", ""), False, 1)
    none = View(image, np.zeros_like(index), (), ("x", "y"), True, 2)
    batch = collate_views([none, two], [11, 12], seed=3)
    assert batch.images.shape == (2, 3, 8, 8)
    masks = batch.targets.masks_on("cpu").masks
    assert masks.dtype == torch.float32, "what the losses sample"
    expected = np.stack([np.zeros((2, 8, 8)), np.stack([index == 1, index == 2])])
    assert masks.tolist() == expected.tolist()
    assert batch.targets.counts == (0, 2)
    assert batch.targets.labels.tolist() == [[0, 0], [5, 6]]
    assert batch.targets.seeds == (draw_seed(3, 11), draw_seed(3, 12))
    assert batch.words_valid.tolist() == [True, False]


def test_a_batch_is_small_and_pinned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers send it through shared memory, where a mask for each segment would be a hundred times the map of them."""
    view = View(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint16), (0,) * 100, (), False, 1)
    batch = collate_views([view, view], [0, 1], seed=3)
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.nbytes) or tensor)
    again = batch.pin_memory()
    assert again.draws == batch.draws
    pixels = 2 * 32 * 32
    assert sorted(pinned) == sorted([3 * pixels, 4 * pixels, 2 * 100 * 8])
