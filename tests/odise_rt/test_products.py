"""Products in one thread: the same numbers, and the process's thread count is what it was."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from odise_rt import products


@pytest.fixture(autouse=True)
def _libraries_of_now() -> None:
    """Other tests may have loaded a BLAS of their own since products first looked for numpy's."""
    products._blas.cache_clear()


def _threads() -> list[int]:
    return [library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()]


def _matrices(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((30, 96), np.float32), rng.standard_normal((n, 96), np.float32).T


def test_small_and_large_products_are_right() -> None:
    for n in (5, 5_000):
        left, right = _matrices(n)
        assert (30 * 96 * n >= products.THREADED_FROM) == (n == 5_000)
        expected = left.astype(np.float64) @ right.astype(np.float64)
        np.testing.assert_allclose(products.product(left, right), expected, atol=1e-4)


def test_large_products_run_in_one_thread_and_the_count_comes_back() -> None:
    before = _threads()
    seen: list[list[int]] = []

    class Watched(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):  # type: ignore[no-untyped-def]
            seen.append(_threads())
            plain = [np.asarray(i) for i in inputs]
            return getattr(ufunc, method)(*plain, **kwargs)

    for n in (5, 5_000):
        left, right = _matrices(n)
        products.product(left.view(Watched), right)
    assert seen[0] == before
    assert set(seen[1]) <= {1}
    assert _threads() == before


def test_overlapping_products_of_two_threads_restore_the_count() -> None:
    before = _threads()
    left, right = _matrices(20_000)

    def work() -> None:
        for _ in range(20):
            products.product(left, right)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _threads() == before
