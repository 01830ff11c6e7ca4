"""Bundles whose weights are noise: the same everywhere, sound, named as what they are; damaged archives are refused."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks import weightless
from benchmarks.weightless import LARGE, PERIOD, fill, main, noise_block, pack
from odise_rt.bundle import Bundle
from odise_rt.errors import BundleError
from tests.odise_rt.fake_bundle import digest, read_manifest, write_bundle, write_manifest

WEIGHTS = "onnx/clip_text.onnx.data"
_generator = np.random.default_rng(7)
TENSORS: dict[str, np.ndarray] = {
    "matrix": _generator.normal(0.25, 3.0, (200, 160)).astype(np.float32),
    "halves": _generator.normal(-1.0, 0.01, 3 * LARGE).astype(np.float16),
    "constant": np.full(LARGE, 1.5, np.float32),
    "indices": np.arange(2 * LARGE, dtype=np.int64),
    "mask": np.where(np.arange(LARGE) % 3 == 0, -np.inf, 0).astype(np.float32),
    "bias": _generator.normal(size=LARGE // 2).astype(np.float32),
}
NOISE = ("matrix", "halves", "constant")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle with all of these in a weight file."""
    root = write_bundle(tmp_path / "bundle")
    graph = root / "onnx" / "clip_text.onnx"
    model = onnx.load(graph)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in TENSORS.items())
    onnx.save(model, graph, save_as_external_data=True, location=f"{graph.name}.data", size_threshold=1024)
    manifest = read_manifest(root)
    manifest["stages"]["clip_text"] |= {"sha256": digest(graph), "extra_files": {WEIGHTS: digest(root / WEIGHTS)}}
    write_manifest(root, manifest)
    return root


@pytest.fixture
def archive(bundle: Path, tmp_path: Path) -> Path:
    pack(bundle, tmp_path / "bundle.zip")
    return tmp_path / "bundle.zip"


def _tensors(root: Path) -> dict[str, np.ndarray]:
    model = onnx.load(root / "onnx" / "clip_text.onnx")
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_large_weights_are_noise_and_the_rest_is_as_it_was(archive: Path, bundle: Path, tmp_path: Path) -> None:
    assert archive.stat().st_size < 0.8 * (bundle / WEIGHTS).stat().st_size
    fill(archive, tmp_path / "noise")
    found = _tensors(tmp_path / "noise")
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        if name not in NOISE:
            np.testing.assert_array_equal(found[name], array)
            continue
        mean, deviation = float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))
        assert found[name].mean(dtype=np.float64) == pytest.approx(mean, abs=0.05 * deviation + 1e-6)
        assert found[name].std(dtype=np.float64) == pytest.approx(deviation, rel=0.02, abs=1e-6)
        assert name == "constant" or np.mean(found[name] == array) < 0.1


def test_it_is_a_sound_bundle_and_the_same_everywhere(archive: Path, bundle: Path, tmp_path: Path) -> None:
    first, second = fill(archive, tmp_path / "first"), fill(archive, tmp_path / "second")
    assert first.digest == second.digest != Bundle.open(bundle).digest
    assert fill(archive, tmp_path / "third", seed=weightless.SEED + 1).digest != first.digest
    opened = Bundle.open(first.root)  # compares every hash
    assert opened.name == "fake-label-noise"
    assert opened.manifest["created_from"]["kind"] == "noise"
    assert opened.stages["mask_decoder"].file.digest == Bundle.open(bundle).stages["mask_decoder"].file.digest


def test_noise_does_not_depend_on_the_version_of_numpy() -> None:
    block = noise_block()
    assert block.shape == (PERIOD,)
    assert zlib.crc32(block.tobytes()) == 2084137227  # of numpy 1.26 and 2.4
    assert block.mean() == pytest.approx(0, abs=1e-3)
    assert block.std() == pytest.approx(1, abs=1e-3)


def test_a_tensor_longer_than_the_noise_starts_it_again() -> None:
    block = np.arange(10, dtype=np.float32)
    entry = weightless.Noise(0, 23, "float32", mean=1.0, deviation=2.0)
    values = np.concatenate(list(entry.values(block, "file")))
    start = int((values[0] - 1) / 2)
    assert values.tolist() == [2.0 * ((start + i) % 10) + 1 for i in range(23)]


def _rewrite(archive: Path, name: str, change: Callable[[Any], Any]) -> None:
    with zipfile.ZipFile(archive) as zipped:
        members = {member: zipped.read(member) for member in zipped.namelist()}
    members[name] = json.dumps(change(json.loads(members[name]))).encode()
    with zipfile.ZipFile(archive, "w") as zipped:
        for member, data in members.items():
            zipped.writestr(member, data)


def _elsewhere(table: dict[str, Any]) -> dict[str, Any]:
    return table | {"files": {f"../../{name}": file for name, file in table["files"].items()}}


def _changed(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda table: table | {"files": {name: file | changes for name, file in table["files"].items()}}


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table | {"schema_version": 2},
        lambda table: [],
        lambda table: {"schema_version": 1, "files": {}},
        _elsewhere,
        _changed(bytes=1),
        _changed(bytes=1 << 50),
        _changed(kept=[[0, 1 << 30]]),
        _changed(kept=[[0, 8], [4, 8]]),
        _changed(noise=[[0, 4, "float64", 0, 1]]),
        _changed(noise=[[0, 4, "float32", float("nan"), 1]]),
        _changed(noise=[[0, -4, "float32", 0, 1]]),
    ],
)
def test_a_damaged_table_is_one_error_and_leaves_nothing(
    change: Callable[[Any], Any], archive: Path, tmp_path: Path
) -> None:
    _rewrite(archive, "weights.json", change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BundleError, match="pack the bundle again"):
        fill(archive, tmp_path / "noise")
    assert sorted(tmp_path.iterdir()) == before


def test_an_archive_that_unpacks_to_too_much_is_refused(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weightless, "MAX_ARCHIVE_BYTES", 100_000)
    with pytest.raises(BundleError, match="unpacks to more"):
        fill(archive, tmp_path / "noise")


def test_what_is_no_archive_or_in_the_way_is_said(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("no archive")
    for arguments, words in [
        (["fill", str(tmp_path / "text"), str(tmp_path / "out")], "no archive of a bundle"),
        (["fill", str(tmp_path / "absent"), str(tmp_path / "out")], "No such file"),
        (["fill", str(archive), str(tmp_path)], "there already"),
        (["pack", str(tmp_path / "absent"), str(tmp_path / "new.zip")], "no bundle"),
    ]:
        assert main(arguments) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["fill", str(archive), str(tmp_path / "out")]) == 0
    assert "fake-label-noise" in capsys.readouterr().out
