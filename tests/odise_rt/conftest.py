"""Fixtures of the runtime's tests: colour bundles, loaded segmenters, and a cache folder of each test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from odise_rt import Bundle, Segmenter
from odise_rt.backends.ort import OrtBackend, OrtStage
from tests.odise_rt.fake_bundle import colour_image, write_bundle
from tests.odise_rt.kernels.compiled import NEWER, Compiled, chosen
from tests.odise_rt.kernels.emulated import Emulation


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODISE_RT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def label_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "label")


@pytest.fixture(scope="session")
def caption_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "caption", "caption")


@pytest.fixture
def new_bundle(tmp_path: Path) -> Callable[[], Path]:
    """Writes a bundle that a test may damage."""

    def write() -> Path:
        return write_bundle(tmp_path / "bundle")

    return write


@pytest.fixture
def segmenter(label_bundle: Path) -> Iterator[Segmenter]:
    with Segmenter.load(label_bundle, device="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture
def open_stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that ONNX Runtime has loaded and nobody has closed."""
    names: list[str] = []
    load, close = OrtBackend.load, OrtStage.close

    def opened(backend: OrtBackend, bundle: Bundle, stage: str) -> OrtStage:
        loaded = load(backend, bundle, stage)
        names.append(stage)
        return loaded

    def closed(stage: OrtStage) -> None:
        names.remove(stage.facts.stage)
        close(stage)

    monkeypatch.setattr(OrtBackend, "load", opened)
    monkeypatch.setattr(OrtStage, "close", closed)
    return names


@pytest.fixture
def colours() -> np.ndarray:
    return colour_image()


# What nvcc makes for sm_75 differs from sm_90 in two modules only, whose tests have a fixture of their own.
@pytest.fixture(params=["source", "sm_90", NEWER])
def implementation(request: pytest.FixtureRequest) -> Emulation | Compiled:
    """The kernels on the CPU: their source, and what nvcc makes of it."""
    return chosen(request)
