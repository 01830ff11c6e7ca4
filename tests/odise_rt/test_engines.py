"""Engines in a bundle: found, described, refused; never taken for what they are not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from odise_rt import Bundle, BundleError, engines
from odise_rt.backends.machine import engine_platform
from odise_rt.engine_check import Bounds, Case, check_output, check_stage
from odise_rt.engine_facts import EngineFacts, Machine, ShapeRange
from odise_rt.engines import find_engines, open_engine, read_reference, write_reference
from odise_rt.errors import BackendError
from tests.odise_rt.engine_bundle import replace_file, write_engine, write_engines
from tests.odise_rt.fake_gpu import GPU, VERSION

HERE = Machine(engine_platform(), GPU, "9.0", None, {"tensorrt": VERSION, "tensorrt-rtx": VERSION}, {"tensorrt": "13"})


@pytest.fixture
def bundle(new_bundle: Callable[[], Path]) -> Bundle:
    return Bundle.open(new_bundle())


def alter(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change an engine's description."""
    path = folder / "engine.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_engines_do_not_change_the_bundle(bundle: Bundle) -> None:
    before = bundle.digest
    written = write_engines(bundle)
    again = Bundle.open(bundle.root)
    assert again.digest == before
    found = find_engines(again)
    assert {e.folder for e in found.found} == {e.folder for e in written}
    assert not found.broken
    assert found.found[0].facts == next(e.facts for e in written if e.folder == found.found[0].folder)


def test_every_fact_gives_another_key(bundle: Bundle) -> None:
    facts = write_engine(bundle, "clip_image").facts
    changes: dict[str, Any] = {
        "engine": "tensorrt-rtx",
        "stage": "clip_text",
        "engine_version": "10.16.1",
        "cuda": "12",
        "platform": "linux-aarch64",
        "gpu": "Other GPU",
        "compute_capability": "8.9",
        "targets": ("8.9",),
        "graph": "1" * 64,
        "built_graph": "1" * 64,
        "precision": "fp16",
        "profiles": facts.profiles[:1],
        "flags": (),
    }
    assert set(changes) == {f.name for f in dataclasses.fields(EngineFacts)}
    keys = {dataclasses.replace(facts, **{name: value}).key for name, value in changes.items()}
    assert len(keys | {facts.key}) == len(changes) + 1
    assert EngineFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine_version": "10.9.0"}, "the version of TensorRT was 10.9.0 when it was built and is 10.16.0 here"),
        ({"cuda": "12"}, "CUDA's major version was 12 when it was built and is 13 here"),
        ({"gpu": "NVIDIA L4"}, "the GPU was NVIDIA L4 when it was built and is Fake GPU here"),
        ({"compute_capability": "8.9"}, "the compute capability was 8.9 when it was built and is 9.0 here"),
        ({"platform": "win32-amd64"}, "the platform was win32-amd64"),
        ({"graph": "ab" * 32}, "the graph was abababababab"),
    ],
)
def test_a_mismatch_names_the_fact_and_the_command(bundle: Bundle, change: dict[str, Any], message: str) -> None:
    write_engine(bundle, "clip_image", **change)
    engines = find_engines(bundle)
    assert engines.fitting(bundle, HERE, "clip_image", "tensorrt") is None
    why = engines.why_not(bundle, HERE, "clip_image", "tensorrt")
    assert message in why
    assert f"python -m export.build_engines --bundle {bundle.root} --engine tensorrt" in why


def test_targets_must_hold_the_device(bundle: Bundle) -> None:
    engine = write_engine(bundle, "clip_image", "tensorrt-rtx", cuda=None)
    assert [m.fact for m in engine.mismatches(bundle, HERE)] == ["the compute capability"]
    assert not engine.mismatches(bundle, dataclasses.replace(HERE, compute_capability="8.9"))
    without = dataclasses.replace(HERE, gpu=None, compute_capability=None, no_gpu="there is no driver")
    assert "missing (there is no driver)" in str(engine.mismatches(bundle, without)[0])


