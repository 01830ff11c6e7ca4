"""A batch on a Ray cluster of this machine: the same files and documents as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from odise_rt import Segmenter, SegmentOptions, Vocabulary, ray_batch
from odise_rt.batch import Job
from odise_rt.errors import BackendError
from odise_rt.inputs import Input
from odise_rt.ray_batch import SegmentActor, _sent
from tests.odise_rt.fake_bundle import colour_image

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("threads", "expected"), [(None, 4), (3, 3)])
def test_process_does_as_a_run_without_ray(
    label_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, expected: int
) -> None:
    """Its documents have the same names, its images the same bound; the cores are shared with its neighbours."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr("odise_rt.ray_batch.usable_cores", lambda: 8)
    loaded = []

    def load(threads: int) -> Segmenter:
        loaded.append(threads)
        return Segmenter.load(label_bundle, device="cpu", threads=1)

    path = tmp_path / "p.png"
    Image.fromarray(colour_image(60, 96)).save(path)
    actor = SegmentActor(load, Job(Vocabulary.parse("red"), SegmentOptions(), ("cvat",), tmp_path), threads, 2)
    (row,) = actor({"input": [json.dumps(_sent(Input(path, "p", "a/p.png"), "key"))]})
    assert 'name="a/p.png"' in json.loads(row["record"][0])["cvat"]
    assert loaded == [expected]


def odise_rt(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_DISABLE_IMPORT_WARNING": "1"}
    command = [sys.executable, "-m", "odise_rt", "segment", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


class Started(Exception):
    """Stands for an error of Ray's."""


def test_a_cluster_here_is_a_new_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without an address Ray would join the cluster of $RAY_ADDRESS."""
    asked: list[str | None] = []

    def init(address: str | None = None, **options: Any) -> None:
        asked.append(address)
        raise Started

    ray = SimpleNamespace(
        init=init, is_initialized=lambda: False, shutdown=lambda: None, exceptions=SimpleNamespace(RayError=Started)
    )
    monkeypatch.setattr(ray_batch, "_import_ray", lambda: ray)
    job = Job(Vocabulary.parse("red"), SegmentOptions(), ("json",), tmp_path)
    with pytest.raises(BackendError, match="the Ray cluster 'local' failed"):
        list(ray_batch.segment_on_ray(lambda: pytest.fail("loaded"), job, [], {}, "local"))
    assert asked == ["local"]


@pytest.mark.slow
def test_cluster_agrees_with_one_process_and_resumes(label_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Requires: the packages ray and pyarrow (extra 'ray')")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(5):
        Image.fromarray(colour_image(60 + i, 96)).save(photos / f"p{i}.png")
    (photos / "broken.png").write_bytes(b"not a picture")
    common = [photos, "--bundle", label_bundle, "--threads", "1", "-q", "--vocab", "red; green; stuff: blue; white"]
    common += ["--format", "json,coco", "--device", "cpu"]
    alone = odise_rt(*common, "--out", tmp_path / "alone")
    assert alone.returncode == 2, alone.stderr
    ray = odise_rt(*common, "--out", tmp_path / "ray", "--ray", "--actors", "2")
    assert ray.returncode == 2, ray.stderr
    for name in ("panoptic.json", "failed.json"):
        assert json.loads((tmp_path / "ray" / name).read_text()) == json.loads((tmp_path / "alone" / name).read_text())
    for i in range(5):
        ours, theirs = (json.loads((tmp_path / d / f"p{i}.json").read_text()) for d in ("ray", "alone"))
        assert ours["segments"] == theirs["segments"]
    (tmp_path / "ray/p3.json").unlink()
    again = odise_rt(*common, "--out", tmp_path / "ray", "--ray", "--actors", "1", "--json")
    assert again.returncode == 2, again.stderr
    assert json.loads(again.stdout)["done_before"] == 4
    assert (tmp_path / "ray/p3.json").is_file()


@pytest.mark.slow
def test_cluster_that_is_not_there(label_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Requires: the packages ray and pyarrow (extra 'ray')")
    Image.fromarray(colour_image()).save(tmp_path / "a.png")
    common = [tmp_path / "a.png", "--bundle", label_bundle, "--vocab", "red", "--out", tmp_path / "o", "-q"]
    done = odise_rt(*common, "--ray-address", "127.0.0.1:1", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "BackendError"
    assert "127.0.0.1:1" in done.stderr


@pytest.mark.slow
def test_sigterm_stops_a_cluster_as_any_run(label_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Requires: the packages ray and pyarrow (extra 'ray')")
    for i in range(300):
        Image.fromarray(colour_image(60, 96)).save(tmp_path / f"p{i}.png")
    command = [sys.executable, "-m", "odise_rt", "segment", str(tmp_path), "--bundle", label_bundle.name, "--ray", "-q"]
    command += ["--vocab", "red", "--format", "json", "--device", "cpu", "--out", str(tmp_path / "o")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=label_bundle.parent) as run:
        log = tmp_path / "o/run.jsonl"
        end = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        run.terminate()
        errors = run.communicate(timeout=60)[1]
    assert run.returncode == 143, errors
    assert "goes on where it was" in errors
    assert "error" not in json.loads(log.read_text().splitlines()[0])
