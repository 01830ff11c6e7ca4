"""Engines get into a bundle whole and compared, or not at all. GPU and TensorRT are stand-ins, processes are real."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rich.console import Console

from export import engine_builds, engine_folder
from export.build_engines import main
from export.engine_builds import add_engines
from export.engine_folder import EngineFolder
from export.engine_from_onnx import BuildJob, BuildResult
from export.engine_graphs import load_single_precision
from export.engine_options import EngineOptions
from export.engine_process import build_in_process
from export.weight_store import WeightStore, save_graph
from odise_rt.backends import cuda_core, machine
from odise_rt.bundle import Bundle
from odise_rt.engine_check import OutputCheck
from odise_rt.engine_facts import CHANNELS_LAST, ShapeRange
from odise_rt.engines import find_engines
from odise_rt.errors import ExportError, MissingPackageError, OptionsError
from odise_rt.segmenter import Segmenter
from odise_rt.specs import STAGES
from tests.export.conftest import graph_from_text
from tests.odise_rt.fake_bundle import D, colour_image, digest, read_manifest, write_bundle, write_manifest
from tests.odise_rt.fake_gpu import BEHAVIOUR, GPU, Calls, install_in_children

QUIET = Console(quiet=True)
OPTIONS = EngineOptions(("tensorrt",), threads=1, timing_cache=False)
ONE = EngineOptions(("tensorrt",), stages=("clip_image",), threads=1, timing_cache=False)

pytestmark = pytest.mark.usefixtures("fresh_machine")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_bundle(tmp_path / "bundle"))


@pytest.fixture
def gpu(install_gpu: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    install_in_children(monkeypatch, tmp_path / "packages")
    calls = install_gpu()
    monkeypatch.setattr(cuda_core, "free_memory", lambda: 10_000_000_000)
    return calls


def engines_folder(bundle: Bundle) -> list[str]:
    folder = bundle.root / "engines"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def test_builds_compares_and_runs(bundle: Bundle, gpu: Calls) -> None:
    before = (bundle.root / "bundle.json").read_bytes()
    report = add_engines(bundle, OPTIONS, QUIET)
    assert [engine.facts.stage for engine in report.built] == list(STAGES)
    assert (bundle.root / "bundle.json").read_bytes() == before
    found = find_engines(bundle)
    assert not found.broken
    for engine in found.found:
        assert engine.is_verified_on(machine.this_machine())
        assert engine.facts.gpu == GPU
        assert engine.facts.compute_capability == "9.0"
        assert engine.facts.cuda == "13"
        assert "activation-resize" in engine.facts.flags
        assert engine.build["workspace_bytes"] == 8_000_000_000
        assert engine.reference_by.startswith("the bundle's fp32 graphs in ONNX Runtime")
        engine.verify_files()
    words = "red; green; blue; white; stuff: sky"
    with Segmenter.load(bundle.root, device="cpu", threads=1) as segmenter:
        expected = segmenter.segment(colour_image(), words)
    with Segmenter.load(bundle.root, device="cuda", threads=1) as segmenter:
        assert np.array_equal(segmenter.segment(colour_image(), words).segment_map, expected.segment_map)


def test_engines_for_single_windows_are_compared_on_single_windows(bundle: Bundle, gpu: Calls) -> None:
    (engine,) = add_engines(bundle, EngineOptions(**{**vars(ONE), "windows": (1,)}), QUIET).built
    cases = engine.reference(bundle.stages["clip_image"].spec)
    assert [case.inputs["windows"].shape[0] for case in cases] == [1, 1]


def test_what_is_up_to_date_is_kept_and_what_changed_is_built(bundle: Bundle, gpu: Calls) -> None:
    (first,) = add_engines(bundle, ONE, QUIET).built
    stamp = first.path.stat().st_mtime_ns
    again = add_engines(bundle, ONE, QUIET)
    assert (len(again.built), len(again.kept)) == (0, 1)
    assert first.path.stat().st_mtime_ns == stamp
    changes: dict[str, dict[str, Any]] = {
        "mask_decoder": {"sizes": ((96, 128),)},
        "clip_image": {"windows": (1, 3), "optimization_level": 5, "precision": "fp16"},
    }
    for stage, facts in changes.items():
        for name, value in facts.items():
            options = EngineOptions(**{**vars(ONE), "stages": (stage,), name: value})
            assert add_engines(bundle, options, QUIET).built
    rebuilt = add_engines(bundle, EngineOptions(**{**vars(ONE), "rebuild": True}), QUIET)
    assert [engine.folder for engine in rebuilt.built] == [first.folder]
    assert first.path.stat().st_mtime_ns > stamp
    # A damaged one is no engine.
    first.path.write_bytes(b"damaged")
    assert [engine.folder for engine in add_engines(bundle, ONE, QUIET).built] == [first.folder]
    find_engines(bundle).of("clip_image", "tensorrt")[0].verify_files()


@pytest.mark.parametrize("leads_to_one", [True, False])
def test_a_link_is_no_engine(bundle: Bundle, gpu: Calls, tmp_path: Path, leads_to_one: bool) -> None:
    (engine,) = add_engines(bundle, ONE, QUIET).built
    elsewhere = tmp_path / "elsewhere"
    engine.folder.rename(elsewhere if leads_to_one else tmp_path / "gone")
    engine.folder.symlink_to(elsewhere)
    assert [built.folder for built in add_engines(bundle, ONE, QUIET).built] == [engine.folder]
    assert not engine.folder.is_symlink()
    assert elsewhere.exists() == leads_to_one
    assert engines_folder(bundle) == [engine.folder.name]
    assert not find_engines(bundle).broken


def test_the_folder_of_engines_may_vanish_while_a_build_begins(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another build that failed removes it when it is empty."""
    root, times, make = bundle.root / "engines", iter(range(3)), engine_folder.partial_folder

    def remove_first(place: Path) -> Any:
        if next(times, None) is not None:
            root.rmdir()
        return make(place)

    monkeypatch.setattr(engine_folder, "partial_folder", remove_first)
    assert len(add_engines(bundle, ONE, QUIET).built) == 1


