"""How implementations are opened: each under the same conditions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.timed_picture import picture
from benchmarks.variants import VARIANTS, DefaultOrtBackend, Job, open_segmenter
from odise_rt.backends.base import Device
from odise_rt.bundle import Bundle
from tests.odise_rt.fake_bundle import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "label")


def test_onnx_runtime_as_it_comes_gets_as_many_threads_as_the_others(bundle: Path) -> None:
    job = Job("ort-portable", {"bundle": str(bundle)}, 64, 64, "red", threads=3)
    stage = DefaultOrtBackend(job, VARIANTS["ort-portable"]).load(Bundle.open(bundle), "clip_image")
    assert stage._session.get_session_options().intra_op_num_threads == 3


@pytest.fixture
def tf32() -> Iterator[None]:
    """As PyTorch has it for convolutions, and may have it for products."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.mark.usefixtures("tf32")
def test_float32_rows_of_pytorch_do_not_round_to_tf32() -> None:
    with open_segmenter(Job("pruned", {"config": "odise-tiny", "seed": 0}, 64, 64, "red", threads=1)):
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(("device", "step"), [("cpu", "unet_tap"), ("cuda", "pixels_to_segments")])
@pytest.mark.parametrize("variant", ["pruned", "official"])
def test_pytorch_keeps_an_image_on_a_gpu_as_the_runtime_does(
    device: Device, step: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)  # a GPU made of the host's memory
    with open_segmenter(Job(variant, {"config": "odise-tiny", "seed": 0}, 64, 64, "red", 1, device)) as segmenter:
        assert step in segmenter.segment(picture(64, 96), "red").facts.seconds
