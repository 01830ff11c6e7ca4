"""Windows of several threads in one run: equal results, bounded batches, and errors that stay with their caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from odise_rt import Bundle, Segmenter
from odise_rt.backends.base import StageFacts
from odise_rt.backends.ort import OrtBackend
from odise_rt.backends.window_batching import BatchedStage, BatchingBackend, WindowBatching
from odise_rt.errors import BackendError, OptionsError, OutOfMemoryError
from odise_rt.specs import StageSpec, stage_specs
from tests.odise_rt.fake_bundle import colour_image, make_facts

WORDS = "red; green; blue; white"


class GatedStage:
    """Stands for a graph: its run waits for a gate, so that a test decides who is waiting meanwhile."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.runs: list[int] = []
        self.fail: Callable[[np.ndarray], Exception | None] = lambda windows: None
        self.facts = StageFacts("clip_image", "test", "test", "cpu", "none", 0.0)
        self.closed = False

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        windows = inputs["windows"]
        self.runs.append(len(windows))
        self.entered.release()
        assert self.gate.wait(20)
        problem = self.fail(windows)
        if problem is not None:
            raise problem
        return {"image_embedding": np.repeat(windows.mean(axis=(2, 3)), 3, axis=1)[:, :8]}

    def close(self) -> None:
        self.closed = True


def clip_image_spec() -> StageSpec:
    return stage_specs(make_facts())["clip_image"]


@pytest.fixture
def inner() -> GatedStage:
    return GatedStage()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def windows(value: float, count: int = 1, side: int = 32) -> dict[str, np.ndarray]:
    return {"windows": np.full((count, 3, side, side), value, np.float32)}


def waiting(stage: BatchedStage, count: int) -> None:
    """Wait until so many callers wait for the stage."""
    for _ in range(2000):
        if len(stage._waiting) >= count:
            return
        threading.Event().wait(0.005)
    raise AssertionError(f"{len(stage._waiting)} of {count} callers came")


def run_behind_a_blocked_one(
    stage: BatchedStage, inner: GatedStage, pool: ThreadPoolExecutor, callers: list[dict[str, np.ndarray]]
) -> list[object]:
    """One caller blocks the stage until all others wait; results or exceptions in the order of the callers."""
    futures = [pool.submit(stage.run, callers[0])]
    assert inner.entered.acquire(timeout=20)
    for number, inputs in enumerate(callers[1:], 1):
        futures.append(pool.submit(stage.run, inputs))
        waiting(stage, number)
    inner.gate.set()
    return [f.exception(20) or f.result() for f in futures]


def test_callers_who_wait_share_the_next_run(inner: GatedStage, pool: ThreadPoolExecutor) -> None:
    seen: list[tuple[str, int, int]] = []
    stage = BatchedStage(inner, clip_image_spec(), lambda side: 8, observer=lambda *run: seen.append(run))
    counts = [1, 2, 1, 3]
    results = run_behind_a_blocked_one(stage, inner, pool, [windows(i, n) for i, n in enumerate(counts)])
    assert inner.runs == [1, 6]
    assert seen == [("clip_image", 1, 1), ("clip_image", 6, 3)]
    for i, (count, result) in enumerate(zip(counts, results, strict=True)):
        assert isinstance(result, dict)
        assert result["image_embedding"].shape == (count, 8)
        assert (result["image_embedding"] == i).all()


def test_a_batch_has_its_bound_and_other_sizes_their_own(inner: GatedStage, pool: ThreadPoolExecutor) -> None:
    stage = BatchedStage(inner, clip_image_spec(), lambda side: 4)
    callers = [windows(0), windows(1, 3), windows(2, 2), windows(3, 1, side=64), windows(4, 1), windows(5, 9)]
    results = run_behind_a_blocked_one(stage, inner, pool, callers)
    assert inner.runs == [1, 4, 2, 1, 9]  # 3 + 1 fill a batch; the larger one runs alone, and whole
    assert [float(r["image_embedding"].max()) for r in results if isinstance(r, dict)] == [0, 1, 2, 3, 4, 5]


def test_shared_inputs_must_be_the_same_arrays(label_bundle: Path) -> None:
    bundle = Bundle.open(label_bundle)
    with_batching = BatchingBackend(OrtBackend("cpu", 1), WindowBatching(8))
    stage = with_batching.load(bundle, "unet_tap")
    assert isinstance(stage, BatchedStage)
    inputs = {k: bundle.constants()[k] for k in ("noise", "null_text_embedding")} | windows(0.5, side=64)
    inputs["image_embedding"] = np.zeros((1, 8), np.float32)
    other = inputs | {"noise": inputs["noise"].copy()}
    assert stage._key(inputs) == stage._key(dict(inputs))
    assert stage._key(inputs) != stage._key(other)
    assert not isinstance(with_batching.load(bundle, "mask_decoder"), BatchedStage)
    assert "batched" in with_batching.description


def test_an_error_of_the_batch_is_its_causers_alone(inner: GatedStage, pool: ThreadPoolExecutor) -> None:
    def fail(batch: np.ndarray) -> Exception | None:
        return BackendError("seven is not accepted") if (batch == 7).any() else None

    inner.fail = fail
    stage = BatchedStage(inner, clip_image_spec(), lambda side: 8)
    results = run_behind_a_blocked_one(stage, inner, pool, [windows(v) for v in (0, 1, 7, 2)])
    assert [isinstance(r, BackendError) for r in results] == [False, False, True, False]


