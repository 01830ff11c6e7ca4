"""Bundles that are sound open; every other one ends in a BundleError that says what to do."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odise_rt import Bundle, BundleError
from odise_rt.bundle import SCHEMA_VERSION, file_sha256
from odise_rt.specs import STAGES
from tests.odise_rt.fake_bundle import digest, make_facts, read_manifest, write_bundle, write_manifest

NewBundle = Callable[[], Path]


def edited(root: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    manifest = read_manifest(root)
    edit(manifest)
    write_manifest(root, manifest)
    return root


def test_a_sound_bundle_opens(label_bundle: Path) -> None:
    bundle = Bundle.open(label_bundle)
    assert bundle.name == "fake-label"
    assert bundle.facts == make_facts()
    assert set(bundle.stages) == set(STAGES)
    assert bundle.verified
    assert bundle.training_vocabulary == {"red", "green", "car"}
    assert bundle.digest == digest(label_bundle / "bundle.json")


def test_hashes_can_be_compared_after_a_bundle_was_opened(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = Bundle.open(label_bundle, verify=False).verify()
    assert verified == Bundle.open(label_bundle)
    monkeypatch.setattr("odise_rt.bundle.file_sha256", lambda path: pytest.fail("compared a second time"))
    assert verified.verify() is verified


def test_a_file_that_went_before_hashes_are_compared_is_missing(new_bundle: NewBundle) -> None:
    bundle = Bundle.open(new_bundle(), verify=False)
    (bundle.root / "onnx/clip_mask.onnx").unlink()
    with pytest.raises(BundleError, match=r"lacks onnx/clip_mask\.onnx"):
        bundle.verify()


def test_constants_have_the_shapes_of_the_model(label_bundle: Path, caption_bundle: Path) -> None:
    label, caption = Bundle.open(label_bundle).constants(), Bundle.open(caption_bundle).constants()
    assert label["noise"].shape == (1, 4, 8, 8)
    assert label["null_text_embedding"].shape == (1, 3, 4)
    assert label["no_object_embedding"].shape == (5,)
    assert "no_object_embedding" not in caption


def test_hash_is_that_of_hashlib(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 9000)  # more than two pieces of 1 MiB
    assert file_sha256(path) == digest(path)


@pytest.mark.parametrize("victim", ["onnx/unet_tap.onnx", "constants.npz", "tokenizer.json"])
def test_altered_file_is_found(new_bundle: NewBundle, victim: str) -> None:
    root = new_bundle()
    content = bytearray((root / victim).read_bytes())
    place = len(content) - 1 if victim.endswith(".onnx") else len(content) // 2  # there a graph stays one
    content[place] ^= 1
    (root / victim).write_bytes(bytes(content))
    with pytest.raises(BundleError, match=f"{victim} was altered"):
        Bundle.open(root)
    unverified = Bundle.open(root, verify=False)
    assert not unverified.verified
    with pytest.raises(BundleError, match=f"{victim} was altered"):
        unverified.verify()


@pytest.mark.parametrize("victim", ["onnx/clip_mask.onnx", "constants.npz", "tokenizer.json"])
def test_missing_file_is_found_even_without_hashes(new_bundle: NewBundle, victim: str) -> None:
    root = new_bundle()
    (root / victim).unlink()
    with pytest.raises(BundleError, match=f"lacks {victim}"):
        Bundle.open(root, verify=False)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"no readable bundle\.json"):
        Bundle.open(tmp_path)
    (tmp_path / "bundle.json").mkdir()
    with pytest.raises(BundleError, match=r"no readable bundle\.json"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (SCHEMA_VERSION + 1, "upgrade odise_rt"),
        (0, "export the bundle again"),
        ("1", "again"),
        (None, "again"),
        (True, "again"),
    ],
)
def test_another_schema_version_is_refused(new_bundle: NewBundle, version: object, message: str) -> None:
    root = edited(new_bundle(), lambda m: m.update(schema_version=version))
    with pytest.raises(BundleError, match=message):
        Bundle.open(root)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00", '"text"', "[" * 100_000])
def test_manifest_that_is_no_manifest(new_bundle: NewBundle, content: str) -> None:
    root = new_bundle()
    (root / "bundle.json").write_text(content)
    with pytest.raises(BundleError):
        Bundle.open(root)


@pytest.mark.parametrize(
    "path",
    [
        "../outside.onnx",
        "onnx/../../outside.onnx",
        "onnx/../constants.npz",
        "/etc/passwd",
        "",
        ".",
        "./",
        "onnx\\..\\..\\x",
        "C:/windows",
        "onnx/\x00",
        "\ud800",
    ],
)
@pytest.mark.parametrize("place", ["stage", "extra", "file", "variant"])
def test_path_that_leaves_the_folder_is_refused(new_bundle: NewBundle, path: str, place: str) -> None:
    root = new_bundle()
    (root.parent / "outside.onnx").write_bytes(b"x")
    sha = "0" * 64

    def edit(manifest: dict[str, Any]) -> None:
        stage = manifest["stages"]["clip_image"]
        if place == "stage":
            stage["file"] = path
        elif place == "extra":
            stage["extra_files"] = {path: sha}
        elif place == "variant":
            stage["variants"] = {"ort-cpu": {"file": path, "sha256": sha}}
        else:
            manifest["files"][path] = sha

    with pytest.raises(BundleError, match="leaves the bundle: refused"):
        Bundle.open(edited(root, edit), verify=False)


def test_path_that_no_file_can_have_is_not_there(new_bundle: NewBundle) -> None:
    root = edited(new_bundle(), lambda m: m["files"].update({"onnx/" + "x" * 5000: "0" * 64}))
    with pytest.raises(BundleError, match="lacks onnx/xxx"):
        Bundle.open(root, verify=False)


def test_link_that_leaves_the_folder_is_refused(new_bundle: NewBundle, tmp_path: Path) -> None:
    root = new_bundle()
    outside = tmp_path / "outside.onnx"
    (root / "onnx/clip_text.onnx").rename(outside)
    (root / "onnx/clip_text.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.open(root)
    (root / "onnx/clip_text.onnx").unlink()
    (root / "onnx/clip_text.onnx").symlink_to("clip_text.onnx")  # a loop
    with pytest.raises(BundleError):
        Bundle.open(root)


def test_link_inside_the_folder_works(new_bundle: NewBundle) -> None:
    root = new_bundle()
    (root / "onnx/clip_text.onnx").rename(root / "onnx/moved.onnx")
    (root / "onnx/clip_text.onnx").symlink_to("moved.onnx")
    assert Bundle.open(root).verified


def test_weights_without_a_hash_are_refused(new_bundle: NewBundle) -> None:
    root = new_bundle()
    (root / "onnx/unet_tap.onnx.data").write_bytes(b"weights")
    with pytest.raises(BundleError, match="no hash"):
        Bundle.open(root)
    sha = digest(root / "onnx/unet_tap.onnx.data")
    edited(root, lambda m: m["stages"]["unet_tap"].update(extra_files={"onnx/unet_tap.onnx.data": sha}))
    bundle = Bundle.open(root)
    assert bundle.stage_file("unet_tap").digest != bundle.stage_file("unet_tap").sha256


def naming(path: Path, location: str) -> None:
    """Let the graph in a file take its first weights from another file."""
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("place", ["stage", "variant"])
@pytest.mark.parametrize(
    "location",
    ["other.bin", "../constants.npz", "../../outside.bin", "/outside.bin", "sub/../w.data", "*/_ORT_MEM_ADDR_/*"],
)
def test_weights_that_a_graph_names_and_the_manifest_does_not_are_refused(
    new_bundle: NewBundle, location: str, place: str
) -> None:
    root = new_bundle()
    for outside in (root / "onnx/other.bin", root.parent / "outside.bin", root / "onnx/w.data"):
        outside.write_bytes(bytes(1 << 16))
    path = root / "onnx/mask_decoder.onnx"
    if place == "variant":
        path = root / "onnx/fast.onnx"
        path.write_bytes((root / "onnx/mask_decoder.onnx").read_bytes())
    naming(path, location)

    def edit(manifest: dict[str, Any]) -> None:
        stage = manifest["stages"]["mask_decoder"]
        extra = {"onnx/w.data": digest(root / "onnx/w.data")}
        entry = {"file": f"onnx/{path.name}", "sha256": digest(path), "extra_files": extra}
        stage.update(entry if place == "stage" else {"variants": {"ort-cpu": entry}})

    edited(root, edit)
    for verify in (True, False):
        with pytest.raises(BundleError, match=r"takes weights from .* has no hash for that: refused"):
            Bundle.open(root, verify=verify)


@pytest.mark.parametrize("location", ["w.data", "./w.data", "deep/w.data"])
def test_weights_that_a_graph_names_are_hashed(new_bundle: NewBundle, location: str) -> None:
    root = new_bundle()
    path, weights = root / "onnx/mask_decoder.onnx", root / "onnx" / location
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(bytes(1 << 16))
    naming(path, location)
    extra = {weights.relative_to(root).as_posix(): digest(weights)}
    edited(root, lambda m: m["stages"]["mask_decoder"].update(sha256=digest(path), extra_files=extra))
    assert Bundle.open(root).verified
    weights.write_bytes(bytes(100))
    with pytest.raises(BundleError, match=r"w\.data was altered"):
        Bundle.open(root)


@pytest.mark.parametrize("variant", [False, True])
@pytest.mark.parametrize("name", ["clip_text.ort", "clip_text.plan"])
def test_a_name_that_engines_take_for_another_format_is_refused(
    new_bundle: NewBundle, name: str, variant: bool
) -> None:
    root = new_bundle()
    path = root / "onnx" / name
    path.write_bytes((root / "onnx/clip_text.onnx").read_bytes())
    entry = {"file": f"onnx/{name}", "sha256": digest(path)}
    edited(root, lambda m: m["stages"]["clip_text"].update({"variants": {"ort-cpu": entry}} if variant else entry))
    with pytest.raises(BundleError, match=r"another name than \*\.onnx"):
        Bundle.open(root)


def test_variant_of_an_engine_is_preferred(new_bundle: NewBundle) -> None:
    root = new_bundle()
    (root / "onnx/fast.onnx").write_bytes((root / "onnx/unet_tap.onnx").read_bytes())
    entry = {"file": "onnx/fast.onnx", "sha256": digest(root / "onnx/fast.onnx")}
    edited(root, lambda m: m["stages"]["unet_tap"].update(variants={"ort-cpu": entry}))
    bundle = Bundle.open(root)
    assert bundle.stage_file("unet_tap", "ort-cpu").path.name == "fast.onnx"
    assert bundle.stage_file("unet_tap", "ort-cuda").path.name == "unet_tap.onnx"
    assert bundle.stage_file("unet_tap").path.name == "unet_tap.onnx"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["stages"].pop("unet_tap"), "lacks the stages"),
        (lambda m: m["stages"]["unet_tap"]["inputs"].pop(), "expected windows"),
        (lambda m: m["stages"]["unet_tap"].pop("outputs"), "no list of outputs"),
        (lambda m: m["stages"].update(unet_tap=3), "unet_tap"),
        (lambda m: m["stages"]["unet_tap"].update(sha256="abc"), "no SHA-256"),
        (lambda m: m["files"].pop("tokenizer.json"), "lists no"),
        (lambda m: m.pop("model"), "'model'"),
        (lambda m: m["model"].pop("queries"), "queries"),
        (lambda m: m["model"].update(queries=7), "expected"),
        (lambda m: m.update(precision="int4"), "precision"),
        (lambda m: m.update(training_vocabulary=[1]), "list of words"),
        (lambda m: m.pop("name"), "'name'"),
    ],
)
def test_incomplete_manifest_is_refused(
    new_bundle: NewBundle, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(edited(new_bundle(), edit), verify=False)


@pytest.mark.parametrize(("parameters", "expected"), [(7, 7), (True, None), ("7", None), (None, None)])
def test_parameters_are_a_number_or_unknown(new_bundle: NewBundle, parameters: object, expected: int | None) -> None:
    root = edited(new_bundle(), lambda m: m["stages"]["unet_tap"].update(parameters=parameters))
    assert Bundle.open(root).stages["unet_tap"].parameters is expected


@pytest.mark.parametrize("damage", ["absent", "shape", "nan", "not a zip", "pickle", "encrypted", "method", "bomb"])
def test_broken_constants_are_refused(new_bundle: NewBundle, damage: str) -> None:
    root = new_bundle()
    arrays: dict[str, Any] = Bundle.open(root).constants()
    if damage == "absent":
        del arrays["noise"]
    elif damage == "shape":
        arrays["noise"] = arrays["noise"][:, :2]
    elif damage == "nan":
        arrays["noise"] = arrays["noise"] * np.float32("nan")
    elif damage == "pickle":
        arrays["noise"] = np.array([{"a": 1}], dtype=object)
    np.savez(root / "constants.npz", **arrays)
    if damage == "not a zip":
        (root / "constants.npz").write_bytes(b"PK\x03\x04 but not more")
    if damage in ("encrypted", "method"):  # flags and compression method of the first entry of the directory
        content = bytearray((root / "constants.npz").read_bytes())
        entry = content.index(b"PK\x01\x02")
        offset, value = (8, 1) if damage == "encrypted" else (10, 77)
        content[entry + offset] = value
        (root / "constants.npz").write_bytes(content)
    if damage == "bomb":
        arrays["noise"] = np.zeros((1, 4, 1000, 1000), np.float32)
        np.savez_compressed(root / "constants.npz", **arrays)
        assert (root / "constants.npz").stat().st_size < 1 << 16
    bundle = Bundle.open(root, verify=False)
    with pytest.raises(BundleError, match="unpacks to 16,000" if damage == "bomb" else "export the bundle again"):
        bundle.constants()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_manifest_opens_or_is_refused(fuzzed: Path, label_bundle: Path, data: st.DataObject) -> None:
    """One value of a sound manifest, anywhere in it, is replaced by any JSON."""
    manifest = read_manifest(label_bundle)
    here: Any = manifest
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(here[key], dict | list) and here[key] and data.draw(st.booleans()):
            here = here[key]
            continue
        here[key] = data.draw(JSON)
        break
    (fuzzed / "bundle.json").write_text(json.dumps(manifest))
    with contextlib.suppress(BundleError):
        assert Bundle.open(fuzzed, verify=data.draw(st.booleans())).stages


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_path_that_is_no_text_is_named(label_bundle: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(label_bundle, tmp_path / "bundle\udce9"))
    with pytest.raises(BundleError, match=r"path '.*bundle\\udce9' is no text .*: move the bundle"):
        Bundle.open(place)
