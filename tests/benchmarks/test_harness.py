"""Statistics, interleaving and timers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Summary, interleave, paired_ratio, time_calls, time_cuda_calls, write_results


def test_a_summary_gives_order_statistics() -> None:
    summary = Summary.of([float(v) for v in range(101)])
    assert summary.count == 101
    assert (summary.median, summary.p10, summary.p90, summary.p99) == (50.0, 10.0, 90.0, 99.0)
    assert (summary.minimum, summary.maximum) == (0.0, 100.0)
    assert Summary.from_dict(summary.to_dict()) == summary


@pytest.mark.parametrize(("count", "tail"), [(3, 2.0), (99, 98.0), (101, 99.0)])
def test_the_99th_percentile_needs_a_hundred_samples(count: int, tail: float) -> None:
    assert Summary.of([float(v) for v in range(count)]).tail == tail


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_a_summary_refuses_samples_that_are_none(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Summary.of(samples)


def test_variants_alternate_and_warm_up_rounds_do_not_count() -> None:
    order: list[str] = []

    def variant(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleave({"a": lambda: variant("a"), "b": lambda: variant("b")}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert samples == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_variant_that_fails_is_left_out_and_the_others_go_on() -> None:
    calls = {"good": 0, "bad": 0}

    def good() -> float:
        calls["good"] += 1
        return 1.0

    def bad() -> float:
        calls["bad"] += 1
        if calls["bad"] == 2:
            raise RuntimeError("broke in the second round")
        return 1.0

    failed: list[str] = []
    samples = interleave({"bad": bad, "good": good}, 3, 0, on_failure=lambda name, exc: failed.append(f"{name}: {exc}"))
    assert samples == {"good": [1.0, 1.0, 1.0]}
    assert failed == ["bad: broke in the second round"]
    assert calls == {"good": 3, "bad": 2}


def test_without_a_handler_a_failure_ends_the_measurement() -> None:
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, 1, 0)


def test_paired_ratios_cancel_what_drifts() -> None:
    drift = np.linspace(1.0, 3.0, 9)
    ratio = paired_ratio(list(0.5 * drift), list(drift))
    assert ratio.median == pytest.approx(0.5)
    assert ratio.maximum - ratio.minimum < 1e-12


def test_calls_are_timed_after_warming_up() -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(0.0)
        time.sleep(0.002)

    samples = time_calls(call, repeats=3, warmup=2)
    assert len(calls) == 5
    assert len(samples) == 3
    assert min(samples) >= 0.002


def test_results_are_written_whole_and_never_with_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    write_results(path, {"summary": Summary.of([1.0])})
    before = path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        write_results(path, {"value": float("nan")})
    assert path.read_text(encoding="utf-8") == before


class Device:
    """A GPU whose queue is a list of times, and a host that needs some of them to queue a call."""

    def __init__(self, call: float, host: float) -> None:
        self.call_seconds, self.host_seconds = call, host
        self.now = self.busy_until = 0.0

    def sleep(self, cycles: int) -> None:
        self.put(cycles / 1e9)

    def put(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.now) + seconds

    def call(self) -> None:
        self.now += self.host_seconds
        self.put(self.call_seconds)

    def event(self, enable_timing: bool) -> Device.Event:
        return Device.Event(self)

    class Event:
        def __init__(self, device: Device) -> None:
            self.device = device

        def record(self) -> None:
            self.at = max(self.device.busy_until, self.device.now)

        def query(self) -> bool:
            return self.at <= self.device.now

        def elapsed_time(self, end: Device.Event) -> float:
            return 1e3 * (end.at - self.at)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Device], Device]:
    """Puts a device in the place of CUDA."""

    def install(device: Device) -> Device:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "_sleep", device.sleep, raising=False)
        monkeypatch.setattr(torch.cuda, "Event", device.event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        return device

    return install


def test_events_time_the_device_and_not_a_host_that_is_late(on: Callable[[Device], Device]) -> None:
    """20 us of work that takes the host 3 ms to queue: the device is kept busy for longer than it is at first."""
    device = on(Device(call=20e-6, host=3e-3))
    assert device.host_seconds > harness.LEAD_CYCLES / 1e9
    samples = time_cuda_calls(device.call, repeats=5)
    assert samples == pytest.approx([20e-6] * 5)


def test_a_call_that_waits_for_the_device_cannot_be_timed_by_events(on: Callable[[Device], Device]) -> None:
    device = on(Device(call=20e-6, host=0.0))

    def call() -> None:
        device.call()
        device.now = device.busy_until

    with pytest.raises(RuntimeError, match="waits for the GPU"):
        time_cuda_calls(call, repeats=5)
