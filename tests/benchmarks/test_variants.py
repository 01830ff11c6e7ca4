"""How implementations are opened: each under the same conditions."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.variants import VARIANTS, DefaultOrtBackend, Job
from odise_rt.bundle import Bundle
from tests.odise_rt.fake_bundle import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "label")


def test_onnx_runtime_as_it_comes_gets_as_many_threads_as_the_others(bundle: Path) -> None:
    job = Job("ort-portable", {"bundle": str(bundle)}, 64, 64, "red", threads=3)
    stage = DefaultOrtBackend(job, VARIANTS["ort-portable"]).load(Bundle.open(bundle), "clip_image")
    assert stage._session.get_session_options().intra_op_num_threads == 3
