"""The GPU check around a network that only copies, on a GPU made of host memory: it passes, and faults are found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_graphs
from benchmarks.gpu_rows import Row
from odise_rt.backends.image_plan import ImagePlan
from odise_rt.backends.naming_plan import NamingPlan
from tests.benchmarks.test_gpu_check import OnGpu
from tests.odise_rt.fake_gpu import Calls
from tests.odise_rt.kernels.emulated import Emulation

SMALL = {"window": 64, "size_divisor": 32, "pyramid_channels": 8, "test_short_edge": 64}


@pytest.fixture
def rows(
    install_gpu: Callable[..., Calls], emulation: Emulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], dict[str, Row]]:
    """Runs the check; rows by name."""
    gpu = install_gpu(emulation, tmp_path)
    monkeypatch.setattr(gpu_graphs, "SIZES", ((80, 120), (50, 71)))
    monkeypatch.setattr(gpu_graphs, "FACTS", dataclasses.replace(gpu_graphs.FACTS, **SMALL))
    monkeypatch.setattr(gpu_graphs, "late_tensor", OnGpu)

    def run() -> dict[str, Row]:
        found: list[Row] = []
        gpu_graphs.check(found.append)
        assert gpu.device_bytes == gpu.graphs == 0
        return {row.name: row for row in found}

    return run


def test_the_right_way_passes(rows: Callable[[], dict[str, Row]]) -> None:
    found = rows()
    assert len(found) == 15
    assert {row.status for row in found.values()} == {"pass"}, found


@pytest.mark.parametrize(
    ("changes", "size"), [({}, gpu_graphs.SIZES[0]), ({}, gpu_graphs.SIZES[1]), (SMALL, (80, 120))]
)
def test_the_pictures_have_segments_and_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], size: tuple[int, int]
) -> None:
    """Or nothing would be compared."""
    monkeypatch.setattr(gpu_graphs, "FACTS", dataclasses.replace(gpu_graphs.FACTS, **changes))
    bundle = gpu_graphs.write_manifest(tmp_path)
    with gpu_graphs.echo_segmenter(bundle, None) as host:
        comparison = gpu_graphs.Comparison(lambda row: None, host, host, None)  # type: ignore[arg-type]
        maps = [
            comparison._wanted(size, *call)
            for call in ((0, gpu_graphs.LOOSE), (1, gpu_graphs.LOOSE), (1, gpu_graphs.STRICT))
        ]
    assert all(len(np.unique(found)) >= 3 for found in maps)
    assert (maps[0] != maps[1]).mean() > 0.05
    assert (maps[1] != maps[2]).mean() > 0.05


@pytest.mark.parametrize("kernel", ["odise_image_down", "odise_image_stitch", "odise_name_paint"])
def test_a_kernel_that_does_nothing_is_found(
    rows: Callable[[], dict[str, Row]], emulation: Emulation, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    launch = emulation.launch
    monkeypatch.setattr(emulation, "launch", lambda name, values: None if name == kernel else launch(name, values))
    assert "fail" in {row.status for row in rows().values()}


@pytest.mark.parametrize(("fed", "found_by"), [(NamingPlan, "other thresholds"), (ImagePlan, "another picture")])
def test_what_a_graph_keeps_of_its_first_run_is_found(
    rows: Callable[[], dict[str, Row]], monkeypatch: pytest.MonkeyPatch, fed: Any, found_by: str
) -> None:
    """Thresholds, or pixels, that do not reach the graph again."""
    feed, done = fed.feed, set()  # type: ignore[var-annotated]

    def once(self: Any, given: Any) -> None:
        if id(self) not in done:
            feed(self, given)
        done.add(id(self))

    monkeypatch.setattr(fed, "feed", once)
    found = rows()
    assert found["80x120, from the graph"].status == "pass"
    assert found[f"80x120, {found_by}"].status == "fail"
