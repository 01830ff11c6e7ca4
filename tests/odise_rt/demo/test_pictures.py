"""Visitors' pictures stay within bounds, whoever sends how many."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from PIL import Image

from odise_rt import InputError
from odise_rt.demo.pictures import BoundedCache, Picture, PictureStore


def picture(height: int = 10, width: int = 10) -> Picture:
    return Picture("a.png", np.zeros((height, width, 3), np.uint8))


def test_tokens_are_long_and_of_their_own() -> None:
    tokens = {picture().token for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) >= 32 for token in tokens)


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    store = PictureStore(max_bytes=1000)
    first, second = store.add(picture()), store.add(picture())
    store.get(second.token)
    store.get(first.token)  # now the second was used longest ago
    third, fourth = store.add(picture()), store.add(picture())
    assert len(store) == 3
    assert {store.get(p.token) for p in (first, third, fourth)} == {first, third, fourth}
    with pytest.raises(InputError, match="drop it again"):
        store.get(second.token)


def test_a_picture_larger_than_the_memory_is_kept_alone() -> None:
    store = PictureStore(max_bytes=100)
    store.add(picture())
    large = store.add(picture(100, 100))
    assert store.get(large.token) is large
    assert len(store) == 1


def test_masks_that_came_later_count_too(bench, colours) -> None:  # type: ignore[no-untyped-def]
    mine = bench.store.add(Picture("a.png", colours))
    before = mine.nbytes
    bench.masks(mine)
    assert mine.nbytes > before + mine.proposals.mask_logits.nbytes - 1


def test_one_visitor_keeps_three_pictures_and_takes_none_from_others() -> None:
    store = PictureStore(max_per_owner=3)
    other = store.add(picture(), owner="other")
    mine = [store.add(picture(), owner="me") for _ in range(5)]
    assert len(store) == 4
    assert store.get(other.token) is other
    assert [p.token in store._pictures for p in mine] == [False, False, True, True, True]


def test_a_picture_belongs_to_the_session_that_shows_it() -> None:
    store = PictureStore()
    sent = store.add(picture())
    store.get(sent.token, owner="me")
    store.forget("somebody else")
    assert len(store) == 1
    store.forget("me")
    assert len(store) == 0


def test_idle_pictures_are_forgotten() -> None:
    now = [0.0]
    store = PictureStore(idle_seconds=60, clock=lambda: now[0])
    store.add(picture())
    now[0] = 61.0
    store.add(picture())
    assert len(store) == 1


def test_threads_may_share_the_store() -> None:
    store = PictureStore(max_bytes=3000, max_per_owner=3)

    def visit(owner: str) -> None:
        for _ in range(50):
            store.get(store.add(picture(), owner).token, owner)

    threads = [threading.Thread(target=visit, args=(str(i),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store) <= 9


@pytest.mark.parametrize(
    ("size", "shown"),
    [((256, 128), (1024, 512)), ((3000, 4000), (768, 1024)), ((10, 10), (40, 40)), ((1, 5000), (1, 1024))],
)
def test_size_on_the_page(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert picture(*size).shown_size() == shown


def test_shown_picture_is_a_jpeg_made_anew_and_not_larger_than_needed() -> None:
    with Image.open(io.BytesIO(picture(1500, 3000).shown)) as image:
        assert (image.format, image.size) == ("JPEG", (1024, 512))
    with Image.open(io.BytesIO(picture(20, 30).shown)) as image:
        assert image.size == (30, 20)


def test_cache_forgets_what_was_used_longest_ago() -> None:
    cache: BoundedCache[int] = BoundedCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
