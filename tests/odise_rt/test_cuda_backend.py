"""Which engine runs a bundle on a GPU, with stand-ins for the GPU and for TensorRT."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odise_rt import BackendError, Bundle, BundleError, Segmenter, SegmentOptions
from odise_rt.backends import cuda, machine, ort, select
from odise_rt.backends.base import Stage
from odise_rt.backends.device import CudaSession
from odise_rt.backends.engine_stage import open_engine_stage
from odise_rt.backends.select import open_backend
from odise_rt.cli import main
from odise_rt.engine_facts import CHANNELS_LAST
from odise_rt.engine_listing import list_engines
from odise_rt.engines import Engine, find_engines
from odise_rt.specs import STAGES
from tests.odise_rt import fake_driver
from tests.odise_rt.engine_bundle import example, replace_file, write_engine, write_engines
from tests.odise_rt.fake_bundle import colour_image
from tests.odise_rt.fake_gpu import GPU, Calls

WORDS = "red, crimson; green; blue; white; stuff: sky"

pytestmark = pytest.mark.usefixtures("fresh_machine")


@pytest.fixture
def gpu(install_gpu: Callable[..., Calls]) -> Calls:
    return install_gpu()


@pytest.fixture
def bundle(new_bundle: Callable[[], Path]) -> Bundle:
    return Bundle.open(new_bundle())


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_segments_on_engines_as_on_the_cpu(bundle: Bundle, gpu: Calls, device: select.DeviceRequest) -> None:
    write_engines(bundle, verified_on=GPU)
    image = colour_image(80, 120)
    options = SegmentOptions(short_edge=80)
    with Segmenter.load(bundle.root, device="cpu", threads=1) as segmenter:
        expected = segmenter.segment(image, WORDS, options)
    # Without the disk cache: the words were encoded on the CPU already.
    with Segmenter.load(bundle.root, device=device, threads=1, disk_cache=False) as segmenter:
        assert segmenter.device == "cuda"
        results = [segmenter.segment(image, WORDS, options) for _ in range(3)]
    for result in results:
        assert np.array_equal(result.segment_map, expected.segment_map)
        assert result.segments == expected.segments
    facts = results[-1].facts
    assert facts.engine == "TensorRT on Fake GPU"
    assert {s.stage: s.engine for s in facts.stages} == dict.fromkeys(STAGES, "tensorrt 10.16.0")
    assert gpu.count("launch") > 0
    assert gpu.device_bytes == 0, "closing gives everything back"


def test_an_engine_that_was_never_compared_is_compared_once(
    bundle: Bundle, gpu: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    write_engines(bundle)
    caplog.set_level(logging.INFO, "odise_rt")
    with Segmenter.load(bundle.root, device="cuda", threads=1):
        assert "agrees with the test on Fake GPU" in caplog.text
    here = machine.this_machine()
    assert all(e.is_verified_on(here) for e in find_engines(bundle).found if e.facts.stage != "clip_text")
    caplog.clear()
    with Segmenter.load(bundle.root, device="cuda", threads=1):
        assert "agrees with" not in caplog.text


@pytest.mark.parametrize("kind", ["wrong", "nan"])
def test_an_engine_that_is_wrong_here_is_refused(bundle: Bundle, gpu: Calls, kind: str) -> None:
    """What NVIDIA/TensorRT issue 4813 is about: it runs, and computes something else."""
    engines = write_engines(bundle)
    gpu.corrupt = lambda name, array: array * (np.nan if kind == "nan" else 1.01) if name == "s3" else array
    what = "NaN or infinite values" if kind == "nan" else r"is off by at most 1.0e-02"
    with pytest.raises(BackendError, match=rf"TensorRT engine of unet_tap is wrong on Fake GPU: s3 of case 0.*{what}"):
        Segmenter.load(bundle.root, device="cuda", threads=1)
    engine = next(e for e in engines if e.facts.stage == "unet_tap")
    assert json.loads((engine.folder / "engine.json").read_text())["verified"] == []


def test_a_bundle_that_cannot_be_written_to_is_compared_each_time(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from odise_rt import engines

    def refuse(path: Path, data: object) -> None:
        raise PermissionError("read-only file system")

    caplog.set_level("WARNING", "odise_rt")
    write_engines(bundle)
    monkeypatch.setattr(engines, "write_json", refuse)
    with Segmenter.load(bundle.root, device="cuda", threads=1) as segmenter:
        assert segmenter.segment(colour_image(), WORDS).segments
    assert "the next load compares again" in caplog.text


def test_an_altered_engine_is_refused_unless_hashes_are_not_wanted(bundle: Bundle, gpu: Calls) -> None:
    engine = write_engines(bundle, verified_on=GPU)[0]
    replace_file(engine, engine.path.name, engine.path.read_bytes() + b" ")
    with pytest.raises(BundleError, match="was altered"):
        Segmenter.load(bundle.root, device="cuda", threads=1)
    with Segmenter.load(bundle.root, device="cuda", threads=1, verify=False):
        pass


def test_a_session_is_not_closed_while_a_stage_is_opened_on_it(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may release the last stage at any time."""
    write_engines(bundle, verified_on=GPU)
    backend = cuda.CudaBackend(bundle, 1)
    first = backend.load(bundle, "clip_text")

    def open_late(*arguments: Any) -> Stage:
        first.close()
        return open_engine_stage(*arguments)

    monkeypatch.setattr(cuda, "open_engine_stage", open_late)
    second = backend.load(bundle, "clip_image")
    assert second.run(example(bundle.stages["clip_image"].spec))
    assert gpu.count("close stream") == 0
    second.close()
    assert gpu.count("close stream") == 1
    assert gpu.device_bytes == 0