def test_of_several_that_fit_a_verified_one_is_taken(bundle: Bundle) -> None:
    first = write_engine(bundle, "clip_image")
    second = write_engine(bundle, "clip_image", flags=("other",))
    assert find_engines(bundle).fitting(bundle, HERE, "clip_image", "tensorrt") is not None
    for chosen in (second, first):
        for engine in (first, second):
            alter(engine.folder, lambda data: data.update(verified=[]))
        alter(chosen.folder, lambda data: data.update(verified=[{"gpu": GPU, "version": VERSION}]))
        found = find_engines(bundle).fitting(bundle, HERE, "clip_image", "tensorrt")
        assert found is not None
        assert found.folder == chosen.folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "engine.json").unlink(), "no readable engine.json"),
        (lambda folder: (folder / "engine.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "engine.json").write_text("[" * 100_000), "damaged"),
        (lambda folder: (folder / "engine.json").write_text("[]"), "damaged"),
        (lambda folder: alter(folder, lambda d: d.update(schema_version=2)), "schema version 2"),
        (lambda folder: alter(folder, lambda d: d["facts"].update(gpu="Other")), "facts were altered"),
        (lambda folder: alter(folder, lambda d: d["facts"].update(more=1)), "damaged"),
        (lambda folder: alter(folder, lambda d: d["facts"].update(stage="../x")), "damaged"),
        (lambda folder: alter(folder, lambda d: d["facts"]["profiles"][0]["windows"].update(min=[0])), "damaged"),
        (lambda folder: alter(folder, lambda d: d["files"].update({"../../bundle.json": "0" * 64})), "no plain file"),
        (lambda folder: alter(folder, lambda d: d["files"].pop("clip_image.plan")), "no SHA-256 for clip_image.plan"),
        (lambda folder: alter(folder, lambda d: d["files"].update(x=1)), "has no SHA-256"),
        (lambda folder: alter(folder, lambda d: d["bounds"].update(max=float("nan"))), "damaged"),
        (lambda folder: (folder / "clip_image.plan").unlink(), "no plain file"),
        (lambda folder: _link(folder / "clip_image.plan"), "no plain file"),
        (lambda folder: folder.rename(folder.with_name("clip_image.tensorrt.0000")), "its folder is"),
    ],
)
def test_a_broken_engine_is_reported_and_the_others_are_found(
    bundle: Bundle, damage: Callable[[Path], Any], message: str
) -> None:
    folder = write_engine(bundle, "clip_image").folder
    write_engine(bundle, "clip_text")
    damage(folder)
    found = find_engines(bundle)
    assert [e.facts.stage for e in found.found] == ["clip_text"]
    (problem,) = found.broken.values()
    assert message in problem
    assert "build the engine again" in problem


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def test_folders_in_the_making_are_not_engines(bundle: Bundle) -> None:
    (bundle.root / "engines/.clip_image.tensorrt.x.partial").mkdir(parents=True)
    (bundle.root / "engines/notes.txt").write_text("")
    found = find_engines(bundle)
    assert not found.found
    assert list(found.broken) == ["notes.txt"]


def test_altered_files_are_found(bundle: Bundle) -> None:
    engine = write_engine(bundle, "clip_image")
    engine.verify_files()
    replace_file(engine, "clip_image.plan", engine.path.read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"clip_image\.plan was altered"):
        open_engine(engine.folder).verify_files()


@pytest.mark.parametrize("location", ["other.bin", "../../constants.npz", "/outside.bin"])
def test_a_graph_takes_weights_from_files_of_its_engine_alone(bundle: Bundle, location: str) -> None:
    engine = write_engine(bundle, "clip_image", "ort-cuda")
    (engine.folder / "other.bin").write_bytes(bytes(1 << 16))
    model = onnx.load(engine.path)
    model.graph.initializer[0].external_data.add(key="location", value=location)
    content = model.SerializeToString()
    replace_file(engine, engine.path.name, content)
    files = {**engine.files, engine.path.name: hashlib.sha256(content).hexdigest()}
    alter(engine.folder, lambda d: d.update(files=files))
    with pytest.raises(BundleError, match="takes weights from"):
        open_engine(engine.folder)
    if location == "other.bin":
        alter(engine.folder, lambda d: d["files"].update({location: "0" * 64}))
        assert location in open_engine(engine.folder).files


def test_reference_of_another_stage_or_damaged(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = write_engine(bundle, "clip_image")
    specs = {name: entry.spec for name, entry in bundle.stages.items()}
    (case,) = engine.reference(specs["clip_image"])
    assert set(case.inputs) == {"windows"}
    with pytest.raises(BundleError, match="damaged or of another stage"):
        engine.reference(specs["clip_text"])
    path = engine.folder / "reference.npz"
    monkeypatch.setattr(engines, "MAX_REFERENCE_BYTES", 1000)
    with pytest.raises(BundleError, match="more than 1000"):
        read_reference(path, specs["clip_image"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BundleError, match="damaged or of another stage"):
        read_reference(path, specs["clip_image"])
    np.savez(path, **{"0.inputs.windows": np.array([{}], object)})  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="damaged or of another stage"):
        read_reference(path, specs["clip_image"])


def test_a_reference_file_holds_the_arrays_alone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored: dict[str, Any] = {}
    # As numpy before 2.2 does it: what it has no name for is an array.
    monkeypatch.setattr(np, "savez_compressed", lambda file, *args, **arrays: stored.update(arrays))
    write_reference(tmp_path / "reference.npz", [Case({"windows": np.ones(2)}, {"image_embedding": np.ones(3)})] * 2)
    assert list(stored) == [f"{k}.{name}" for k in (0, 1) for name in ("inputs.windows", "outputs.image_embedding")]


def test_reference_that_is_no_archive_of_numbers(bundle: Bundle) -> None:
    engine, spec = write_engine(bundle, "clip_image"), bundle.stages["clip_image"].spec
    path = engine.folder / "reference.npz"
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK")  # of the archive's directory
    content[entry + 10 : entry + 12] = (99).to_bytes(2, "little")  # a compression that does not exist
    replace_file(engine, path.name, bytes(content))
    with pytest.raises(BundleError, match="damaged or of another stage"):
        read_reference(path, spec)
    for array in (np.array(["a"]), np.array([b"a"])):
        np.savez(path, **{f"0.outputs.{t.name}": array for t in spec.outputs})
        with pytest.raises(BundleError, match="damaged or of another stage"):
            read_reference(path, spec)
    with path.open("wb") as file:
        np.save(file, np.ones(3, np.float32))
    with pytest.raises(BundleError, match="damaged or of another stage"):
        read_reference(path, spec)


def test_a_verification_is_written_down_once_for_each_device_and_version(bundle: Bundle) -> None:
    def runs(gpu: str | None, version: str) -> Machine:
        return dataclasses.replace(HERE, gpu=gpu, versions={"ort-cuda": version, "tensorrt": VERSION})

    engine = write_engine(bundle, "clip_image", "ort-cuda")
    check = check_output(np.ones(2, np.float32), np.ones(2, np.float32), engine.bounds, "image_embedding")
    for machine in (runs("A", "1.20"), runs("B", "1.20"), runs("A", "1.21"), runs("A", "1.20")):
        engine = engine.record_verification(machine, [check])
    again = open_engine(engine.folder)
    places = [(entry["gpu"], entry["version"]) for entry in again.verified]
    assert places == [("B", "1.20"), ("A", "1.21"), ("A", "1.20")]
    assert again.verified[0]["checks"][0]["passed"] is True
    found = {(gpu, v): again.is_verified_on(runs(gpu, v)) for gpu in ("A", "B", "C", None) for v in ("1.20", "1.21")}
    assert {place for place, verified in found.items() if verified} == set(places)


# ---- comparing -------------------------------------------------------------------------------------------------------

BOUNDS = Bounds(1e-2, 1e-3)


def _check(found: list[float], expected: list[float]) -> Any:
    return check_output(np.array(found, np.float32), np.array(expected, np.float32), BOUNDS, "y", 3)


def test_outputs_within_bounds_pass() -> None:
    good = _check([10.0, 0.05], [10.0, 0.04])
    assert good.passed
    assert good.scale == 10
    assert good.max_error == pytest.approx(0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_fail_whatever_the_bounds(value: float) -> None:
    # Where a zero was expected, so that nothing but the guard can find it.
    bad = check_output(np.array([value, 1], np.float32), np.array([0, 1], np.float32), Bounds(0.9, 0.9), "y")
    assert not bad.passed
    assert bad.not_finite == 1
    assert "1 NaN or infinite" in bad.describe(BOUNDS)


def test_one_large_or_many_small_errors_fail() -> None:
    assert not _check([10.0] + [0.0] * 999, [10.2] + [0.0] * 999).passed
    many = _check([10.0, *[0.05] * 9], [10.0, *[0.0] * 9])
    assert many.max_error <= BOUNDS.max * many.scale
    assert not many.passed
    assert "case 3" in many.describe(BOUNDS)


def test_zeros_must_be_zeros() -> None:
    assert _check([0.0], [0.0]).passed
    assert not _check([1e-6], [0.0]).passed


def test_other_shapes_and_no_cases_are_errors(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"y of case 3 is float32 \(1,\), expected float32 \(2,\)"):
        _check([1.0], [1.0, 1.0])
    spec = bundle.stages["clip_image"].spec
    with pytest.raises(BackendError, match="nothing to compare"):
        check_stage(lambda inputs: {}, spec, [], BOUNDS)


def test_every_output_of_every_case_is_compared(bundle: Bundle) -> None:
    spec = bundle.stages["clip_text"].spec
    tokens = {"tokens": np.zeros((2, 12), np.int64)}
    outputs = {t.name: np.ones((2, int(t.shape[1])), np.float32) for t in spec.outputs}
    wrong = outputs | {spec.outputs[1].name: outputs[spec.outputs[1].name] * 2}
    calls = iter([outputs, wrong])
    checks = check_stage(lambda inputs: next(calls), spec, [Case(tokens, outputs), Case(tokens, outputs)], BOUNDS)
    assert [check.passed for check in checks] == [True, True, True, False]


def test_ranges() -> None:
    shape = ShapeRange((1, 3), (2, 3), (4, 3))
    assert shape.holds((4, 3))
    assert not shape.holds((5, 3))
    assert not shape.holds((4, 2))
    assert not shape.holds((4,))