def test_what_does_not_fit_into_memory_together_runs_one_by_one(inner: GatedStage, pool: ThreadPoolExecutor) -> None:
    inner.fail = lambda batch: OutOfMemoryError("too many") if len(batch) > 1 else None
    stage = BatchedStage(inner, clip_image_spec(), lambda side: 8)
    results = run_behind_a_blocked_one(stage, inner, pool, [windows(v) for v in range(4)])
    assert inner.runs == [1, 3, 1, 1, 1]
    assert all(isinstance(r, dict) for r in results)


def test_unexpected_errors_reach_their_callers_and_end_nothing(inner: GatedStage, pool: ThreadPoolExecutor) -> None:
    inner.fail = lambda batch: RuntimeError("broken") if (batch == 2).any() else None
    stage = BatchedStage(inner, clip_image_spec(), lambda side: 8)
    results = run_behind_a_blocked_one(stage, inner, pool, [windows(v) for v in range(4)])
    assert [type(r) for r in results] == [dict, dict, RuntimeError, dict]
    assert (stage.run(windows(9))["image_embedding"] == 9).all()


def test_stacks_that_do_not_fit_into_memory_run_one_by_one(
    inner: GatedStage, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def concatenate(arrays: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr("odise_rt.backends.window_batching.np.concatenate", concatenate)
    stage = BatchedStage(inner, clip_image_spec(), lambda side: 8)
    results = run_behind_a_blocked_one(stage, inner, pool, [windows(v) for v in range(4)])
    assert inner.runs == [1, 1, 1, 1]
    assert all(isinstance(r, dict) for r in results)


def test_a_leader_that_fails_before_its_run_leaves_the_others_to_the_next_one(
    inner: GatedStage, pool: ThreadPoolExecutor
) -> None:
    calls: list[int] = []

    def limit(side: int) -> int:
        calls.append(side)
        if len(calls) == 2:  # the first of those that wait
            raise RuntimeError("interrupted")
        return 1

    stage = BatchedStage(inner, clip_image_spec(), limit)
    results = run_behind_a_blocked_one(stage, inner, pool, [windows(v) for v in range(4)])
    assert sorted(type(r).__name__ for r in results) == ["RuntimeError", "dict", "dict", "dict"]
    assert inner.runs == [1, 1, 1], "whoever gave up is not run for nobody"
    assert not stage._waiting


def test_wrong_inputs_are_refused_before_they_join(inner: GatedStage) -> None:
    stage = BatchedStage(inner, clip_image_spec(), lambda side: 8)
    with pytest.raises(BackendError, match="expected float32"):
        stage.run({"windows": np.zeros((1, 3, 32, 32), np.float64)})
    assert inner.runs == []
    stage.close()
    assert inner.closed


def test_a_run_may_wait_to_fill_up(inner: GatedStage, pool: ThreadPoolExecutor) -> None:
    inner.gate.set()
    stage = BatchedStage(inner, clip_image_spec(), lambda side: 2, max_wait=10.0)
    futures = [pool.submit(stage.run, windows(v)) for v in (1, 2)]
    assert [float(f.result(5)["image_embedding"][0, 0]) for f in futures] == [1, 2]  # full: not a second of waiting
    assert inner.runs == [2]


@pytest.mark.parametrize(
    "values",
    [
        {"max_windows": 0},
        {"max_windows": 1.5},
        {"max_windows": "8"},
        {"max_wait": -1.0},
        {"max_wait": 11.0},
        {"max_wait": "1"},
    ],
)
def test_bounds_of_the_settings(values: dict[str, float | str]) -> None:
    with pytest.raises(OptionsError, match=next(iter(values))):
        WindowBatching(**values)  # type: ignore[arg-type]


def test_segmenters_agree_with_and_without_batching(label_bundle: Path) -> None:
    """Sixteen images of several sizes on eight threads against one after the other."""
    rng = np.random.default_rng(0)
    images = [colour_image(64, 96 + 32 * (i % 3)) // np.uint8(1 + i % 2) for i in range(16)]
    images = [np.clip(i + rng.integers(0, 9, i.shape), 0, 255).astype(np.uint8) for i in images]
    runs: list[tuple[str, int, int]] = []
    with Segmenter.load(label_bundle, device="cpu", threads=1) as alone:
        expected = [alone.find_masks(image) for image in images]
        maps = [alone.name_masks(proposals, WORDS).segment_map for proposals in expected]
    with (
        Segmenter.load(
            label_bundle,
            device="cpu",
            threads=1,
            window_batching=WindowBatching(8, max_wait=0.05),
            batch_observer=lambda *run: runs.append(run),
        ) as shared,
        ThreadPoolExecutor(8) as threads,
    ):
        found = list(threads.map(shared.find_masks, images))
        for one, other, segments in zip(expected, found, maps, strict=True):
            np.testing.assert_allclose(other.mask_logits, one.mask_logits, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(other.embeddings.mask, one.embeddings.mask, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(shared.name_masks(other, WORDS).segment_map, segments)
    assert max(callers for _, _, callers in runs) > 1, "no run was shared: the test tested nothing"
    assert max(w for _, w, callers in runs if callers > 1) <= 8