def test_stages_loaded_at_once_share_a_session(bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowSession(CudaSession):
        def __init__(self) -> None:
            time.sleep(0.2)
            super().__init__()

    write_engines(bundle, verified_on=GPU)
    monkeypatch.setattr(cuda, "CudaSession", SlowSession)
    backend = cuda.CudaBackend(bundle, 1)
    with ThreadPoolExecutor(len(STAGES)) as threads:
        stages = list(threads.map(lambda stage: backend.load(bundle, stage), STAGES))
    assert len(gpu.streams) == 1
    for stage in stages:
        stage.close()
    assert gpu.count("close stream") == 1
    again = backend.load(bundle, STAGES[0])
    assert len(gpu.streams) == 2, "a session that was closed is not used again"
    again.close()


@pytest.mark.parametrize("shared", [True, False])
def test_an_engine_that_does_not_load_leaves_no_session_open(bundle: Bundle, gpu: Calls, shared: bool) -> None:
    write_engines(bundle, verified_on=GPU)
    backend = cuda.CudaBackend(bundle, 1)
    engine = backend._chosen["clip_image"]
    assert engine is not None
    replace_file(engine, engine.path.name, b"not a plan")
    with pytest.raises(BackendError, match="refuses"):
        if shared:
            backend.load(dataclasses.replace(bundle, verified=False), "clip_image")
        else:
            open_engine_stage(engine, bundle.stages["clip_image"].spec)
    assert gpu.count("close stream") == len(gpu.streams) == 1


def test_an_engine_is_hashed_at_its_first_load(bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    write_engines(bundle, verified_on=GPU)
    hashed: list[str] = []
    verify = Engine.verify_files
    monkeypatch.setattr(Engine, "verify_files", lambda self: (hashed.append(self.facts.stage), verify(self))[1])
    backend = cuda.CudaBackend(bundle, 1)
    for stage in ("clip_text", "clip_image", "clip_text", "clip_text"):
        backend.load(bundle, stage).close()
    assert hashed == ["clip_text", "clip_image"]


def test_without_engines_and_onnxruntime_gpu_the_error_says_what_is_missing(bundle: Bundle, gpu: Calls) -> None:
    with pytest.raises(BackendError, match=r"has no engine of clip_image.*no CUDAExecutionProvider.*odise-rt doctor"):
        Segmenter.load(bundle.root, device="cuda", threads=1)


def test_a_missing_engine_of_one_stage_is_named(bundle: Bundle, gpu: Calls) -> None:
    for stage in STAGES[:-1]:
        write_engine(bundle, stage)
    with pytest.raises(BackendError, match="has no engine of clip_text"):
        Segmenter.load(bundle.root, device="cuda", threads=1)
    with Segmenter.load(bundle.root, device="auto", threads=1) as segmenter:
        assert segmenter.device == "cpu"


@pytest.mark.skipif(fake_driver.why_not() is not None, reason=f"{fake_driver.why_not()}")
def test_why_there_is_no_gpu() -> None:
    """In the words of the real cuda-core: with a driver that shows none, and with whatever is where the tests run."""
    here = "from odise_rt.backends.machine import this_machine; print(this_machine().no_gpu)"
    driver = "from tests.odise_rt.fake_driver import installed; assert installed() is not None\n"
    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        for code in (driver + here, here)
    ]
    assert found[0] == "the NVIDIA driver shows no GPU"
    assert found[1] in ("there is no NVIDIA driver here", found[0], "None")


def test_without_a_gpu_auto_takes_the_cpu_and_cuda_says_why(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_engines(bundle)
    monkeypatch.setattr(machine, "_first_gpu", lambda: (None, None, "there is no NVIDIA driver here"))
    caplog.set_level(logging.INFO, "odise_rt")
    with Segmenter.load(bundle.root, device="auto", threads=1) as segmenter:
        assert segmenter.device == "cpu"
    assert "using the CPU, because" in caplog.text
    with pytest.raises(BackendError, match=r"there is no NVIDIA driver here; no TensorRT engine of clip_image fits"):
        open_backend("cuda", 1, bundle)


def test_onnxruntime_serves_stages_without_an_engine(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_engine(bundle, "unet_tap")
    monkeypatch.setattr(cuda, "working_provider", lambda device: None)
    backend = cuda.CudaBackend(bundle, 1)
    assert backend.description.startswith("ONNX Runtime CUDA, portable graph: clip_image, mask_decoder")
    assert "TensorRT: unet_tap" in backend.description
    assert backend.windows_per_batch(64) == 4, "what the engine was built for"
    assert backend.windows_per_batch(512) == 1, "an engine that was not built for this side"


def test_words_of_fp16_engines_are_cached_apart(bundle: Bundle, gpu: Calls) -> None:
    for stage in STAGES:
        write_engine(bundle, stage, verified_on=GPU, precision="fp16" if stage == "clip_text" else "fp32")
    with Segmenter.load(bundle.root, device="cpu", threads=1) as segmenter:
        segmenter.prepare(WORDS)
    with Segmenter.load(bundle.root, device="cuda", threads=1) as segmenter:
        facts = segmenter.segment(colour_image(), WORDS).facts
    assert "clip_text" in {s.stage for s in facts.stages}, "not taken from the fp32 graph's cache"
    assert facts.precision == "fp16+fp32"


def test_an_engine_that_is_passed_over_is_told(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "working_provider", lambda device: None)
    caplog.set_level("WARNING", "odise_rt")
    write_engine(bundle, "unet_tap", engine_version="10.9.0")
    cuda.CudaBackend(bundle, 1)
    assert "engine not used: no TensorRT engine of unet_tap fits" in caplog.text
    assert "was 10.9.0 when it was built and is 10.16.0 here" in caplog.text


def test_order_of_preference(bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "working_provider", lambda device: None)
    write_engine(bundle, "clip_image", "ort-cuda", engine_version="any", platform="any")
    chosen = cuda.CudaBackend(bundle, 1)._chosen["clip_image"]
    assert chosen is not None
    assert chosen.facts.engine == "ort-cuda"
    write_engine(bundle, "clip_image")
    chosen = cuda.CudaBackend(bundle, 1)._chosen["clip_image"]
    assert chosen is not None
    assert chosen.facts.engine == "tensorrt"


@pytest.mark.parametrize(("flags", "turned"), [((CHANNELS_LAST,), True), ((), False)])
def test_onnxruntime_turns_what_an_engine_has_not(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], turned: bool
) -> None:
    asked: list[bool] = []
    engine = write_engine(bundle, "clip_image", "ort-cuda", flags=flags)
    monkeypatch.setattr(ort, "working_provider", lambda device: None)
    monkeypatch.setattr(ort.OrtBackend, "open_graph", lambda *args, channels_last: asked.append(channels_last))
    open_engine_stage(engine, bundle.stages["clip_image"].spec)
    assert asked == [turned]


def test_fewer_windows_at_a_time_when_the_gpu_is_full(bundle: Bundle, gpu: Calls) -> None:
    write_engines(bundle, verified_on=GPU)
    image, options = colour_image(64, 256), SegmentOptions(short_edge=64, long_edge=256)
    with Segmenter.load(bundle.root, device="cuda", threads=1) as segmenter:
        whole = segmenter.segment(image, WORDS, options)
    assert whole.facts.windows_per_batch == 4
    assert whole.facts.notes == ()
    # Four windows need 4 * 3 * 64 * 64 * 4 bytes for themselves and more for scratch: two fit, four do not.
    gpu.limit = 5_000_000
    with Segmenter.load(bundle.root, device="cuda", threads=1) as segmenter:
        fewer = segmenter.segment(image, WORDS, options)
    assert fewer.facts.windows_per_batch == 2
    assert fewer.facts.notes == ("out of memory with 4 windows at a time: ran 2 at a time",)
    assert np.array_equal(fewer.segment_map, whole.segment_map)


def test_doctor_and_inspect_show_engines(bundle: Bundle, gpu: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    write_engines(bundle, verified_on=GPU)
    write_engine(bundle, "clip_image", flags=(), gpu="NVIDIA L4")
    (bundle.root / "engines/rubbish").mkdir()
    entries = {entry["name"]: entry for entry in list_engines(bundle)}
    assert sum(entry["fits"] for entry in entries.values()) == len(STAGES)
    assert entries["rubbish"]["state"].startswith("broken: ")
    assert main(["inspect", str(bundle.root)]) == 0
    text = capsys.readouterr().out
    assert (
        "TensorRT fp32 for Fake GPU, version 10.16.0: clip_image, clip_mask, clip_text, mask_decoder, unet_tap: fits"
        in text
    )
    assert "does not fit: the GPU was NVIDIA L4 when it was built and is Fake GPU here" in text
    assert main(["doctor", str(bundle.root), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["gpu"] == "Fake GPU, compute capability 9.0"
    assert len(findings["bundles"][str(bundle.root)]["engines"]) == len(STAGES) + 2
