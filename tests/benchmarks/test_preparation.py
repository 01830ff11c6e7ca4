"""What was prepared before is only taken while nothing that it came from has changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import preparation
from benchmarks.preparation import Missing, Preparation, prepare_bundle, prepare_official
from odise_rt.bundle import MANIFEST_NAME
from odise_rt.errors import BundleError
from tests.odise_rt.fake_bundle import write_bundle

CODE = ("odise_rt/bundle.py", "odise_rt/backends/ort.py", "export/stages.py", "training/torch_stages.py")
VERSIONS = {"torch": "2", "onnx": "1", "onnxscript": None}


def _keys(root: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Folders in which a bundle and the official graphs would be kept."""
    asked: list[str] = []

    def refuse(arguments: list[str], what: str) -> Missing:
        asked.append(arguments[arguments.index("--out") + 1])
        return Missing("not made in tests")

    monkeypatch.setattr(preparation, "_make", refuse)
    prepared = Preparation("odise-tiny", {"config": "odise-tiny", "seed": 0})
    prepare_bundle(prepared, "fp32")
    prepare_official(prepared, 64, 64)
    assert len(asked) == 2
    return set(asked)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in CODE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    monkeypatch.setattr(preparation, "REPOSITORY", tmp_path)
    monkeypatch.setattr(preparation, "package_versions", lambda: VERSIONS)
    return tmp_path


@pytest.mark.parametrize("package", VERSIONS)
def test_another_version_of_a_package_exports_anew(package: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _keys(root, monkeypatch)
    assert _keys(root, monkeypatch) == before
    monkeypatch.setattr(preparation, "package_versions", lambda: VERSIONS | {package: "3"})
    assert before.isdisjoint(_keys(root, monkeypatch))


@pytest.mark.parametrize("name", ["odise_rt/bundle.py", "odise_rt/backends/ort.py"])
def test_other_code_of_the_runtime_exports_anew(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _keys(root, monkeypatch)
    (root / name).write_text("changed", encoding="utf-8")
    assert before.isdisjoint(_keys(root, monkeypatch))


@pytest.mark.parametrize("right", [True, False])
def test_a_bundle_of_other_weights_is_refused(right: bool, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    write_bundle(bundle)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights" if right else b"others")
    hashes = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"kind": "checkpoint", "files": hashes}, {"checkpoint": checkpoint}),
        ({"kind": "random", "config": "odise-sd1", "seed": 0}, {"config": "odise-sd1", "seed": 0 if right else 1}),
    ]
    for created, source in cases:
        prepared = Preparation("any", source)
        manifest = json.loads((bundle / MANIFEST_NAME).read_text())
        (bundle / MANIFEST_NAME).write_text(json.dumps({**manifest, "created_from": created}))
        if right:
            prepare_bundle(prepared, "fp32", bundle)
            assert prepared.bundles["fp32"] == bundle
        else:
            with pytest.raises(BundleError, match="name a bundle of the same weights"):
                prepare_bundle(prepared, "fp32", bundle)


def test_what_exports_come_from_has_a_version() -> None:
    assert {"torch", "onnx", "onnxscript", "onnxruntime"} <= set(preparation.package_versions())
