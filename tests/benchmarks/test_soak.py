"""The soak finds growth where there is some, and wrong answers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import soak as soak_command
from benchmarks.running_server import running_server
from benchmarks.soak import envelope, essence, requests, slope
from odise_rt.errors import BackendError


def test_slope_is_found_under_noise_and_jumps() -> None:
    rng = np.random.default_rng(0)
    times = np.linspace(0, 600, 200)
    values = 1e8 + 1000 * times + rng.normal(0, 2e4, 200)
    values[::23] += 5e6  # a sample in the middle of a large request
    assert 900 < slope(times, values) < 1100
    assert abs(slope(times, np.full(200, 1e8))) == 0


def test_what_comes_and_goes_with_requests_does_not_count() -> None:
    rng = np.random.default_rng(0)
    times = np.linspace(0, 600, 300)
    values = 1e8 + rng.exponential(3e7, 300)  # up to a request's worth above what stays
    values[rng.random(300) < 0.5] = 1e8
    at, least = envelope(times, values)
    assert len(at) == 60
    assert (np.diff(at) > 0).all()
    assert abs(slope(at, least)) < 1


def test_a_place_that_takes_no_result_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak_command, "soak", lambda *_: pytest.fail("it began to work"))
    assert soak_command.main(["BUNDLE", "--out", str(tmp_path)]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_requests_are_the_same_every_time_and_some_are_broken() -> None:
    made = requests(120)
    assert made == requests(120)
    assert len({image for image, _ in made}) == 120


def test_answers_are_compared_without_their_seconds() -> None:
    kind = "application/json"
    one = essence(b'{"segments": [1], "facts": {"seconds": 1}}', kind)
    assert one == essence(b'{"facts": {"seconds": 2}, "segments": [1]}', kind)
    assert one != essence(b'{"segments": [2]}', kind)
    assert essence(b'{"error": {"type": "bad_image", "request_id": "x"}}', kind) == "bad_image"


def test_a_server_that_cannot_start_says_why_and_relative_paths_are_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs ray (extra serve)")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bundle").mkdir()
    monkeypatch.chdir(tmp_path)
    named = re.escape(str(tmp_path / "bundle"))
    with (
        pytest.raises(BackendError, match=f"could not start: .*BundleError.*{named}"),
        running_server(Path("bundle"), tmp_path / "elsewhere", ["--in-process"]),
    ):
        pass
