"""Large-scale jitter: picture and map stay together."""

from __future__ import annotations

import random

import numpy as np
import pytest

from odise_rt.errors import ConfigError
from training.data.transforms import JitterOptions, large_scale_jitter, resize_pair


def coloured_map(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture whose red channel is its segment id."""
    ids = np.zeros((height, width), np.int32)
    ids[: height // 2, : width // 2] = 40
    ids[height // 2 :, width // 2 :] = 200
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = ids
    return picture, ids


@pytest.mark.parametrize("seed", range(8))
def test_picture_and_map_move_together(seed: int) -> None:
    options = JitterOptions(target=96, crop=64, smallest=0.4, largest=1.6, pad_value=7)
    picture, ids = large_scale_jitter(*coloured_map(80, 60), options, random.Random(seed))
    assert picture.shape == (64, 64, 3)
    assert ids.shape == (64, 64)
    assert picture.dtype == np.uint8
    assert set(np.unique(ids).tolist()) <= {0, 40, 200}
    padding = (picture == 7).all(axis=2)
    assert not ids[padding].any()
    agree = np.abs(picture[..., 0].astype(int) - ids)[~padding] < 25
    assert agree.mean() > 0.85  # edges blend


def test_is_a_function_of_its_random_source() -> None:
    options = JitterOptions(target=96, crop=64)
    first, again, other = (large_scale_jitter(*coloured_map(80, 60), options, random.Random(s))[0] for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_scale_one_keeps_a_fitting_picture() -> None:
    picture, ids = coloured_map(64, 64)
    options = JitterOptions(target=64, crop=64, smallest=1.0, largest=1.0, flip=0.0)
    same, same_ids = large_scale_jitter(picture, ids, options, random.Random(0))
    assert np.array_equal(same, picture)
    assert np.array_equal(same_ids, ids)
    options = JitterOptions(target=64, crop=64, smallest=1.0, largest=1.0, flip=1.0)
    assert np.array_equal(large_scale_jitter(picture, ids, options, random.Random(0))[1], ids[:, ::-1])


@pytest.mark.parametrize("diagonal", [False, True])
def test_crops_lie_on_the_diagonal_as_published_or_anywhere(diagonal: bool) -> None:
    rows, columns = np.mgrid[:100, :200].astype(np.int32)
    options = JitterOptions(target=200, crop=64, smallest=1.0, largest=1.0, flip=0.0, diagonal_crops=diagonal)
    places = []
    for seed in range(200):
        picture = np.zeros((100, 200, 3), np.uint8)
        ids = large_scale_jitter(picture, 1000 * rows + columns, options, random.Random(seed))[1]
        places.append(divmod(int(ids[0, 0]), 1000))
    top, left = np.array(places).T
    assert (np.abs(top / 36 - left / 136) <= 0.5 / 36 + 0.5 / 136).all() == diagonal
    assert {top.min(), top.max()} == {0, 36}, "each place of an axis is reached"
    assert left.min() < 5
    assert left.max() > 131


def test_large_ids_survive_resizing() -> None:
    ids = np.full((8, 8), 2**24 - 1, np.int32)
    assert (resize_pair(np.zeros((8, 8, 3), np.uint8), ids, 5, 13)[1] == 2**24 - 1).all()


@pytest.mark.parametrize(
    "wrong", [{"smallest": 0.0}, {"smallest": 3.0}, {"crop": 100}, {"target": 0}, {"flip": 2.0}, {"pad_value": 300}]
)
def test_impossible_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="jitter"):
        JitterOptions(**wrong)  # type: ignore[arg-type]