def test_builds_that_begin_and_end_at_once(bundle: Bundle) -> None:
    """Each makes the folder of engines if it is missing, and removes it if it is empty."""
    failures: list[BaseException] = []

    def begin_and_end(name: str) -> None:
        try:
            for _ in range(100):
                with EngineFolder(bundle, name) as folder:
                    assert folder.path.is_dir()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=begin_and_end, args=(f"stage{i}.tensorrt",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not (bundle.root / "engines").exists()


@pytest.mark.parametrize("kind", ["wrong", "nan"])
def test_an_engine_that_computes_something_else_is_not_put_in_place(bundle: Bundle, gpu: Calls, kind: str) -> None:
    gpu.corrupt = lambda name, array: array * (np.nan if kind == "nan" else 1.1)
    with pytest.raises(
        ExportError, match=r"stage clip_image: the TensorRT engine does not agree .* Fake GPU, although"
    ):
        add_engines(bundle, ONE, QUIET)
    assert engines_folder(bundle) == []
    assert not (bundle.root / "engines").exists()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("abort", r"stage clip_image: the process that built the TensorRT engine was ended by SIGABRT .*giving up"),
        ("fail", r"stage clip_image: tensorrt 10\.16\.0 built no engine: Error Code 10: Could not find any impl"),
    ],
)
def test_a_builder_that_dies_or_fails(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch, behaviour: str, message: str
) -> None:
    monkeypatch.setenv(BEHAVIOUR, behaviour)
    with pytest.raises(ExportError, match=message):
        add_engines(bundle, ONE, QUIET)
    assert not (bundle.root / "engines").exists()


