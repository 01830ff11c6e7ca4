"""TensorRT-RTX really builds the engines of odise-tiny; that needs its package and no GPU. `make engines` runs this."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from export.engine_builds import add_engines
from export.engine_from_onnx import BuildJob
from export.engine_options import EngineOptions
from export.engine_process import build_in_process
from export.exporter import ExportOptions, build_bundle
from export.precision import EnginePrecision
from export.sources import from_checkpoint
from odise_rt.bundle import Bundle
from odise_rt.engine_facts import ShapeRange
from odise_rt.engines import find_engines
from odise_rt.errors import ExportError
from odise_rt.specs import STAGES
from tests.odise_rt import fake_gpu

pytestmark = [
    pytest.mark.tensorrt_rtx,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None, reason="Requires: pip install 'odise_rt[tensorrt-rtx]'"
    ),
]
ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "training/pretrained/odise-tiny"


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """odise-tiny: the bundle that `make demo` exported, or a new one."""
    folder = tmp_path_factory.mktemp("rtx") / "odise-tiny"
    made = Path(os.environ.get("ODISE_RT_BUNDLE", ROOT / "out/odise-tiny"))
    if (made / "bundle.json").is_file():
        shutil.copytree(made, folder, ignore=shutil.ignore_patterns("engines"))
    else:
        build_bundle(from_checkpoint(CHECKPOINT), folder, ExportOptions(threads=2), Console(quiet=True))
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_builds_the_five_engines(tiny_bundle: Path, precision: EnginePrecision) -> None:
    bundle = Bundle.open(tiny_bundle)
    before = (tiny_bundle / "bundle.json").read_bytes()
    options = EngineOptions(("tensorrt-rtx",), precision, targets=("8.9",), unverified=True, threads=2)
    report = add_engines(bundle, options, Console(quiet=True))
    assert [engine.facts.stage for engine in report.built] == list(STAGES)
    for engine in report.built:
        assert engine.facts.precision == precision
        assert engine.facts.targets == ("8.9",)
        assert "user-allocation" in engine.facts.flags
        assert engine.path.stat().st_size > 1_000_000
        assert engine.verified == ()
        assert sorted(p.name for p in engine.folder.iterdir()) == sorted([*engine.files, "engine.json"])
        engine.verify_files()
        assert len(engine.reference(bundle.stages[engine.facts.stage].spec)) == 2
    decoder = next(engine for engine in report.built if engine.facts.stage == "mask_decoder")
    assert decoder.build["passes"]["grid_samples_as_gathers"] == 9
    assert (tiny_bundle / "bundle.json").read_bytes() == before

    again = add_engines(bundle, options, Console(quiet=True))
    assert not again.built
    assert [engine.folder for engine in again.kept] == [engine.folder for engine in report.built]
    found = find_engines(bundle)
    assert not found.broken


def _graph(folder: Path, domain: str) -> Path:
    """One node of an operator that nobody has."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Frobnicate", ["x"], ["y"], domain=domain)], "g", [x], [y])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("somebody", 1)]
    path = folder / "clip_text.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def _job(folder: Path, graph: Path, targets: tuple[str, ...] = ("8.9",)) -> BuildJob:
    shape = ShapeRange((1, 4), (2, 4), (3, 4))
    return BuildJob("clip_text", "tensorrt-rtx", graph, folder / "clip_text.plan", ({"x": shape},), targets)


def test_unknown_operator_is_an_error_that_names_the_stage(tmp_path: Path) -> None:
    """TensorRT-RTX aborts its process for one; ours goes on."""
    with pytest.raises(ExportError, match=r"stage clip_text: .*Frobnicate"):
        build_in_process(_job(tmp_path, _graph(tmp_path, "somebody")), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["clip_text.onnx"]


def test_file_that_is_no_graph(tmp_path: Path) -> None:
    graph = tmp_path / "clip_text.onnx"
    graph.write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"stage clip_text: tensorrt_rtx .* does not read clip_text.onnx"):
        build_in_process(_job(tmp_path, graph), tmp_path)


def test_target_that_it_does_not_know(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    path = tmp_path / "clip_text.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(ExportError, match=r"no target 9\.0: it builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0"):
        build_in_process(_job(tmp_path, path, ("9.0",)), tmp_path)
    result = build_in_process(_job(tmp_path, path), tmp_path)
    assert result.plan_bytes == (tmp_path / "clip_text.plan").stat().st_size
    assert result.layers >= 1


def test_the_stand_in_offers_what_the_package_offers() -> None:
    """The runtime's tests run on a stand-in of TensorRT: it has no function that the package lacks."""
    package = pytest.importorskip("tensorrt_rtx")
    stand_in = fake_gpu.tensorrt_module(fake_gpu.Calls())
    classes = {
        "IExecutionContext": fake_gpu._Context,
        "ICudaEngine": fake_gpu._Engine,
        "INetworkDefinition": fake_gpu._Network,
        "IBuilderConfig": fake_gpu._Config,
        "IOptimizationProfile": fake_gpu._OptimizationProfile,
        "ITimingCache": fake_gpu._TimingCache,
        "ParserError": fake_gpu._Error,
    } | {name: value for name, value in vars(stand_in).items() if isinstance(value, type)}
    own = {("INetworkDefinition", "model")}
    missing = [name for name in vars(stand_in) if not name.startswith("__") and not hasattr(package, name)]
    missing += [
        f"{name}.{part}"
        for name, found in classes.items()
        for part in vars(found)
        if not part.startswith("_") and not hasattr(getattr(package, name), part) and (name, part) not in own
    ]
    assert missing == []
