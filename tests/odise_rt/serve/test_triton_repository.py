"""The model repository as written: complete, derived from the specs, whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odise_rt import Bundle, OptionsError, cli
from odise_rt.errors import BackendError, BundleError
from odise_rt.serve.triton.bls import TritonBackend
from odise_rt.serve.triton.model_config import ModelConfig, Tensor, stage_config
from odise_rt.serve.triton.orchestrator import read_options
from odise_rt.serve.triton.repository import RepositoryOptions, export_repository, parameters_of
from odise_rt.specs import STAGES, stage_specs
from tests.odise_rt.engine_bundle import write_engine
from tests.odise_rt.fake_bundle import digest, make_facts, read_manifest, write_manifest


def files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def export(bundle: Path, out: Path, force: bool = False, **options: Any) -> list[str]:
    return export_repository(Bundle.open(bundle), out, RepositoryOptions(**options), force)


def test_every_stage_is_a_model_and_the_orchestrator_has_what_it_needs(label_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    models = export(label_bundle, out)
    assert models == ["odise", *(f"odise_{s}" for s in STAGES)]
    expected = {f"{m}/config.pbtxt" for m in models} | {f"odise_{s}/1/model.onnx" for s in STAGES}
    expected |= {"odise/1/model.py"} | {
        f"odise/1/bundle/{n}" for n in ("bundle.json", "constants.npz", "tokenizer.json")
    }
    assert files(out) == expected
    for stage in STAGES:
        assert digest(out / f"odise_{stage}/1/model.onnx") == digest(label_bundle / f"onnx/{stage}.onnx")
    inside = Bundle.open(out / "odise/1/bundle", graphs=False)
    assert inside.digest == Bundle.open(label_bundle).digest
    with pytest.raises(BundleError, match="lacks"):
        Bundle.open(out / "odise/1/bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["models"]


def test_a_bundle_without_graphs_is_checked_all_the_same(label_bundle: Path, tmp_path: Path) -> None:
    export(label_bundle, tmp_path / "models")
    root = tmp_path / "models/odise/1/bundle"
    (root / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match="altered"):
        Bundle.open(root, graphs=False)
    manifest = read_manifest(root)
    manifest["stages"]["unet_tap"]["file"] = "../../../unet.onnx"
    write_manifest(root, manifest)
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(root, verify=False, graphs=False)


def test_stages_inside_is_one_model_with_the_whole_bundle(label_bundle: Path, tmp_path: Path) -> None:
    assert export(label_bundle, tmp_path / "m", stages="inside", name="seg") == ["seg"]
    assert Bundle.open(tmp_path / "m/seg/1/bundle").verified
    config = (tmp_path / "m/seg/config.pbtxt").read_text()
    assert 'key: "stages" value { string_value: "inside" }' in config


def test_stages_python_have_scripts_and_graphs(label_bundle: Path, tmp_path: Path) -> None:
    export(label_bundle, tmp_path / "m", stages="python")
    for stage in STAGES:
        assert 'backend: "python"' in (tmp_path / f"m/odise_{stage}/config.pbtxt").read_text()
        assert "stage_model import TritonPythonModel" in (tmp_path / f"m/odise_{stage}/1/model.py").read_text()
        assert (tmp_path / f"m/odise_{stage}/1/model.onnx").is_file()


def test_every_python_model_has_the_environment(label_bundle: Path, tmp_path: Path) -> None:
    def models_with_it(stages: str) -> set[str]:
        export(label_bundle, tmp_path / stages, stages=stages, environment="/opt/odise.tar.gz")
        line = 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/opt/odise.tar.gz" } }'
        return {p.parent.name for p in (tmp_path / stages).glob("*/config.pbtxt") if line in p.read_text()}

    assert models_with_it("python") == {"odise", *(f"odise_{s}" for s in STAGES)}
    assert models_with_it("triton") == models_with_it("inside") == {"odise"}


def test_configurations_follow_the_specs() -> None:
    specs = stage_specs(make_facts())

    def config(stage: str) -> ModelConfig:
        return stage_config(specs[stage], stage, "onnxruntime", "model.onnx", instances=2, kind="gpu", delay=7)

    assert config("clip_image").max_batch > 0
    assert config("clip_image").inputs == (Tensor("windows", "TYPE_FP32", (3, -1, -1)),)
    assert config("clip_text").inputs == (Tensor("tokens", "TYPE_INT64", (12,)),)
    unet = config("unet_tap")
    assert unet.max_batch == 0  # its constants have no window dimension
    assert dict(zip((t.name for t in unet.inputs), (t.dims for t in unet.inputs), strict=True)) == {
        "windows": (-1, 3, -1, -1),
        "image_embedding": (-1, 8),
        "noise": (1, 4, 8, 8),
        "null_text_embedding": (1, 3, 4),
    }
    text = config("clip_image").to_pbtxt()
    assert "instance_group [ { count: 2 kind: KIND_GPU } ]" in text
    assert "max_queue_delay_microseconds: 7" in text
    assert "dynamic_batching" not in unet.to_pbtxt()
    assert "num_versions: 1" in text


def test_text_format_is_escaped() -> None:
    config = ModelConfig("a", "python", (), (), "model.py", parameters={"path": 'C:\\x "y"\n'})
    assert 'string_value: "C:\\\\x \\"y\\"\\n"' in config.to_pbtxt()


def test_variants_become_engines(new_bundle: Callable[[], Path], tmp_path: Path) -> None:
    bundle = new_bundle()
    (bundle / "engines/sm90").mkdir(parents=True)
    plan = bundle / "engines/sm90/unet_tap.plan"
    plan.write_bytes(b"not a real plan")
    manifest = read_manifest(bundle)
    manifest["stages"]["unet_tap"]["variants"] = {
        "trt-sm90": {"file": "engines/sm90/unet_tap.plan", "sha256": digest(plan)}
    }
    write_manifest(bundle, manifest)
    export(bundle, tmp_path / "m", variant="trt-sm90", kind="gpu")
    assert (tmp_path / "m/odise_unet_tap/1/model.plan").read_bytes() == b"not a real plan"
    assert 'backend: "tensorrt"' in (tmp_path / "m/odise_unet_tap/config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in (tmp_path / "m/odise_clip_text/config.pbtxt").read_text()
    with pytest.raises(OptionsError, match="no variant 'other'"):
        export(bundle, tmp_path / "n", variant="other")
    with pytest.raises(OptionsError, match="runs ONNX graphs only"):
        export(bundle, tmp_path / "n", variant="trt-sm90", stages="python")
    assert not (tmp_path / "n").exists()


def test_plans_of_a_gpu_are_taken_where_there_are_some(new_bundle: Callable[[], Path], tmp_path: Path) -> None:
    root = new_bundle()
    bundle = Bundle.open(root)
    engine = write_engine(bundle, "unet_tap")
    gpu = str(engine.facts.gpu)
    export(root, tmp_path / "m", plans=gpu, kind="gpu")
    assert digest(tmp_path / "m/odise_unet_tap/1/model.plan") == digest(engine.path)
    assert 'backend: "tensorrt"' in (tmp_path / "m/odise_unet_tap/config.pbtxt").read_text()
    assert (tmp_path / "m/odise_clip_text/1/model.onnx").is_file()
    export(root, tmp_path / "any", plans="any", kind="gpu")

    write_engine(bundle, "unet_tap", gpu="Another GPU")
    with pytest.raises(OptionsError, match="several plans of unet_tap"):
        export(root, tmp_path / "n", plans="any", kind="gpu")
    export(root, tmp_path / "other", plans="Another GPU", kind="gpu")
    with pytest.raises(OptionsError, match="no TensorRT plan for 'A third'"):
        export(root, tmp_path / "n", plans="A third", kind="gpu")
    with pytest.raises(OptionsError, match="--kind gpu"):
        export(root, tmp_path / "n", plans="any")
    engine.path.write_bytes(b"altered")
    with pytest.raises(BundleError, match="altered"):
        export(root, tmp_path / "n", plans=gpu, kind="gpu")
    assert not (tmp_path / "n").exists()


def test_weights_keep_the_names_that_graphs_know(new_bundle: Callable[[], Path], tmp_path: Path) -> None:
    bundle = new_bundle()
    (bundle / "onnx/unet.data").write_bytes(b"weights")
    manifest = read_manifest(bundle)
    manifest["stages"]["unet_tap"]["extra_files"] = {"onnx/unet.data": digest(bundle / "onnx/unet.data")}
    write_manifest(bundle, manifest)
    export(bundle, tmp_path / "m")
    assert (tmp_path / "m/odise_unet_tap/1/unet.data").read_bytes() == b"weights"


def test_places_that_are_taken(label_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    export(label_bundle, out, name="one")
    with pytest.raises(OptionsError, match="pass --force"):
        export(label_bundle, out)
    export(label_bundle, out, force=True, name="two")
    assert {p.name for p in out.iterdir()} == {"two", *(f"two_{s}" for s in STAGES)}
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("precious")
    with pytest.raises(OptionsError, match="something else"):
        export(label_bundle, precious, force=True)
    with pytest.raises(OptionsError, match="a file or a link"):
        export(label_bundle, precious / "thesis.tex", force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"m", "home"}


def test_a_failed_export_leaves_the_old_repository(
    label_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m"
    export(label_bundle, out, name="old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("odise_rt.serve.triton.repository._copy_graph", full)
    with pytest.raises(OSError, match="No space"):
        export(label_bundle, out, force=True, name="new")
    assert (out / "old/config.pbtxt").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"m"}


@pytest.mark.parametrize(
    "options",
    [{"name": "a/b"}, {"name": ""}, {"instances": 0}, {"orchestrators": 0}, {"batch_delay": -1}, {"max_words": 0}],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(OptionsError):
        RepositoryOptions(**options)


def test_command(label_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m"
    assert cli.main(["export-triton", str(label_bundle), "--out", str(out), "--json", "--stages", "inside"]) == 0
    assert json.loads(capsys.readouterr().out) == {"repository": str(out), "models": ["odise"]}
    assert cli.main(["export-triton", str(label_bundle), "--out", str(out)]) == 1
    assert "--force" in capsys.readouterr().err


def test_parameters_come_back_as_triton_gives_them(label_bundle: Path, tmp_path: Path) -> None:
    export(label_bundle, tmp_path / "m", max_pixels=123, max_words=7)
    text = (tmp_path / "m/odise/config.pbtxt").read_text()
    written = dict(re.findall(r'key: "(\w+)" value { string_value: "(\w+)" }', text))
    triton = json.dumps({"parameters": {k: {"string_value": v} for k, v in written.items()}})
    assert parameters_of(triton) == {"stages": "triton", "device": "cpu", "max_pixels": "123", "max_words": "7"}


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"{", "not valid JSON"), (b'{"unknown": 0.1, "unknown": 0.2}', "'unknown' occurs twice"),
     (b"[1]", "no object"), (b'{"max_pixels": 1}', "max_pixels"),
     (b'{"short_edge": "x"}', "short_edge"), (b'{"outputs": 3}', "outputs is 3"),
     (b"\xff", "UTF-8"), (b"[" * 100_000, "OPTIONS")],
)  # fmt: skip
def test_options_of_requests(text: bytes, words: str) -> None:
    with pytest.raises(OptionsError, match=words):
        read_options(np.array([text], dtype=np.object_), 100)


def test_good_options_of_requests() -> None:
    value = np.array([b'{"short_edge": 32, "outputs": ["instance"]}'], dtype=np.object_)
    options = read_options(value, 100)
    assert (options.short_edge, options.max_pixels, options.outputs) == (32, 100, ("panoptic", "instance"))
    assert read_options(None, 5).max_pixels == 5


def test_outside_of_triton_the_backend_says_so(label_bundle: Path) -> None:
    with pytest.raises(BackendError, match="inside Triton"):
        TritonBackend("odise", "cpu").load(Bundle.open(label_bundle), "unet_tap")