def test_finished_engines_stay_when_a_later_one_fails(
    bundle: Bundle, gpu: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.corrupt = lambda name, array: array + 1 if name == "mask_logits" else array
    assert main(["--bundle", str(bundle.root), "--engine", "tensorrt", "--threads", "1"]) == 1
    first, second = engines_folder(bundle)
    assert first.startswith("clip_image.")
    assert second.startswith("unet_tap.")
    message = capsys.readouterr().err
    assert "stage mask_decoder" in message
    assert message.endswith(f"; the engine {first} is in place; the engine {second} is in place\n")


@pytest.fixture
def _signals_as_before() -> Iterator[None]:
    # Under nohup SIGHUP would be ignored, as it should.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_as_before")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_builder_and_leaves_nothing(
    bundle: Bundle,
    gpu: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    monkeypatch.setenv(BEHAVIOUR, "hang")
    children: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def record(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        children.append(popen(*args, **kwargs))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", record)

    def interrupt() -> None:
        while not children:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["--bundle", str(bundle.root), "--engine", "tensorrt", "--stages", "clip_image"]) == 130
    thread.join()
    assert capsys.readouterr().err == "stopped: nothing was put in place\n"
    assert children[0].poll() is not None
    assert not (bundle.root / "engines").exists()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into /proc")
def test_a_builder_ends_with_the_process_that_started_it(
    tmp_path: Path, gpu: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BEHAVIOUR, "hang")
    code = (
        "import sys; from pathlib import Path; from export.engine_from_onnx import BuildJob; "
        "from export.engine_process import build_in_process; folder = Path(sys.argv[1]); "
        "build_in_process(BuildJob('clip_text', 'tensorrt', folder / 'g.onnx', folder / 'p.plan', ()), folder)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    try:
        child = _first(lambda: Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())[0]
        command = Path(f"/proc/{child}/cmdline")
        _first(lambda: b"export.engine_from_onnx" in command.read_bytes())
    finally:
        parent.kill()
        parent.wait()
    # Of a process that ended and that nobody waited for, no command is left.
    _first(lambda: not (command.exists() and command.read_bytes()))


def _first(look: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What comes in the end, which has to be soon."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_a_long_build_says_that_it_goes_on(
    tmp_path: Path, gpu: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from export import engine_process

    monkeypatch.setattr(engine_process, "_REPORT_SECONDS", 0.1)
    path = tmp_path / "clip_text.onnx"
    onnx.save(ir.to_proto(graph_from_text("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")), path)
    job = BuildJob(
        "clip_text", "tensorrt", path, tmp_path / "p.plan", ({"x": ShapeRange((1, 4), (1, 4), (2, 4))},),
        timing_cache=tmp_path / "cache/timing",
    )  # fmt: skip
    notes: list[str] = []
    result = build_in_process(job, tmp_path, notes.append)
    assert result.layers == 1
    assert notes
    assert notes[0].startswith("clip_text: still building after 0 s")
    # Timings are kept for the next build, and a damaged file is no reason to fail.
    cache = tmp_path / "cache/timing"
    assert cache.read_bytes() == b"learned;"
    for known, then in ((b"known;", b"known;learned;"), (b"damaged", b"learned;")):
        cache.write_bytes(known)
        job.plan.unlink()
        build_in_process(job, tmp_path)
        assert cache.read_bytes() == then
    # Nor is a place that cannot be written.
    job.plan.unlink()
    build_in_process(dataclasses.replace(job, timing_cache=path / "timing"), tmp_path)
    assert job.plan.is_file()
    assert f"stage clip_text: timings for the next build cannot be kept in {path} (" in caplog.text


def layered_bundle(folder: Path) -> Bundle:
    """The colour bundle with a clip_image of four named layers."""
    root = write_bundle(folder)
    random = np.random.default_rng(0)
    layers = [(3, D), (D, D), (D, D), (D, D)]
    weights = {f"w{k}": (random.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for k, s in enumerate(layers)}
    body = "m = ReduceMean <keepdims = 0> (windows, axes)  " + "  ".join(
        f"{'image_embedding' if k == 3 else f'h{k}'} = MatMul({'m' if k == 0 else f'h{k - 1}'}, w{k})" for k in range(4)
    )
    model = graph_from_text(
        f"g (float[N, 3, s, s] windows) => (float[N, {D}] image_embedding) {{ {body} }}",
        weights | {"axes": np.array([2, 3])},
    )
    for k in range(4):
        value = model.graph.initializers.pop(f"w{k}")
        value.name = f"net.blocks.{k}.fc.weight"
        model.graph.register_initializer(value)
    path = root / "onnx/clip_image.onnx"
    with WeightStore(root / "onnx/clip_image.onnx.data") as store:
        save_graph(model, path, store)
    manifest = read_manifest(root)
    entry = manifest["stages"]["clip_image"]
    entry["sha256"] = digest(path)
    entry["extra_files"] = {"onnx/clip_image.onnx.data": digest(root / "onnx/clip_image.onnx.data")}
    write_manifest(root, manifest)
    return Bundle.open(root)


def _half_products(model: onnx.ModelProto) -> set[str]:
    """Layers whose product is fp16: those whose weight is."""
    return {t.name.split(".")[2] for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}


def test_a_block_that_does_not_bear_fp16_on_the_gpu_is_found(tmp_path: Path, gpu: Calls) -> None:
    """The graph agrees on the CPU; engines whose third layer is fp16 give NaN on this GPU."""
    bundle = layered_bundle(tmp_path / "layered")
    gpu.spoils = lambda model: "2" in _half_products(model)
    options = EngineOptions(**{**vars(ONE), "precision": "fp16"})
    (engine,) = add_engines(bundle, options, QUIET).built
    assert engine.build["passes"]["blocks_kept_fp32"] == ["net.blocks.2"]
    assert engine.is_verified_on(machine.this_machine())
    plan = json.loads(engine.path.read_bytes())
    assert _half_products(onnx.load_from_string(bytes.fromhex(plan["graph"]))) == {"0", "1"}
    assert [p.name for p in (bundle.root / "engines").iterdir()] == [engine.folder.name]
    again = add_engines(bundle, options, QUIET)
    assert [kept.folder for kept in again.kept] == [engine.folder], "the search is not repeated"


def half_precision(bundle: Bundle) -> Bundle:
    """The bundle, said to be in fp16."""
    manifest = read_manifest(bundle.root)
    manifest["precision"] = "fp16"
    write_manifest(bundle.root, manifest)
    return Bundle.open(bundle.root)


def test_engines_of_an_fp16_bundle_are_fp16(bundle: Bundle, gpu: Calls) -> None:
    assert add_engines(half_precision(bundle), ONE, QUIET).built[0].facts.precision == "fp16"


def test_graphs_for_onnxruntime_on_cuda_without_a_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_first_gpu", lambda: (None, None, "there is no NVIDIA driver here"))
    with pytest.raises(ExportError, match=r"bf16 is for TensorRT .* build ONNX Runtime CUDA graphs with .* fp16"):
        add_engines(bundle, EngineOptions(("ort-cuda",), "bf16", unverified=True), QUIET)
    kind = EngineOptions(("ort-cuda",), "fp16", threads=1)
    with pytest.raises(ExportError, match=r"cannot be compared .*no NVIDIA driver here.*--unverified"):
        add_engines(bundle, kind, QUIET)
    report = add_engines(bundle, EngineOptions(("ort-cuda",), "fp16", threads=1, unverified=True), QUIET)
    assert len(report.built) == 5
    for engine in report.built:
        assert engine.verified == ()
        assert engine.facts.engine_version == engine.facts.platform == "any"
        assert engine.facts.flags == (CHANNELS_LAST,)
        model = ir.load(engine.path)
        assert [value.name for value in model.graph.outputs]
        load_single_precision(engine.path)


def test_engines_for_other_gpus_are_not_compared_on_this_one(
    bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = dataclasses.replace(machine.this_machine(), versions={"tensorrt-rtx": "1.7"})
    package = types.SimpleNamespace(
        __name__="tensorrt_rtx", __version__="1.7", ComputeCapability=enum.Enum("Capability", "SM89 SM90")
    )
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", package)
    built: list[BuildJob] = []

    def build(job: BuildJob, *args: Any) -> BuildResult:
        built.append(job)
        job.plan.write_bytes(b"plan")
        return BuildResult(1.0, 4, 1)

    def options(*targets: str, **changes: Any) -> EngineOptions:
        return EngineOptions(("tensorrt-rtx",), stages=("clip_text",), threads=1, targets=targets, **changes)

    monkeypatch.setattr(engine_builds, "build_in_process", build)
    with pytest.raises(ExportError, match=r"no target 8\.8, 9\.9: it builds for 8\.9, 9\.0"):
        add_engines(bundle, options("9.0", "8.8", "9.9"), QUIET, machine=here)
    with pytest.raises(ExportError, match=r"for the compute capabilities 8\.9, and that of the Fake GPU here is 9\.0"):
        add_engines(bundle, options("8.9"), QUIET, machine=here)
    assert not built
    (engine,) = add_engines(bundle, options("8.9", unverified=True), QUIET, machine=here).built
    assert engine.verified == ()
    agrees = OutputCheck(0, "text_embedding", 1.0, 0.0, 0.0, 0, True)
    monkeypatch.setattr(engine_builds._StageBuild, "_compare", lambda self, engine: [agrees])
    for targets in ((), ("9.0",), ("8.9", "9.0")):
        (engine,) = add_engines(bundle, options(*targets, rebuild=True), QUIET, machine=here).built
        assert engine.is_verified_on(here)


def test_packages_and_gpus_that_are_missing(bundle: Bundle, gpu: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPackageError, match=r"pip install 'odise_rt\[tensorrt-rtx\]'"):
        add_engines(bundle, EngineOptions(("tensorrt-rtx",)), QUIET)
    monkeypatch.setattr(machine, "_first_gpu", lambda: (None, None, "there is no NVIDIA driver here"))
    machine.this_machine.cache_clear()
    with pytest.raises(ExportError, match="only on the GPU that will run them: there is no NVIDIA driver here"):
        add_engines(bundle, EngineOptions(("tensorrt",), unverified=True), QUIET)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command_adds_engines(bundle: Bundle, gpu: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--bundle", str(bundle.root), "--engine", "tensorrt", "--stages", "clip_text", "--threads", "1"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "1 engines built, 0 were there already" in out
    assert "✓ clip_text: TensorRT, fp32" in out
    assert main(args) == 0
    assert "0 engines built, 1 were there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bundle", "B"], "--bundle needs --engine"),
        (["--bundle", "B", "--engine", "ort-cuda", "--out", "o"], "it cannot go with --out"),
        (["--bundle", "B", "--engine", "ort-cuda", "--checkpoint", "c"], "it cannot go with --checkpoint"),
        (
            ["--bundle", "B", "--engine", "ort-cuda", "--precision", "fp16"],
            "cannot go with --precision; the precision of",
        ),
        (["--bundle", "B", "--engine", "ort-cuda", "--force", "--keep-going"], "cannot go with --force, --keep-going"),
        (["--bundle", "B", "--engine", "ort-cuda", "--config", "odise-tiny"], "it cannot go with --config"),
        (["--bundle", "B", "--engine", "ort-cuda", "--seed", "0"], "it cannot go with --seed"),
        (["--bundle", "B", "--engine", "ort-cuda", "--size", "64x64"], "take any size: it cannot go with --size"),
        (["--bundle", "B", "--engine", "tensorrt", "--target", "8.9"], "it cannot go with --target"),
        (["--checkpoint", "c"], "an export needs --out"),
        (["--checkpoint", "c", "--out", "c/new/bundle"], "--out c/new/bundle lies inside c"),
        (["--checkpoint", "c", "--out", "c"], "--out c lies inside c"),
        (["--checkpoint", "c", "--out", "o", "--config", "odise-tiny"], "of its own: it cannot go with --config"),
        (["--checkpoint", "c", "--out", "o", "--seed", "3"], "have a seed: it cannot go with --seed"),
        (["--checkpoint", "c", "--out", "o", "--training-labels", "l"], "words: it cannot go with --training-labels"),
        (["--checkpoint", "c", "--out", "o", "--rebuild"], "needs --engine: it cannot go with --rebuild"),
        (["--checkpoint", "c", "--stages", "clip_text", "--out", "o"], "no bundle in place: it cannot go with --out"),
        (
            ["--checkpoint", "c", "--stages", "clip_text", "--force", "--engine", "ort-cuda"],
            "it cannot go with --force, --engine",
        ),
        (["--bundle", "nowhere", "--engine", "ort-cuda", "--unverified"], "no bundle at nowhere"),
        (["--bundle", "nowhere", "--engine", "tensorrt-rtx", "--unverified"], "no bundle at nowhere"),
        (["--out", "o", "--engine", "tensorrt-rtx", "--unverified"], "expected one source"),
        (["--checkpoint", "c", "--out", "o", "--engine", "tensorrt-rtx", "--unverified"], "c does not exist"),
        (["--init", "random", "--out", "o", "--image", "i", "--engine", "tensorrt-rtx"], "i does not exist"),
        (["--bundle", "B", "--engine", "tensorrt-rtx", "--unverified"], "is not installed"),
    ],
)
def test_command_refuses(
    bundle: Bundle, gpu: Calls, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main([str(bundle.root) if arg == "B" else arg for arg in args]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--size", "1024"], "'1024' is no size: expected HEIGHTxWIDTH"),
        (["--size", "-1x5"], "is no size"),
        (["--windows", "1,,2"], "are no counts"),
        (["--engine", "tensorflow"], "invalid choice: 'tensorflow'"),
    ],
)
def test_command_refuses_what_it_cannot_read(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--bundle", "B", *[f"{args[0]}={args[1]}"]])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sizes": ((1, 64),)}, OptionsError, "size 1x64"),
        ({"windows": (1, 100)}, OptionsError, "window counts are"),
        ({"precision": "fp32"}, ExportError, "its weights are rounded already"),
        ({"kinds": ("ort-cuda",)}, ExportError, r"cannot be compared .* has no CUDAExecutionProvider .* --unverified"),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(
    bundle: Bundle,
    gpu: Calls,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(engine_builds, "references_from_bundle", lambda *args: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        add_engines(half_precision(bundle), EngineOptions(**{**vars(ONE), **changes}), QUIET)
    assert not (bundle.root / "engines").exists()


def test_a_killed_build_is_cleaned_up_by_the_next(bundle: Bundle, gpu: Calls) -> None:
    left = bundle.root / "engines/.clip_image.tensorrt.dead.partial"
    left.mkdir(parents=True)
    (left / "clip_image.plan").write_bytes(b"half")
    old = time.time() - 3600
    os.utime(left, (old, old))
    (engine,) = add_engines(bundle, ONE, QUIET).built
    assert engines_folder(bundle) == [engine.folder.name]


def test_importing_the_builder_takes_neither_torch_nor_onnx() -> None:
    code = "import sys, export.engine_from_onnx; print([m for m in ('torch', 'onnx', 'tensorrt') if m in sys.modules])"
    root = Path(engine_builds.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
